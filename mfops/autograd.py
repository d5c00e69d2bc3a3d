"""Gradients: autograd Functions around the operators, and one that injects a loss.

The operators know nothing of autograd; these Functions call them forward and backward. A second
derivative (`create_graph=True`) differentiates the reference's backward. Under torch.func's
transforms (grad, vmap, jvp, ..) there is no Function: the reference itself is transformed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfops import reference
from mfops.dispatch import BACKENDS, under_transform


def _backward(
    ctx: Any, grad_x_hat: Tensor | None, grad_mse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y and z."""
    x, y, z = ctx.saved_tensors
    need_x, need_y, need_z = ctx.needs_input_grad[:3]
    need_x = need_x and grad_mse is not None  # X' does not depend on X
    if (grad_x_hat is None and grad_mse is None) or not (need_x or need_y or need_z):
        return None, None, None
    # Grad mode is on here only under create_graph=True.
    twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    run = reference.reconstruct_backward if twice else ctx.backend.reconstruct_backward
    grads = run(grad_x_hat, grad_mse, x, y, z, need_x, need_y, need_z, ctx.tf32)
    needs = (need_x, need_y, need_z)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


# `forward` takes ctx itself: a separate `setup_context` costs 20 us a call in torch's binding of
# default arguments, more than the rest of the call together. torch.func would want that one, and
# rules for vmap; of plain PyTorch it knows them all.


class Reconstruct(torch.autograd.Function):
    """x (B, C, N), y, z, backend name, tf32 -> X', mse.

    Where both factors are shared X' is expanded to x's shape, in here, so that the gradients of
    its images are added tile by tile in the backward kernel; with `expand` False it is (C, N).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, z: Tensor, backend: str, tf32: bool, expand: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y, z)
        ctx.backend = BACKENDS[backend]
        ctx.tf32 = tf32
        ctx.set_materialize_grads(False)
        x_hat, mse = ctx.backend.reconstruct(x, y, z, tf32)
        return x_hat.expand(x.shape) if expand else x_hat, mse

    @staticmethod
    def backward(
        ctx: Any, grad_x_hat: Tensor | None, grad_mse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, grad_x_hat, grad_mse), None, None, None


def reconstruct(
    x: Tensor, y: Tensor, z: Tensor, backend: str, tf32: bool, expand: bool
) -> tuple[Tensor, Tensor]:
    """X', mse of x (B, C, N), y, z; X' of shared factors is (C, N) unless `expand`."""
    if under_transform():
        run: Callable[..., tuple[Tensor, Tensor]] = reference.reconstruct
    elif torch.jit.is_tracing():  # its file takes operators, but no autograd Function
        run = BACKENDS[backend].reconstruct
    else:
        return Reconstruct.apply(x, y, z, backend, tf32, expand)
    x_hat, mse = run(x, y, z, tf32)
    return x_hat.expand(x.shape) if expand else x_hat, mse


class ReconstructionError(torch.autograd.Function):
    """x (B, C, N), y, z, backend name, tf32 -> mse; X' is not written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, z: Tensor, backend: str, tf32: bool) -> Tensor:
        ctx.save_for_backward(x, y, z)
        ctx.backend = BACKENDS[backend]
        ctx.tf32 = tf32
        ctx.set_materialize_grads(False)
        return ctx.backend.mse(x, y, z, tf32)

    @staticmethod
    def backward(ctx: Any, grad_mse: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, None, grad_mse), None, None


def reconstruction_error(x: Tensor, y: Tensor, z: Tensor, backend: str, tf32: bool) -> Tensor:
    """mse of x (B, C, N), y, z."""
    if under_transform():
        return reference.mse(x, y, z, tf32)
    if torch.jit.is_tracing():
        return BACKENDS[backend].mse(x, y, z, tf32)
    return ReconstructionError.apply(x, y, z, backend, tf32)


class FactorizeReconstruct(torch.autograd.Function):
    """x (B, C, N), y0, method, steps, backend name, tf32 -> X', mse, Y.

    X' of nmf carries the one-step gradient to x, that of em none; Y never does.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y0: Tensor, method: str, steps: int, backend: str, tf32: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.backend = BACKENDS[backend]
        ctx.method = method
        ctx.tf32 = tf32
        ctx.set_materialize_grads(False)
        y, z, z_scale, x_hat, mse = ctx.backend.factorize_reconstruct(x, y0, method, steps, tf32)
        ctx.save_for_backward(x, y, z, z_scale)
        if method == "em":
            ctx.mark_non_differentiable(x_hat, y)
        else:
            ctx.mark_non_differentiable(y)
        return x_hat, mse, y

    @staticmethod
    def backward(
        ctx: Any, grad_x_hat: Tensor | None, grad_mse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, y, z, z_scale = ctx.saved_tensors
        grad_x = None
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run = reference if twice else ctx.backend
        if ctx.method == "em":
            if grad_mse is not None:
                factors = y.to(x.dtype), z
                grad_x = run.reconstruct_backward(
                    None, grad_mse, x, *factors, True, False, False, ctx.tf32
                )[0]
        elif grad_x_hat is not None or grad_mse is not None:
            if twice:
                z = z_scale * (y.mT @ x.to(y.dtype))  # not only its value: it depends on x
            grad_x = run.nmf_backward(grad_x_hat, grad_mse, x, y, z, z_scale, ctx.tf32)
        return grad_x, None, None, None, None, None


_scale_loss: Callable[[Tensor], Tensor] | None = None


def set_loss_scaling(scale: Callable[[Tensor], Tensor] | None) -> None:
    """Tells injected losses what the training loop does to its own loss before `backward()`.

    An injected loss does not pass through the loop's own loss, so a factor put there (by
    `GradScaler.scale`, by a division for gradient accumulation) has to be told once:

        scaler = torch.amp.GradScaler()
        mfops.set_loss_scaling(lambda loss: scaler.scale(loss / accumulation_steps))

    Args:
        scale: a linear function of a scalar tensor. It is called in every backward pass, so it
            follows a scale that changes from step to step. None: losses enter as they are.
            The setting is process-wide.

    Raises:
        TypeError: `scale` is neither callable nor None.
    """
    global _scale_loss
    if scale is not None and not callable(scale):
        raise TypeError(f"scale: expected a callable or None, got {type(scale).__name__}")
    _scale_loss = scale


_INJECTED_ONCE = (
    "loss_weight: an injected loss enters one backward pass, there is none in forward mode and "
    "there are many in a Jacobian (jacrev, jacfwd, jvp, is_grads_batched): take it with "
    "return_loss=True, set loss_weight = 0 or call eval()"
)


def _count(kind: str) -> int:
    """How many of torch.func's transforms that run this call are of a kind."""
    if not under_transform():
        return 0
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()  # it cannot trace the question
    functorch = torch._C._functorch
    levels = functorch.get_interpreter_stack()
    return sum(level.key() == getattr(functorch.TransformType, kind) for level in levels)


def _several_at_once(vmaps: int, grad_out: Tensor) -> bool:
    """Whether a vmap that the forward pass knew nothing of runs backward passes."""
    if torch.compiler.is_compiling():
        return False
    # Batched gradients of autograd itself have a vmap apart from torch.func's.
    return _count("Vmap") != vmaps or torch._C._functorch.is_legacy_batchedtensor(grad_out)


def _inject(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of out and loss."""
    if _several_at_once(ctx.vmaps, grad_out):
        raise RuntimeError(_INJECTED_ONCE)
    (one,) = ctx.saved_tensors
    return grad_out, one if _scale_loss is None else _scale_loss(one)


class InjectLoss(torch.autograd.Function):
    """Passes `out` on; backward, `loss` gets the gradient it has as a term of the total loss."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        ctx.vmaps = 0
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        return _inject(ctx, grad_out)


class TransformedInjectLoss(torch.autograd.Function):
    """InjectLoss as torch.func's transforms take it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, loss: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(torch.ones_like(inputs[1]))
        ctx.vmaps = _count("Vmap")

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        return _inject(ctx, grad_out)


def inject_loss(out: Tensor, loss: Tensor) -> Tensor:
    """`out`, whose backward pass gives `loss` the gradient of a term of the total loss.

    Raises:
        RuntimeError: forward-mode differentiation, or many backward passes at once.
    """
    if not under_transform():
        return InjectLoss.apply(out, loss)
    if _count("Jvp"):
        raise RuntimeError(_INJECTED_ONCE)
    return TransformedInjectLoss.apply(out, loss)
