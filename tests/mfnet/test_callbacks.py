"""The run's record (summary.json, samples.npz) and the overlays of predictions."""

import copy
import json

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from quiet import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mfnet import create_model
from mfnet.callbacks import RunRecord
from mfnet.flops import count_flops
from mfnet.report import report

PALETTE = [(0, 0, 0), (200, 10, 30), (0, 0, 250)]
SIZE = (20, 28)


class Scenes(Dataset):
    """Six images whose left half is brighter: class 1 there, class 0 elsewhere."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        image = torch.full((3, *SIZE), 0.1 * index - 0.5)
        image[..., : SIZE[1] // 2] += 1
        return image, (image[0] > 0.5 + 0.1 * index - 0.5).long()


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 3, 1)
        )

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val/mIoU": 0.5, "val/fwIoU": 0.75})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    class_names = ("background", "disc", "square")
    palette = PALETTE

    def train_dataloader(self):
        return DataLoader(Scenes(), batch_size=3)

    def val_dataloader(self):
        return DataLoader(Scenes(), batch_size=3)


def trainer_with(record, folder, **options):
    logger = CSVLogger(folder, name="", version=0)
    return quiet_trainer(logger=logger, callbacks=[record], log_every_n_steps=1, **options)


def read_samples(folder):
    with np.load(folder / "version_0" / "samples.npz") as archive:
        return dict(archive)


def test_record_of_a_fit(tmp_path):
    module = Module()
    module.network[0].weight.requires_grad_(False)
    trainer_with(RunRecord("tiny", "plain"), tmp_path, max_epochs=2).fit(module, datamodule=Data())
    folder = tmp_path / "version_0"

    convolutions = 2 * SIZE[0] * SIZE[1] * (3 * 4 * 9 + 4 * 3)
    weights = 3 * 4 * 9 + 4 + 4 + 4 + 4 * 3 + 3
    assert json.loads((folder / "summary.json").read_text()) == {
        "model": "tiny",
        "backbone": "plain",
        "parameters": weights,
        "trainable_parameters": weights - 3 * 4 * 9,
        "gflops": pytest.approx(convolutions / 1e9),
        "input_size": list(SIZE),
        "class_names": ["background", "disc", "square"],
        "palette": [list(color) for color in PALETTE],
    }
    samples = read_samples(tmp_path)
    assert samples["epoch"] == 1
    assert len(samples) == 1 + 3 * 4
    module.eval()
    for i, source in enumerate([0, 1, 3, 4]):
        image, mask = Scenes()[source]
        assert samples[f"image_{i}"].shape == (*SIZE, 3)
        assert samples[f"image_{i}"].dtype == np.uint8
        red = round(255 * (0.229 * float(image[0, 0, 0]) + 0.485))
        assert samples[f"image_{i}"][0, 0, 0] == red
        np.testing.assert_array_equal(samples[f"truth_{i}"], mask)
        expected = module(image[None])[0].argmax(0)
        np.testing.assert_array_equal(samples[f"prediction_{i}"], expected)
    report([folder], tmp_path / "report")
    assert (tmp_path / "report" / "predictions.png").is_file()


class Averaging(L.Callback):
    """Validates other weights than it trains, as Lightning's WeightAveraging does."""

    def __init__(self):
        self.averaged = nn.Conv2d(3, 3, 1)

    def on_validation_epoch_start(self, trainer, pl_module):
        pl_module.network, self.averaged = self.averaged, pl_module.network

    on_validation_epoch_end = on_validation_epoch_start


def test_samples_are_of_the_weights_that_were_scored(tmp_path):
    averaging = Averaging()
    trainer = trainer_with(RunRecord(), tmp_path)
    trainer.callbacks.insert(0, averaging)
    trainer.fit(Module(), datamodule=Data())
    samples = read_samples(tmp_path)
    for i, source in enumerate([0, 1, 3, 4]):
        expected = averaging.averaged(Scenes()[source][0]).argmax(0)
        np.testing.assert_array_equal(samples[f"prediction_{i}"], expected)


def test_recording_changes_nothing_in_the_training(tmp_path):
    states = []
    for callbacks in ([RunRecord()], []):
        L.seed_everything(3)
        module = Module()
        trainer = trainer_with(RunRecord(), tmp_path / str(len(callbacks)), max_epochs=2)
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, RunRecord)]
        trainer.callbacks += callbacks
        trainer.fit(module, datamodule=Data())
        states.append((module.state_dict(), torch.get_rng_state()))
    (recorded, rng), (plain, plain_rng) = states
    assert all(torch.equal(recorded[name], plain[name]) for name in plain)
    assert torch.equal(rng, plain_rng)


@pytest.mark.parametrize("how", ["sanity check", "validate", "fast_dev_run", "another rank"])
def test_nothing_is_recorded_outside_a_fit(tmp_path, monkeypatch, how):
    options = {"fast_dev_run": True} if how == "fast_dev_run" else {"max_epochs": 1}
    if how == "sanity check":
        options |= {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 2}
    trainer = trainer_with(RunRecord(), tmp_path, **options)
    if how == "another rank":
        monkeypatch.setattr(type(trainer), "is_global_zero", False)
    if how == "validate":
        trainer.validate(Module(), datamodule=Data(), verbose=False)
    else:
        trainer.fit(Module(), datamodule=Data())
    assert not list(tmp_path.rglob("summary.json"))
    assert not list(tmp_path.rglob("samples.npz"))


@pytest.mark.parametrize("reads", [lambda x: x.mean().item(), lambda x: float(x.numpy().mean())])
def test_a_network_whose_flops_cannot_be_counted_still_trains(reads, tmp_path):
    class Foreign(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * reads(x)

    module = Module()
    module.network = Foreign(3, 3, 1)
    with pytest.warns(UserWarning, match="FLOPs of Foreign cannot be counted"):
        trainer_with(RunRecord(), tmp_path, max_epochs=1).fit(module, datamodule=Data())
    summary = json.loads((tmp_path / "version_0" / "summary.json").read_text())
    assert summary["gflops"] is None
    assert summary["model"] == "Foreign"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_flops_of_a_network_in_another_precision(dtype):
    network = create_model("mfnet", num_classes=3, backbone="resnet18")
    expected = count_flops(network, (65, 65))
    assert count_flops(network.to(dtype), (65, 65)) == expected > 0


def test_counting_flops_disturbs_nothing():
    network = create_model("emanet", num_classes=3, backbone="resnet18").train()
    network.backbone.eval()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    rng = torch.get_rng_state()
    assert count_flops(network, (65, 97)) > 1e9
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(not p.is_meta for p in network.parameters())
