"""What ``mfnet predict`` leaves behind."""

from pathlib import Path
from typing import ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from quiet import quiet_trainer
from torch.utils.data import DataLoader, Dataset

from mfnet.data.files import read_mask, read_palette
from mfnet.data.prediction import collate_one
from mfnet.inference import Prediction
from mfnet.prediction_writer import PredictionWriter, output_files

PALETTE = [(30, 30, 200), (200, 30, 30)]


class Pictures(Dataset):
    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        original = torch.from_numpy(np.array(Image.open(self.paths[index]))).permute(2, 0, 1)
        return original, original, str(self.paths[index])


class PredictData(L.LightningDataModule):
    palette = PALETTE
    class_names: ClassVar = ["left", "right"]

    def __init__(self, paths):
        super().__init__()
        self.paths = paths

    def predict_dataloader(self):
        return DataLoader(Pictures(self.paths), collate_fn=collate_one)


class Constant(L.LightningModule):
    """Predicts class 1 in the left half of every image."""

    keep_probabilities = False

    def predict_step(self, batch, batch_idx):
        labels = torch.zeros(batch[1].shape[-2:], dtype=torch.uint8)
        labels[:, : labels.shape[-1] // 2] = 1
        kept = torch.stack((1 - labels, labels)).half() if self.keep_probabilities else None
        return Prediction(labels, kept)


def predict(paths, output, **arguments):
    trainer = quiet_trainer(callbacks=[PredictionWriter(output, **arguments)])
    trainer.predict(Constant(), datamodule=PredictData(paths), return_predictions=False)


def test_overlays_at_the_images_own_size(tmp_path):
    paths = [tmp_path / "in" / name for name in ("a.png", "deep/b.png", "deep/a.bmp")]
    for path, size in zip(paths, [(40, 20), (16, 30), (24, 24)], strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (100, 100, 100)).save(path)
    output = tmp_path / "new" / "out"
    predict(paths, output)
    written = sorted(str(path.relative_to(output)) for path in output.rglob("*.*"))
    assert written == ["a.png", "deep/a.png", "deep/b.png"]
    picture = np.array(Image.open(output / "a.png"))
    assert picture.shape == (20, 40, 3)
    assert (picture[:, :20] == picture[0, 0]).all()
    assert (picture[:, 20:] == picture[0, 39]).all()
    assert picture[0, 0, 0] > picture[0, 39, 0]
    assert Image.open(output / "deep" / "b.png").size == (16, 30)


def test_overlays_that_would_collide_are_refused_before_predicting(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "a.bmp"]
    for path in paths:
        Image.new("RGB", (34, 34)).save(path)
    with pytest.raises(ValueError, match=r"bmp and .*a\.png: both predictions would be .*a\.png"):
        predict(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_of_a_folder_above_stay_inside_the_output(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    files = output_files(["../a/x.jpg", "b/y.jpg"], Path("out"), ".png")
    assert sorted(map(str, files.values())) == ["out/a/x.png", "out/sub/b/y.png"]


def test_an_overlay_never_replaces_an_image(tmp_path):
    paths = [tmp_path / "a.png"]
    with pytest.raises(ValueError, match=r"a\.png: the prediction of .* would replace an image"):
        output_files(paths, tmp_path, ".png")
    assert output_files(paths, tmp_path / "out", ".png") == {paths[0]: tmp_path / "out" / "a.png"}
    with pytest.raises(ValueError, match="expected at least one image"):
        output_files([], tmp_path, ".png")


def test_masks_and_probabilities(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (40, 20)).save(path)
    predict([path], tmp_path / "all", kinds=["probabilities", "mask", "overlay", "mask"])
    written = sorted(str(p.relative_to(tmp_path / "all")) for p in tmp_path.rglob("all/*/*"))
    assert written == ["mask/a.png", "overlay/a.png", "probabilities/a.npz"]
    mask = read_mask(tmp_path / "all" / "mask" / "a.png")
    assert mask.mode == "P"
    assert (mask.pixels[:, :20] == 1).all()
    assert (mask.pixels[:, 20:] == 0).all()
    assert read_palette(tmp_path / "all" / "mask" / "a.png")[: len(PALETTE)] == PALETTE
    with np.load(tmp_path / "all" / "probabilities" / "a.npz") as file:
        assert file["probabilities"].dtype == np.float16
        assert np.array_equal(file["probabilities"].argmax(0), mask.pixels)
        assert file["class_names"].tolist() == ["left", "right"]
    predict([path], tmp_path / "one", kinds=["mask"])
    assert (tmp_path / "one" / "a.png").is_file()
    with pytest.raises(ValueError, match="kinds: expected some of overlay, mask, probab"):
        PredictionWriter(tmp_path, kinds=["masks"])
