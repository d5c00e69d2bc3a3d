"""Where Y and Z come from. A factorizer is a module: features (B, C, N or H, W) -> y, z.

Two have parameters of their own, "learned" and "double_attention"; every method of `mfops.methods`
is one too.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from mfops.autocast import autocasts
from mfops.backends import under_transform
from mfops.checks import (
    check_channels,
    check_features,
    check_method,
    check_positive,
    check_steps,
    check_temperature,
)
from mfops.exporting import is_exporting
from mfops.functional import (
    factorize_checked,
    factorize_reconstruct_checked,
    product,
    reconstruct,
)
from mfops.methods import METHODS, WITH_PARAMETERS
from mfops.reference import accumulation_dtype
from mfops.tracing import record_module

INITS = ("normal", "uniform")
Want = Literal["factors", "reconstruction", "product"]


class Factorizer(nn.Module):
    """factorizer(x) -> y, z; reconstruct(x) -> X', mse; product(x) -> X'.

    X' has x's shape, or a batch of 1 where all images share it. Each of the three is one call of
    the module, in which its hooks run, and checks x once; what a subclass says (`_factors`,
    `_reconstruct`, `_product`) takes it as checked.

    Args:
        channels: C of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, want: Want = "factors") -> Any:
        if isinstance(x, Proxy):
            return record_module(self, x, want)
        self._check(x)
        if want == "factors":
            return self._factors(x)
        return self._reconstruct(x) if want == "reconstruction" else self._product(x)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X' = Y Z and its mse to x."""
        x_hat, mse = self(x, want="reconstruction")
        return x_hat, mse

    def product(self, x: Tensor) -> Tensor:
        """X' alone."""
        x_hat: Tensor = self(x, want="product")
        return x_hat

    def _check(self, x: Tensor) -> None:
        check_features(x)
        check_channels(x, self.channels)
        for parameter in self.parameters():
            if x.dtype != parameter.dtype and not (autocasts(x) and x.dtype != torch.float64):
                raise TypeError(
                    f"x: expected the dtype of the parameters, {parameter.dtype}, got {x.dtype}"
                )

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return reconstruct(x, *self._factors(x))

    def _product(self, x: Tensor) -> Tensor:
        return product(x, *self._factors(x))  # X is not read again


def resampled(z: Tensor, size: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """A learned Z (K, h w) of the grid `size` (h, w), bilinearly on another `grid`."""
    maps = z.unflatten(1, size).unsqueeze(0)
    return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)[0].flatten(1)


class LearnedFactorizer(Factorizer):
    """Y (C, K) and Z (K, h w) are parameters shared by the whole data set.

    X' = Y Z is then the same for every image: a learned spatial prior and a pull on the
    features, not context of the image at hand. Z belongs to the grid `size`; for another it is
    resampled bilinearly as a (K, h, w) map.

    Args:
        channels: C.
        rank: K.
        size: the grid (h, w) that Z belongs to.
        init: the distribution that Y and Z start from: "normal", standard normal, as in MFNet's
            paper: X' then has a deviation of sqrt(K); or "uniform", as in its code: Y in
            +-1 / sqrt(C K), Z in +-1 / sqrt(N K): X' starts at almost 0.

    Raises:
        ValueError: another init.
    """

    def __init__(
        self, channels: int, rank: int, size: tuple[int, int], init: str = "normal"
    ) -> None:
        super().__init__(channels)
        if init not in INITS:
            raise ValueError(f"init: expected {' or '.join(INITS)}, got {init!r}")
        self.size = size
        self.init = init
        self.y = nn.Parameter(torch.empty(channels, rank))
        self.z = nn.Parameter(torch.empty(rank, size[0] * size[1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for factor in (self.y, self.z):
            if self.init == "normal":
                nn.init.normal_(factor)
            else:
                bound = factor.numel() ** -0.5
                nn.init.uniform_(factor, -bound, bound)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        grid = tuple(x.shape[2:])
        pixels = self.size[0] * self.size[1]
        if len(grid) == 1:
            if grid[0] != pixels:
                raise ValueError(
                    f"x: expected N = {pixels} pixels for size {self.size}, got {grid[0]}; "
                    "pass (B, C, H, W) to have z resampled"
                )
            return self.y, self.z
        # On its own grid resampling gives z itself, bit for bit: this only saves the time. To
        # compare would bind an exported program to the grid of its example.
        if not is_exporting() and grid == self.size:
            return self.y, self.z
        return self.y, resampled(self.z, self.size, grid)


class ImageFactorizer(Factorizer):
    """Y and Z are found on each image by a method of `mfops.methods`, from the buffer `bases`.

    In evaluation the rounds always start from `bases` (C, K), so the same input gives the same
    output. In training "em" does too, and every pass moves the buffer towards the mean, over the
    batch and (each counting alike) the ranks of an initialized process group, of the bases it
    found; where that is not finite the buffer stays as it is. The other methods start a training
    pass from fresh noise, as published. The buffer is noise of a fixed seed when it is made. A
    state dict has it under the method's name, `em_bases`, so that no other method loads it; one
    that says `bases`, as those of the version before do, is taken for the method's own.

    Under activation checkpointing em's second forward pass starts from bases that the first has
    moved, and moves them again: keep it outside of what is computed anew.

    Args:
        method: "em", "nmf", "vq", "cd" or one made known by `mfops.register_method`.
        channels: C.
        rank: K.
        steps: T, the rounds; None: the method's own (em 3; the others 6 in training, 7 in
            evaluation).
        inverse_temperature: of "vq" and "cd"; None: the method's own, 100.

    Raises:
        ValueError: an unknown method; channels, rank or steps < 1; an inverse temperature
            beyond 1e-6 to 1e6 or not the method's to take.
        TypeError: steps is not an integer.
    """

    def __init__(
        self,
        method: str,
        channels: int,
        rank: int,
        steps: int | None = None,
        inverse_temperature: float | None = None,
    ) -> None:
        super().__init__(check_positive("channels", channels))
        check_method(method)
        self.method = method
        self.steps = None if steps is None else check_steps(steps)
        self.inverse_temperature = check_temperature(method, inverse_temperature)
        shape = channels, check_positive("rank", rank)
        self._buffer = f"{method.replace('.', '_')}_bases"  # no name of a buffer has dots
        self.register_buffer(self._buffer, torch.empty(shape))
        self.register_load_state_dict_pre_hook(_bases_of_the_method)
        self.reset_parameters()

    @property
    def bases(self) -> Tensor:
        """The buffer (C, K)."""
        bases: Tensor = getattr(self, self._buffer)
        return bases

    def reset_parameters(self) -> None:
        """Seeded: weights published without bases then have one score, not one for every run."""
        noise = METHODS[self.method].noise(
            *self.bases.shape,
            generator=torch.Generator().manual_seed(0),
            device=torch.device("cpu"),  # the same numbers on every device
        )
        self.bases.copy_(noise)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, start, steps = self._prepare(x)
        y, z = factorize_checked(x, start, self.method, steps, self.inverse_temperature)
        self._update(y)
        return y.to(z.dtype), z

    def _reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, start, steps = self._prepare(x)
        x_hat, mse, y = factorize_reconstruct_checked(
            x, start, self.method, steps, self.inverse_temperature
        )
        self._update(y)
        return x_hat, mse

    def _product(self, x: Tensor) -> Tensor:
        method = METHODS[self.method]
        if method.fused and method.one_step_gradient:  # the kernel for the last Z has X' at hand
            return self._reconstruct(x)[0]
        return super()._product(x)

    def _prepare(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """X as the method takes it, the bases to start from, the number of rounds."""
        method = METHODS[self.method]
        if method.momentum is not None and self.training and under_transform():
            raise RuntimeError(
                f"factorizer {self.method!r} moves its bases in training, which torch.func's "
                "transforms do not allow: let them rest with eval() on the factorizer alone"
            )
        own = method.train_steps if self.training else method.eval_steps
        start = self.bases.to(accumulation_dtype(x))
        if self.training and method.momentum is None:
            start = method.noise(x.shape[0], *self.bases.shape, device=x.device).to(start.dtype)
        return (
            F.relu(x) if method.nonnegative else x,
            start,
            own if self.steps is None else self.steps,
        )

    def _update(self, y: Tensor) -> None:
        momentum = METHODS[self.method].momentum
        if momentum is None or not self.training:
            return
        mean = y.mean(0)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        # A NaN, or float16 that has overflowed, would never leave the buffer again.
        mean = torch.where(mean.isfinite().all(), mean.to(self.bases.dtype), self.bases)
        self.bases.lerp_(mean, 1 - momentum)

    def extra_repr(self) -> str:
        channels, rank = self.bases.shape
        options = f"{self.method!r}, {channels}, rank={rank}, steps={self.steps}"
        temperature = self.inverse_temperature
        return options if temperature is None else f"{options}, inverse_temperature={temperature}"


def _bases_of_the_method(
    module: ImageFactorizer, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Takes `bases` for the method's own."""
    before = f"{prefix}bases"
    if before in state_dict:
        state_dict.setdefault(f"{prefix}{module._buffer}", state_dict.pop(before))


class DoubleAttentionFactorizer(Factorizer):
    """Chen et al., "A2-Nets: Double Attention Networks", NeurIPS 2018.

        Y = X softmax over N of (W_b X + b_b)^T     (feature gathering; A = X here)
        Z = softmax over K of (W_v X + b_v)         (feature distribution)

    Differentiable throughout; W_b and W_v (K, C) are parameters.

    Args:
        channels: C.
        rank: K.
    """

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__(channels)
        self.gather = nn.Conv1d(channels, rank, 1)
        self.distribute = nn.Conv1d(channels, rank, 1)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if x.dim() == 3 else x.flatten(2)
        y = x @ torch.softmax(self.gather(x), dim=-1).mT.to(x.dtype)
        return y, torch.softmax(self.distribute(x), dim=-2).to(y.dtype)


def create_factorizer(
    name: str,
    channels: int,
    rank: int,
    size: tuple[int, int],
    steps: int | None = None,
    init: str | None = None,
    inverse_temperature: float | None = None,
) -> Factorizer:
    """The factorizer of that name.

    `size` and `init` are for "learned", `steps` and `inverse_temperature` for methods.

    Raises:
        ValueError: an unknown name; steps, init or inverse_temperature where there are none.
    """
    if not isinstance(name, str) or name not in (*WITH_PARAMETERS, *METHODS):
        names = ", ".join([*WITH_PARAMETERS, *METHODS])
        raise ValueError(f"factorizer: expected one of {names}, got {name!r}")
    if init is not None and name != "learned":
        raise ValueError(f"init: factorizer {name!r} takes none, got {init!r}")
    if name in METHODS:
        return ImageFactorizer(name, channels, rank, steps, inverse_temperature)
    for option, given in (("steps", steps), ("inverse_temperature", inverse_temperature)):
        if given is not None:
            raise ValueError(f"{option}: factorizer {name!r} takes none, got {given}")
    if name == "learned":
        return LearnedFactorizer(channels, rank, size, init or "normal")
    return DoubleAttentionFactorizer(channels, rank)
