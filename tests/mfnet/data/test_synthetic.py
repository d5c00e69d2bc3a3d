"""The generated data set: whole or not there, the same for the same arguments."""

import numpy as np
import pytest
from PIL import Image

from mfnet.data import Synthetic, VOCFolder, synthetic
from mfnet.data.voc import list_folder


def _bytes(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_same_seed_same_bytes_other_seed_other_images(tmp_path):
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    for root, seed in ((one, 3), (two, 3), (other, 4)):
        assert synthetic.generate(root, train=3, val=2, size=33, seed=seed) == root
    assert _bytes(one) == _bytes(two)
    assert _bytes(one).keys() == _bytes(other).keys()
    image = "JPEGImages/train_00000.jpg"
    assert (one / image).read_bytes() != (other / image).read_bytes()


def test_images_do_not_depend_on_their_number(tmp_path):
    few = synthetic.generate(tmp_path / "few", train=1, val=1, size=33)
    many = synthetic.generate(tmp_path / "many", train=2, val=2, size=33)
    for name in ("JPEGImages/train_00000.jpg", "SegmentationClass/val_00000.png"):
        assert (few / name).read_bytes() == (many / name).read_bytes()


def test_it_is_in_voc_layout(tmp_path):
    root = synthetic.generate(tmp_path / "set", train=30, val=2, size=65)
    data = VOCFolder(str(root))
    assert data.class_names == list(synthetic.CLASSES)
    labels = [np.array(Image.open(s.mask)) for s in list_folder(root, "train")]
    assert all(mask.shape == (65, 65) for mask in labels)
    counts = np.bincount(np.concatenate(labels, axis=None), minlength=256)
    assert set(np.flatnonzero(counts)) == {*range(5), 255}
    share = counts / counts.sum()
    assert (share[1:5] > 0.02).all()
    assert share[0] > 0.4
    assert share[255] < 0.15


def test_classes_are_not_told_apart_by_mean_color(tmp_path):
    """The nearest mean color, fitted on the very images, stays far from the 0.60 of the demo."""
    root = synthetic.generate(tmp_path / "set", train=40, val=1, size=65)
    samples = list_folder(root, "train")
    pixels = np.concatenate([np.array(Image.open(s.image)).reshape(-1, 3) for s in samples])
    truth = np.concatenate([np.array(Image.open(s.mask)).ravel() for s in samples])
    pixels, truth = pixels[truth < 255].astype(float), truth[truth < 255]
    means = np.stack([pixels[truth == c].mean(0) for c in range(5)])
    guess = ((pixels[:, None] - means) ** 2).sum(-1).argmin(1)
    hits = [((guess == c) & (truth == c)).sum() for c in range(5)]
    unions = [((guess == c) | (truth == c)).sum() for c in range(5)]
    assert np.mean(np.divide(hits, unions)) < 0.4


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch, error):
    def fail_late(rng, size, draw=synthetic.draw, calls=[]):  # noqa: B006
        calls.append(size)
        if len(calls) == 3:
            raise error
        return draw(rng, size)

    monkeypatch.setattr(synthetic, "draw", fail_late)
    with pytest.raises(type(error)):
        synthetic.generate(tmp_path / "set", train=4, val=1, size=33)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="exists"):
        synthetic.generate(tmp_path, train=1, val=1, size=33)
    assert (tmp_path / "mine").read_text() == "kept"


def test_the_slower_of_two_generators_gives_way(tmp_path, monkeypatch):
    root = tmp_path / "set"

    def overtaken(rng, size, draw=synthetic.draw):
        if not root.exists():
            root.mkdir()
            (root / "theirs").write_text("")
        return draw(rng, size)

    monkeypatch.setattr(synthetic, "draw", overtaken)
    with pytest.raises(FileExistsError, match="set: exists"):
        synthetic.generate(root, train=1, val=1, size=33)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("arguments", [{"train": 0}, {"val": 0}, {"size": 32}])
def test_bad_arguments_are_named(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"expected train >= 1, val >= 1 and size >= 33, got"):
        synthetic.generate(tmp_path / "set", **arguments)


def test_module_generates_once(tmp_path, monkeypatch):
    data = Synthetic(str(tmp_path / "cache"), train=2, val=2, size=33, num_workers=0, crop_size=33)
    assert data.num_classes == len(data.palette) == 5
    assert not (tmp_path / "cache").exists()
    data.prepare_data()
    before = _bytes(data.root)
    monkeypatch.setattr(synthetic, "draw", None)
    data.prepare_data()
    assert _bytes(data.root) == before
    data.setup("fit")
    images, masks = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 33, 33)
    assert masks.shape == (2, 33, 33)
    assert Synthetic(str(tmp_path / "cache"), train=2, val=2, size=33, seed=1).root != data.root
