"""Lone images: which are found, and what becomes of those that cannot be read."""

from pathlib import Path

import pytest
import torch
from made_up import write_image
from torch.utils.data import DataLoader

from mfnet.data import VOCFolder
from mfnet.data.prediction import Skipped, find_images


def test_find_images(tmp_path):
    for name in ("b.jpg", "a.PNG", "sub/c.jpeg", "odd[1].png", "._b.jpg", ".hidden.png", "d.tga"):
        write_image(tmp_path / name) if name != "._b.jpg" else (tmp_path / name).write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("")
    everything = ["a.PNG", "b.jpg", "d.tga", "odd[1].png"]
    assert [p.name for p in find_images(str(tmp_path))] == everything
    assert [p.name for p in find_images(f"{tmp_path}/*.*")] == everything
    assert [p.name for p in find_images(f"{tmp_path}/*.jpg")] == ["b.jpg"]
    assert [p.name for p in find_images(f"{tmp_path}/**/*.jp*g")] == ["b.jpg", "c.jpeg"]
    assert find_images(f"{tmp_path}/odd[1].png") == [tmp_path / "odd[1].png"]
    for pattern in ("nothing", "*.gif"):
        with pytest.raises(FileNotFoundError, match="expected an image, a folder or a glob"):
            find_images(str(tmp_path / pattern))


def test_several_inputs_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.jpg", "[1]/b.jpg"):
        write_image(tmp_path / name)
    given = ["~/a.jpg", f"{tmp_path}/[1]", f"{tmp_path}/*.jpg"]
    assert find_images(given) == [tmp_path / "a.jpg", tmp_path / "[1]" / "b.jpg"]


def test_predict_batches(folder):
    images = folder / "JPEGImages"
    write_image(images / "big.jpg", size=(60, 80), value=124)
    data = VOCFolder(str(folder), resize=(33, 45), predict_images=f"{images}/*g.jpg", num_workers=0)
    data.setup("predict")
    loader = data.predict_dataloader()
    assert isinstance(loader, DataLoader)
    [(image, original, paths)] = loader
    assert image.shape == (1, 3, 33, 45)
    assert image.dtype == torch.uint8
    assert abs(image.float() - 124).max() < 9
    assert original.shape == (1, 3, 60, 80)
    assert original.dtype == torch.uint8
    assert type(image) is type(original) is torch.Tensor
    assert list(paths) == [str(images / "big.jpg")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_skipped(folder, workers):
    bad = folder / "JPEGImages" / "b.jpg"
    bad.write_bytes(b"no image")
    images = str(folder / "JPEGImages")
    data = VOCFolder(str(folder), predict_images=images, num_workers=workers)
    batches = list(data.predict_dataloader())
    (skipped,) = [batch for batch in batches if isinstance(batch, Skipped)]
    assert skipped.path == str(bad)
    assert skipped.reason.startswith("cannot read image: ")
    assert len(batches) == len(list(Path(images).iterdir()))


def test_no_image_is_an_error(folder):
    with pytest.raises(ValueError, match="predict_images: expected"):
        VOCFolder(str(folder)).predict_dataloader()


def test_one_image_by_two_paths(tmp_path, monkeypatch):
    image = tmp_path / "voc" / "a.png"
    image.parent.mkdir()
    image.touch()
    monkeypatch.chdir(tmp_path)
    assert len(find_images(["voc/a.png", "voc/../voc/a.png", str(image)])) == 1
