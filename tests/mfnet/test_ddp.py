"""Two processes (gloo) train as one with the double batch, and count no image twice."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import without_dropout
from command_line import RESNET
from timm.layers import BatchNormAct2d
from torch import nn

from mfnet.scores import read_confusion
from mfnet.sync_batchnorm import SyncBatchNormPlugin


class OnCPU(nn.Module):
    """As much of a LightningModule as the plugin asks for."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        device = SimpleNamespace(root_device=torch.device("cpu"))
        self.trainer = SimpleNamespace(strategy=device)


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_cpu_layer_is_batchnorm(kind: type[nn.BatchNorm2d], group_of_one: None) -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, gradient = kind(3).double(), {}
    converted = SyncBatchNormPlugin().apply(OnCPU(copy.deepcopy(expected))).norm
    assert type(converted) is not kind
    for norm in (expected, converted):
        leaf = x.clone().requires_grad_()
        norm(leaf).backward(grad)
        gradient[norm] = leaf.grad
    torch.testing.assert_close(gradient[converted], gradient[expected])
    torch.testing.assert_close(converted.state_dict(), expected.state_dict())
    torch.testing.assert_close(converted(x), expected(x))
    torch.testing.assert_close(converted.eval()(x), expected.eval()(x))


# Factors and bases, whose means go over the ranks, with a loss; a loss that is given the masks.
NETWORKS = [("mfnet", "factorizer=em"), ("emanet", "context=encoding")]


def arguments(folder: Path, name: str, option: str, processes: int) -> list[str]:
    """Two steps of four images."""
    return [
        "--seed_everything=1", "--trainer.accelerator=cpu", f"--trainer.devices={processes}",
        f"--trainer.strategy={'ddp' if processes > 1 else 'auto'}", "--trainer.max_steps=2",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder / f'{name}-{processes}'}",
        f"--model.network.name={name}", f"--model.network.{option}", RESNET,
        "--model.reconstruction_warmup=0", "--data=mfnet.data.Synthetic",
        f"--data.cache_dir={folder / 'data'}", "--data.train=8", "--data.val=3", "--data.size=65",
        "--data.crop_size=65", f"--data.batch_size={4 // processes}", "--data.num_workers=0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each network a run of one process and one of two, which train one after the other."""
    folder = tmp_path_factory.mktemp("runs")
    for network in NETWORKS:
        without_dropout.train(arguments(folder, *network, 1))
    both = json.dumps([arguments(folder, *network, 2) for network in NETWORKS])
    command = [sys.executable, without_dropout.__file__, both]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def result(run: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights and the validation scores."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    scores = json.loads((run / "scores.json").read_text())
    class_names = json.loads((run / "summary.json").read_text())["class_names"]
    confusion = read_confusion(run / "confusion.csv", class_names)
    scores["pixels of classes"] = confusion.sum(1).tolist()
    return checkpoint["state_dict"], scores


@pytest.mark.parametrize("name", [name for name, _ in NETWORKS])
def test_two_processes_equal_one_with_the_double_batch(runs: Path, name: str) -> None:
    one, scores_of_one = result(runs / f"{name}-1")
    two, scores_of_two = result(runs / f"{name}-2")
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-5, msg=key)
    # 3 validation images on 2 ranks: one counted twice would show in every score.
    assert scores_of_two.pop("pixels of classes") == scores_of_one.pop("pixels of classes")
    assert scores_of_two == pytest.approx(scores_of_one, abs=1e-4)
