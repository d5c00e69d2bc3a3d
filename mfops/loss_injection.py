"""A loss that enters in the backward pass, beside the loss of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfops.backends import in_forward_mode, under_transform

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
            The setting is process-wide. `torch.compile(fullgraph=True)` traces it: it cannot trace
            `GradScaler.scale`, and keeps Python's numbers as they were. There multiply by a
            tensor, or take the losses with `mfops.collect_losses`.

    Raises:
        TypeError: `scale` is neither callable nor None; in the backward pass, it returns no tensor.
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
    if not torch._C._are_functorch_transforms_active():
        return 0
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()  # it cannot trace the question
    functorch = torch._C._functorch
    levels = functorch.get_interpreter_stack()
    return sum(level.key() == getattr(functorch.TransformType, kind) for level in levels)


def _several_at_once(vmaps: int, grad_x: Tensor) -> bool:
    """Whether a vmap that the forward pass knew nothing of runs backward passes."""
    if torch.compiler.is_compiling():
        return False
    # Batched gradients of autograd itself have a vmap apart from torch.func's.
    return _count("Vmap") != vmaps or torch._C._functorch.is_legacy_batchedtensor(grad_x)


def _inject(ctx: Any, grad_x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and loss."""
    if _several_at_once(ctx.vmaps, grad_x):
        raise RuntimeError(_INJECTED_ONCE)
    (one,) = ctx.saved_tensors
    if _scale_loss is None:
        return grad_x, one
    scaled = _scale_loss(one)
    if not isinstance(scaled, Tensor):
        raise TypeError(
            "set_loss_scaling: expected the function to return a tensor, got "
            f"{type(scaled).__name__}"
        )
    return grad_x, scaled


class InjectLoss(torch.autograd.Function):
    """Passes x on; backward, `loss` gets the gradient it has as a term of the total loss.

    A loss that is handed over gets none here, but the same is kept for the backward pass: under
    activation checkpointing the second forward pass may inject what the first has handed over.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, handed_over: bool) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        ctx.vmaps = 0
        ctx.handed_over = handed_over
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if ctx.handed_over:
            return grad_x, None, None
        return *_inject(ctx, grad_x), None


class TransformedInjectLoss(torch.autograd.Function):
    """InjectLoss as torch.func's transforms take it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(torch.ones_like(inputs[1]))
        ctx.vmaps = _count("Vmap")

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, Tensor]:
        return _inject(ctx, grad_x)


def inject_loss(x: Tensor, loss: Tensor, handed_over: bool = False) -> Tensor:
    """x, whose backward pass gives `loss` the gradient of a term of the total loss.

    A loss that is handed over to the training loop gets none.

    Raises:
        RuntimeError: forward-mode differentiation, or many backward passes at once.
    """
    if not under_transform():
        return InjectLoss.apply(x, loss, handed_over)
    if handed_over:
        return x
    if in_forward_mode() or _count("Jvp"):
        raise RuntimeError(_INJECTED_ONCE)
    return TransformedInjectLoss.apply(x, loss)
