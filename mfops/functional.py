"""The public functions on tensors: X' = Y Z and its reconstruction error, Y and Z of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from mfops import autograd, reference
from mfops.autocast import cast_for_autocast, without_autocast
from mfops.backends import select, under_transform
from mfops.checks import (
    check_bases,
    check_factors,
    check_features,
    check_method,
    check_steps,
    check_temperature,
)
from mfops.exporting import constant_for_the_compiler
from mfops.methods import METHODS, with_temperature
from mfops.methods.base import INVERSE_TEMPERATURE
from mfops.tracing import one_node


@constant_for_the_compiler  # a graph is compiled anew when the setting changes
def _matmul_in_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _tf32(x: Tensor) -> bool:
    """Whether products of x's dtype and device may round to TF32: torch's setting for matmuls."""
    return x.dtype == torch.float32 and x.is_cuda and _matmul_in_tf32()


def _prepare(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as (B, C, N), y and z as the operators take them; x's features are checked already."""
    if isinstance(y, Tensor) and isinstance(z, Tensor):
        x, y, z = cast_for_autocast(x, y, z)
    check_factors(x, y, z)
    # A view for contiguous and channels_last images alike.
    return (x if x.dim() == 3 else x.flatten(2)), y, z


def _as_features(x_hat: Tensor, x: Tensor) -> Tensor:
    """X' with x's spatial dimensions; a batch of 1 where both factors are shared."""
    if x_hat.dim() == 2:
        x_hat = x_hat.unsqueeze(0)
    return x_hat if x.dim() == 3 else x_hat.unflatten(2, x.shape[2:])


def _reconstruct(x: Tensor, y: Tensor, z: Tensor, expand: bool) -> tuple[Tensor, Tensor]:
    rows, y, z = _prepare(x, y, z)
    backend = select(rows, y.shape[-1])
    x_hat, mse = autograd.reconstruct(rows, y, z, backend, _tf32(rows), expand)
    return _as_features(x_hat, x), mse


# For `mfops.factorizers`, which have checked the features.


def product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """X' alone, laid out as x is, a batch of 1 where both factors are shared; x is not read."""
    rows, y, z = _prepare(x, y, z)
    return _as_features(reference.product(rows, y, z), x)


def reconstruct(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """As `factorized_reconstruction`, but X' of shared factors comes with a batch of 1."""
    return _reconstruct(x, y, z, expand=False)


@one_node
def factorized_reconstruction(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Low-rank reconstruction X' = Y Z of features X and its mean squared error.

        X'_b = Y_b Z_b,    mse = 1/(B C N) sum_bcn (X - X')^2_bcn

    (Gurram, "Learning context with factorization techniques in semantic segmentation".)
    X is read once forward and once backward; X - X' is computed anew backward, never stored.

    Args:
        x: features (B, C, N) or (B, C, H, W) with N = H W; float32, bfloat16, float16 or
            float64; contiguous and channels_last both without copies, so that tokens (B, N, C)
            are x.mT, maps (B, H, W, C) x.permute(0, 3, 1, 2); where N, or H, is C nobody can tell
            that they were not turned.
        y: bases (C, K), shared by the batch, or (B, C, K); x's dtype and device.
        z: coefficients (K, N), shared by the batch, or (B, K, N); x's dtype and device.

    Returns:
        X', of x's shape, dtype and memory layout (where both factors are shared, an expanded
        view of the one X' there is), and mse, a float32 scalar (float64 for float64 input) of
        X' before it is rounded to x's dtype. Both differentiable in x, y and z, twice.
        Under autocast all three are cast to the autocast dtype first. Under torch.func's
        transforms the PyTorch reference runs; torch.fx traces the call as one node.

    Raises:
        TypeError: not a tensor, a dtype not listed, or dtypes that differ.
        ValueError: shapes or devices that do not fit, an empty x, K = 0.
        RuntimeError: the backend of `use_backend` cannot run this call.
    """
    check_features(x)
    return _reconstruct(x, y, z, expand=True)


@one_node
def factorized_mse(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The mse of `factorized_reconstruction` alone; X' is never written to memory.

        mse = 1/(B C N) sum_bcn (X - Y Z)^2_bcn

    Arguments and errors are those of `factorized_reconstruction`.

    Returns:
        A float32 scalar (float64 for float64 input), differentiable in x, y and z.
    """
    check_features(x)
    rows, y, z = _prepare(x, y, z)
    return autograd.reconstruction_error(rows, y, z, select(rows, y.shape[-1]), _tf32(rows))


def _checked(
    x: Tensor, method: str, steps: int, inverse_temperature: float | None
) -> tuple[str, int, float | None]:
    """Method, steps and inverse temperature."""
    check_features(x)
    check_method(method)
    temperature = check_temperature(method, inverse_temperature)
    return method, check_steps(steps), temperature


@one_node
def factorize(
    x: Tensor,
    y0: Tensor,
    method: str = "em",
    steps: int = 3,
    inverse_temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Factors Y and Z with X ~ Y Z, found on each image by `steps` rounds of a method's updates.

    | method | published as | gradient to x |
    |---|---|---|
    | "em" | EMANet (Li et al., ICCV 2019) | none |
    | "nmf" | Hamburger (Geng et al., ICLR 2021) | through one update of Z |
    | "vq" | Hamburger | through one assignment |
    | "cd" | Hamburger | through one ridge regression |

    The formulas, with their equations, are in the docstrings of `mfops.methods`; the rounds run
    without gradient and accumulate in float32 (float64 for float64 input) under autocast too.

    Args:
        x: features (B, C, N) or (B, C, H, W) with N = H W; float32, bfloat16, float16 or
            float64; contiguous and channels_last both without copies, so that tokens (B, N, C)
            are x.mT, maps (B, H, W, C) x.permute(0, 3, 1, 2); where N, or H, is C nobody can tell
            that they were not turned. "nmf" needs x >= 0, which is not looked for (it would take a
            pass over x): with negative elements the updates may divide by zero. Constant and
            all-zero x give finite factors; a NaN makes those of its image NaN and leaves other
            images alone.
        y0: bases to start from (C, K), shared by the batch, or (B, C, K); x's dtype or float32,
            x's device; K may exceed C and N. Under autocast only x is cast.
        method: one of the table's, or one made known by `mfops.register_method`.
        steps: T, the number of rounds, at least 1.
        inverse_temperature: t > 0 of "vq" and "cd"; None: the method's own, 100. The published
            settings have 1, the authors advise 10 or 100.

    Returns:
        Y (B, C, K), in y0's dtype, without gradient; Z (B, K, N), in x's dtype (the autocast dtype
        under autocast). `factorized_reconstruction` wants them alike: `y.to(z.dtype)`.

    Raises:
        TypeError: not a tensor, a dtype not listed or, of y0, neither x's nor float32.
        ValueError: an unknown method, steps < 1, shapes or devices that do not fit, an empty x,
            K = 0, an inverse temperature beyond 1e-6 to 1e6 or not the method's to take.
        RuntimeError: the backend of `use_backend` has no kernels for the method.
    """
    return factorize_checked(x, y0, *_checked(x, method, steps, inverse_temperature))


@one_node
def factorize_reconstruct(
    x: Tensor,
    y0: Tensor,
    method: str = "em",
    steps: int = 3,
    inverse_temperature: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """X' = Y Z, its mean squared error and Y, with the factors that `factorize` finds.

        Y, Z by `steps` rounds of the method from y0,    X'_b = Y_b Z_b,
        mse = 1/(B C N) sum_bcn (X - X')^2_bcn

    (the context of EMANet, Li et al., ICCV 2019, and of Hamburger, Geng et al., ICLR 2021; the
    formulas of each method are in the docstrings of `mfops.methods`). "em" and "nmf" have kernels
    for all of it; of the others it is `factorize`, then `factorized_reconstruction`.

    Args:
        x, y0, method, steps, inverse_temperature: as for `factorize`.

    Returns:
        X', of x's shape, dtype (the autocast dtype under autocast) and memory layout; mse, a
        float32 scalar (float64 for float64 input) of X' before it is rounded; Y (B, C, K), in
        y0's dtype, without gradient. Z's gradient to x, in the table of `factorize`, is that of X'
        too, and mse has it beside that of X in X - X'.
        Under torch.func's transforms the PyTorch reference runs; torch.fx traces the call as one
        node.

    Raises:
        TypeError, ValueError, RuntimeError: as `factorize` does.
    """
    return factorize_reconstruct_checked(x, y0, *_checked(x, method, steps, inverse_temperature))


# For `mfops.factorizers`, which have checked features and method, and given the temperature.


def _prepare_bases(x: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
    (x,) = cast_for_autocast(x)
    check_bases(x, y0)
    rows = x if x.dim() == 3 else x.flatten(2)
    return rows, y0.detach().to(reference.accumulation_dtype(x))


def factorize_checked(
    x: Tensor, y0: Tensor, method: str, steps: int, inverse_temperature: float | None
) -> tuple[Tensor, Tensor]:
    """Y and Z, as `factorize`."""
    rows, start = _prepare_bases(x, y0)
    temperature = inverse_temperature or INVERSE_TEMPERATURE  # an operator takes a number
    backend = select(rows, y0.shape[-1], method)
    updates = with_temperature(METHODS[method], temperature)
    with without_autocast(rows.device.type):
        # Constants rather than a region without gradient, which torch.export.save cannot write.
        y, z = backend.factorize(rows.detach(), start, method, steps, _tf32(rows), temperature)
        if updates.changes_last_coefficients:
            z = updates.final_coefficients(rows.to(y.dtype), y, z.to(y.dtype)).to(z.dtype)
    return y.to(y0.dtype), z


def factorize_reconstruct_checked(
    x: Tensor, y0: Tensor, method: str, steps: int, inverse_temperature: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """X', mse and Y, as `factorize_reconstruct`."""
    if under_transform() or not METHODS[method].fused:
        y, z = factorize_checked(x, y0, method, steps, inverse_temperature)
        return *_reconstruct(x, y.to(z.dtype), z, expand=True), y
    rows, start = _prepare_bases(x, y0)
    backend = select(rows, y0.shape[-1], method)
    with without_autocast(rows.device.type):
        x_hat, mse, y = autograd.factorize_reconstruct(
            rows, start, method, steps, backend, _tf32(rows)
        )
    return _as_features(x_hat, x), mse, y.to(y0.dtype)
