"""`paper_voc` takes the steps of the code of MFNet's paper: rates, groups, loss, decay."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mfnet.cli import MFNetCLI
from mfnet.task import SegmentationTask

BATCH, STEPS = 4, 2


def trainer(precision: Any = "64-true", max_steps: int = STEPS) -> L.Trainer:
    return quiet_trainer(max_epochs=None, precision=precision, max_steps=max_steps)


def paper_task(name: str, *flags: str) -> SegmentationTask:
    """The task of `paper_voc`, on a small ResNet."""
    network = [f"--model.network.name={name}", "--model.network.backbone=test_resnet"]
    arguments = ["--config=paper_voc", *network, "--model.network.backbone_weights=null", *flags]
    return MFNetCLI([*arguments, "--trainer.logger=false"], run=False).model


def published_group(network: str, name: str, parameter: Tensor) -> tuple[float, float]:
    """Learning rate and weight decay of the published code; ours for what it leaves out."""
    if network == "emanet":
        return (0.007, 5e-4) if parameter.ndim == 4 else (0.07, 0.0)
    if name.startswith("backbone.") or re.search(r"factorizer\.[yz]$", name):
        return 0.007, 5e-4
    return 0.07, 5e-4


def published_steps(task: SegmentationTask, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """SGD with momentum on (CE + 0.1 MSE) / n, written out in NumPy."""
    network = deepcopy(task.network).double().train()
    trained = {key: p for key, p in network.named_parameters() if p.requires_grad}
    momentum = {key: np.zeros(p.shape) for key, p in trained.items()}
    for step, (images, masks) in enumerate(batches):
        logits, mse = network(images, return_loss=True)
        loss = (F.cross_entropy(logits, masks, ignore_index=255) + 0.1 * mse) / len(images)
        grads = torch.autograd.grad(loss, list(trained.values()))
        for (key, p), grad in zip(trained.items(), grads, strict=True):
            rate, decay = published_group(task.network_config["init_args"]["name"], key, p)
            rate *= (1 - step / len(batches)) ** 0.9
            w = p.detach().numpy()
            momentum[key] = 0.9 * momentum[key] + grad.numpy() + decay * w
            w -= rate * momentum[key]
    return network


@pytest.mark.parametrize("name", ["mfnet", "deeplabv3plus", "emanet"])
def test_steps_are_the_published_ones(name: str) -> None:
    torch.manual_seed(0)
    task = paper_task(name, "--model.reconstruction_warmup=0")
    for module in task.network.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    images = torch.randn(STEPS * BATCH, 3, 33, 33, dtype=torch.float64)
    masks = torch.randint(21, (STEPS * BATCH, 33, 33))
    masks[:, :9] = 255
    data = DataLoader(TensorDataset(images, masks), BATCH)
    expected = published_steps(task, list(data)).state_dict()
    start = {key: p.clone() for key, p in task.network.state_dict().items()}

    trainer().fit(task, data)

    for key, p in task.network.state_dict().items():
        torch.testing.assert_close(p, expected[key], rtol=0, atol=1e-9, msg=key)
    moved = [(p - start[key]).abs().max().item() for key, p in task.network.named_parameters()]
    assert sorted(moved)[len(moved) // 4] > 1e-7  # far more than the tolerance


@pytest.mark.parametrize(("name", "own"), [("mfnet", "backbone, factors, head"), ("emanet", "w")])
def test_a_run_does_not_go_on_with_other_groups(name: str, own: str, tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.randn(2, 3, 33, 33), torch.zeros(2, 33, 33).long()), 2)
    before = trainer("32-true", 1)
    before.fit(paper_task(name, "--model.parameter_groups=two_rates"), data)
    before.save_checkpoint(tmp_path / "before.ckpt")
    message = f"has the groups backbone, head; with parameter_groups 'published' they are {own}"
    with pytest.raises(ValueError, match=message):
        trainer("32-true", 1).fit(paper_task(name), data, ckpt_path=tmp_path / "before.ckpt")
    trainer("32-true", 1).validate(paper_task(name), data, ckpt_path=tmp_path / "before.ckpt")
    task = paper_task(name)
    SegmentationTask.load_from_checkpoint(
        tmp_path / "before.ckpt",
        network=task.network,
        class_names=task.class_names,
        parameter_groups="published",
        weights_only=False,
    )
