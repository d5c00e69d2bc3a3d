"""The losses that a network's modules inject are the trainer's: scale, weight and warm-up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from mfnet.task import SegmentationTask
from mfops import FactorizedContext


class Foreign(nn.Module):
    """A network of somebody else's, with our context inside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 1)
        self.context = FactorizedContext(4, rank=2, size=(3, 3), loss_weight=0.7)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.context(self.encoder(x)))

    def with_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, mse = self.context(self.encoder(x), return_loss=True)
        return self.head(y), mse


class FixedScaler:
    """What the precision plugin of 16-mixed has."""

    def scale(self, loss: Tensor) -> Tensor:
        return 8 * loss


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(2, 3, 3, 3), torch.randint(0, 2, (2, 3, 3))) for _ in range(count)]


def gradients(network: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in network.parameters()]


class Recorded(SegmentationTask):
    """Keeps the gradients that the optimizer was given."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.given = gradients(self.network)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("scaler", [None, FixedScaler()])
def test_gradients_are_those_of_the_sum_of_losses(
    accumulate: int, warmup: int, scaler: FixedScaler | None
) -> None:
    torch.manual_seed(0)
    network = Foreign()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    task = Recorded(network, ["a", "b"], reconstruction_weight=0.3, reconstruction_warmup=warmup)
    trainer = quiet_trainer(accumulate_grad_batches=accumulate)
    if scaler is not None:
        trainer.precision_plugin.scaler = scaler
        trainer.precision_plugin.pre_backward = lambda loss, module: scaler.scale(loss)
    data = batches(accumulate)
    trainer.fit(task, DataLoader(data, batch_size=None))

    explicit = Foreign()
    explicit.load_state_dict(state)
    for images, masks in data:
        logits, mse = explicit.with_loss(images)
        loss = F.cross_entropy(logits, masks) + (0.0 if warmup else 0.3) * mse
        ((8 if scaler else 1) * loss / accumulate).backward()
    for given, expected in zip(task.given, gradients(explicit), strict=True):
        torch.testing.assert_close(given, expected)
    assert network.context.loss_weight == 0.7


def fitted(network: nn.Module, accumulate: int = 1, **arguments: float) -> list[Tensor]:
    """The gradients of one step of ``accumulate`` batches."""
    task = Recorded(network, ["a", "b"], **{"reconstruction_warmup": 0, **arguments})
    trainer = quiet_trainer(accumulate_grad_batches=accumulate)
    trainer.fit(task, DataLoader(batches(accumulate), batch_size=None))
    return task.given


def seeded() -> Foreign:
    torch.manual_seed(0)
    return Foreign()


def test_a_compiled_network_injects_as_much() -> None:
    compiled = torch.compile(seeded(), backend="aot_eager", fullgraph=True)
    for given, expected in zip(fitted(compiled, 2), fitted(seeded(), 2), strict=True):
        torch.testing.assert_close(given, expected)


def test_a_weight_of_0_means_no_loss() -> None:
    without = seeded()
    without.context.loss_weight = 0.0
    expected = fitted(seeded(), reconstruction_weight=0.0)
    for given, other in zip(fitted(without, reconstruction_weight=9.0), expected, strict=True):
        torch.testing.assert_close(given, other)


def test_a_network_that_returns_its_loss_may_hold_one_that_injects() -> None:
    class Both(Foreign):
        def forward(self, x: Tensor, return_loss: bool = False) -> tuple[Tensor, Tensor]:
            return super().forward(x), x.new_zeros(())

    torch.manual_seed(0)
    for given, expected in zip(
        fitted(Both(), reconstruction_warmup=1), fitted(seeded(), reconstruction_warmup=1),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(given, expected)


def test_a_checkpointed_module_counts_once() -> None:
    class Checkpointed(Foreign):
        def forward(self, x: Tensor) -> Tensor:
            y = self.encoder(x)
            return self.head(checkpoint(self.context, y, use_reentrant=False))

    torch.manual_seed(0)
    for given, expected in zip(fitted(Checkpointed()), fitted(seeded()), strict=True):
        torch.testing.assert_close(given, expected)


def test_a_traced_network_trains() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 2, 1))
    assert len(fitted(torch.jit.trace(network, torch.randn(2, 3, 3, 3)))) == 2
