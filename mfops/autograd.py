"""The operators with their gradients, as autograd Functions.

The operators know nothing of autograd; these Functions call them forward and backward. A second
derivative (`create_graph=True`) differentiates the reference's backward. Nothing is checked here:
tensors are x (B, C, N), y and z as in `mfops.ops`, on a backend that can run the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfops import reference
from mfops.backends import Backend, under_transform
from mfops.methods import METHODS


def _operator_alone() -> bool:
    """Whether to call an operator without a Function around it.

    torch.func's transforms (grad, vmap, jvp, ..) differentiate the reference itself, and the file
    of torch.jit.trace takes operators, but no Function.
    """
    return under_transform() or torch.jit.is_tracing()


def _differentiated_again() -> bool:
    """In a backward pass: grad mode is on there only under create_graph=True."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _backward(
    ctx: Any, grad_x_hat: Tensor | None, grad_mse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y and z."""
    x, y, z = ctx.saved_tensors
    need_x, need_y, need_z = ctx.needs_input_grad[:3]
    need_x = need_x and grad_mse is not None  # X' does not depend on X
    if (grad_x_hat is None and grad_mse is None) or not (need_x or need_y or need_z):
        return None, None, None
    run = reference if _differentiated_again() else ctx.backend
    needs = (need_x, need_y, need_z)
    grads = run.reconstruct_backward(grad_x_hat, grad_mse, x, y, z, *needs, ctx.tf32)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def _expanded(x_hat: Tensor, x: Tensor) -> Tensor:
    """A view of an X' that all images share alone: autograd lets nobody change a view in place."""
    return x_hat.expand(x.shape) if x_hat.dim() == 2 else x_hat


# `forward` takes ctx itself: a separate `setup_context` costs 20 us a call in torch's binding of
# default arguments, more than the rest of the call together. torch.func would want that one, and
# rules for vmap; of plain PyTorch it knows them all.


class Reconstruct(torch.autograd.Function):
    """x, y, z -> X', mse.

    Where both factors are shared X' is expanded to x's shape, in here, so that the gradients of
    its images are added tile by tile in the backward kernel; with `expand` False it is (C, N).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, z: Tensor, backend: Backend, tf32: bool, expand: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y, z)
        ctx.backend = backend
        ctx.tf32 = tf32
        ctx.set_materialize_grads(False)
        x_hat, mse = backend.reconstruct(x, y, z, tf32)
        return _expanded(x_hat, x) if expand else x_hat, mse

    @staticmethod
    def backward(
        ctx: Any, grad_x_hat: Tensor | None, grad_mse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, grad_x_hat, grad_mse), None, None, None


def reconstruct(
    x: Tensor, y: Tensor, z: Tensor, backend: Backend, tf32: bool, expand: bool
) -> tuple[Tensor, Tensor]:
    """X' and mse; X' of shared factors is (C, N) unless `expand`."""
    if not _operator_alone():
        return Reconstruct.apply(x, y, z, backend, tf32, expand)
    x_hat, mse = backend.reconstruct(x, y, z, tf32)
    return _expanded(x_hat, x) if expand else x_hat, mse


class ReconstructionError(torch.autograd.Function):
    """x, y, z -> mse; X' is not written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, z: Tensor, backend: Backend, tf32: bool) -> Tensor:
        ctx.save_for_backward(x, y, z)
        ctx.backend = backend
        ctx.tf32 = tf32
        ctx.set_materialize_grads(False)
        return backend.mse(x, y, z, tf32)

    @staticmethod
    def backward(ctx: Any, grad_mse: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, None, grad_mse), None, None


def reconstruction_error(x: Tensor, y: Tensor, z: Tensor, backend: Backend, tf32: bool) -> Tensor:
    """mse alone."""
    if _operator_alone():
        return backend.mse(x, y, z, tf32)
    return ReconstructionError.apply(x, y, z, backend, tf32)


class FactorizeReconstruct(torch.autograd.Function):
    """x, y0, a fused method, steps -> X', mse, Y.

    X' carries the method's one-step gradient to x, if it has one; Y never carries any.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y0: Tensor, method: str, steps: int, backend: Backend, tf32: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.backend = backend
        ctx.one_step_gradient = METHODS[method].one_step_gradient
        ctx.tf32 = tf32
        ctx.set_materialize_grads(False)
        y, z, z_scale, x_hat, mse = backend.factorize_reconstruct(x, y0, method, steps, tf32)
        ctx.save_for_backward(x, y, z, z_scale)
        if ctx.one_step_gradient:
            ctx.mark_non_differentiable(y)
        else:
            ctx.mark_non_differentiable(x_hat, y)
        return x_hat, mse, y

    @staticmethod
    def backward(
        ctx: Any, grad_x_hat: Tensor | None, grad_mse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, y, z, z_scale = ctx.saved_tensors
        grad_x = None
        twice = _differentiated_again()
        run = reference if twice else ctx.backend
        if not ctx.one_step_gradient:
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


def factorize_reconstruct(
    x: Tensor, y0: Tensor, method: str, steps: int, backend: Backend, tf32: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """X', mse and Y of a fused method; not under torch.func's transforms."""
    if torch.jit.is_tracing():
        y, _, _, x_hat, mse = backend.factorize_reconstruct(x, y0, method, steps, tf32)
        return x_hat, mse, y
    return FactorizeReconstruct.apply(x, y0, method, steps, backend, tf32)
