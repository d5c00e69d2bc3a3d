"""The drop-in module: low-rank context added to a feature map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from mfops.checks import check_positive, check_size, check_weight
from mfops.factorizers import create_factorizer
from mfops.loss_injection import inject_loss
from mfops.reference import channels_innermost
from mfops.tracing import record_module

# The lists of the blocks of collect_losses that are open, in whichever threads; losses go to the
# last. A block that ends takes its own away: blocks of two threads need not be nested.
_collecting: list[list[Tensor]] = []


def _added(x: Tensor, shared: Tensor) -> Tensor:
    """x + shared, of one image or as many as x has, laid out as x is.

    Where x has its channels innermost (tokens, channels_last) the sum is that of views in the order
    of memory: autograd adds up the gradient of one image for all in the order of dimensions, and
    would turn it over.
    """
    if channels_innermost(x):
        return (x.movedim(1, -1) + shared.movedim(1, -1)).movedim(-1, 1)
    return x + shared


@contextmanager
def collect_losses() -> Iterator[list[Tensor]]:
    """Within it, losses that would be injected are handed over instead, to be added to the loop's.

        with mfops.collect_losses() as losses:
            logits = network(images)
        loss = criterion(logits, masks) + 0.1 * sum(losses)

    The list holds the unweighted mse, a float32 scalar, of every `FactorizedContext` that is
    called without `return_loss`, in training and with a `loss_weight` above 0. The setting is
    process-wide. Under activation checkpointing losses are handed over with `use_reentrant=False`;
    with True, whose first pass has no gradients, they are injected as without the block.
    """
    losses: list[Tensor] = []
    _collecting.append(losses)
    try:
        yield losses
    finally:
        _collecting[:] = [other for other in _collecting if other is not losses]


class FactorizedContext(nn.Module):
    """Adds low-rank context to features: out = X + relu(X'), X' = Y Z.

    The reconstruction loss mse(X, X') pulls features and context together (Gurram, "Learning
    context with factorization techniques in semantic segmentation": L = CE + 0.1 mse). It
    reaches the optimizer in one of two ways:

    - `out = ctx(x)`: in training mode `loss_weight * mse` is injected in the backward pass. The
      gradients are those of `(loss + loss_weight * mse).backward()`, though `loss` itself does
      not show it; nothing else changes in a training loop. The injected loss enters as often as
      a backward pass runs, so accumulated micro-batches each add theirs. Where the loop scales
      its loss before `backward()` (torch.amp.GradScaler, division by the number of accumulated
      micro-batches), say so once with `mfops.set_loss_scaling`, and the injected loss follows.
    - `out, mse = ctx(x, return_loss=True)`: the unweighted mse is returned, nothing is injected.

    Under torch.func's transforms (grad, vmap, jvp, ..) the PyTorch reference runs in place of the
    kernels. An injected loss is in `grad`, of each sample in `vmap(grad(..))`. torch.fx traces the
    module as one node.

    Args:
        channels: C of the features.
        rank: K, the number of bases.
        size: the feature grid, (h, w) or one number for both, that learned coefficients belong
            to; on another grid they are resampled bilinearly. No other factorizer looks at it.
        factorizer: where Y and Z come from. "learned": parameters, X' is the same for every image.
            On each image: "em" (EMANet), "nmf", "vq", "cd" (Hamburger), "double_attention"
            (A2-Net), or a method made known by `mfops.register_method`; the formulas are in
            `mfops.methods` and `mfops.factorizers`. "nmf" takes relu(X) for X, in the loss too.
            No gradient passes through X' of "em", as published.
        loss_weight: the weight of the injected loss; may be changed at any time (0: none).
        steps: T, the rounds of "em", "nmf", "vq", "cd"; None: 3 for em; for the others 6 in
            training and 7 in evaluation.
        init: what learned factors start from: "normal" (None means it), standard normal, or
            "uniform", in +-1 / sqrt(C K) and +-1 / sqrt(N K). No other factorizer takes it.
        inverse_temperature: t > 0 of "vq" and "cd", which alone take it; None: 100.

    Shapes: x (B, C, H, W), or (B, C, N) with N = h w; out alike. mse: a float32 scalar. Tokens
        (B, N, C) of a transformer go in and out as `ctx(x.mT).mT`, maps (B, H, W, C) as
        `ctx(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)`, both without copies. Where N, or H, is C
        nobody can tell that they were not turned: the wrong dimension is then factorized.

    Raises:
        ValueError: an argument out of range; x of the wrong rank or number of channels.
        TypeError: x is not a floating tensor; outside autocast, not of the parameters' dtype
            ("em", "nmf", "vq" and "cd" have none: they take every dtype).
        RuntimeError: under a transform, "em" in training, which moves its bases
            (`ctx.factorizer.eval()` lets them rest), or an injected loss in forward mode or in
            a Jacobian; the backend of `mfops.use_backend` cannot run this call.
    """

    def __init__(
        self,
        channels: int,
        rank: int = 64,
        size: int | tuple[int, int] = (33, 33),
        factorizer: str = "learned",
        loss_weight: float = 0.1,
        steps: int | None = None,
        init: str | None = None,
        inverse_temperature: float | None = None,
    ) -> None:
        super().__init__()
        self.channels = check_positive("channels", channels)
        self.rank = check_positive("rank", rank)
        self.size = check_size(size)
        self.loss_weight = check_weight("loss_weight", loss_weight)
        self.factorizer = create_factorizer(
            factorizer, self.channels, self.rank, self.size, steps, init, inverse_temperature
        )

    @overload
    def forward(self, x: Tensor, return_loss: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_loss: Literal[True]) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, x: Tensor, return_loss: bool) -> Tensor | tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, return_loss: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(x, Proxy):
            return record_module(self, x, return_loss)
        inject = self.training and self.loss_weight > 0 and torch.is_grad_enabled()
        if not (return_loss or inject):
            return _added(x, F.relu(self.factorizer.product(x)))
        x_hat, mse = self.factorizer.reconstruct(x)
        if return_loss:
            return _added(x, F.relu(x_hat)), mse
        if _collecting:
            _collecting[-1].append(mse)
        # Before the sum, whose result is then a tensor that what follows may change in place.
        x = inject_loss(x, self.loss_weight * mse, handed_over=bool(_collecting))
        return _added(x, F.relu(x_hat))

    if TYPE_CHECKING:  # nn.Module's own says nothing of arguments and results
        __call__ = forward

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, rank={self.rank}, size={self.size}, loss_weight={self.loss_weight}"
        )
