"""Reading files: damaged ones end in one line that names them."""

import numpy as np
import pytest
import torch
from made_up import write_image, write_mask
from PIL import Image

from mfnet.data import DataError, VOCFolder
from mfnet.data.files import read_image, read_mask


def _truncate(path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _break_image(folder):
    _truncate(folder / "JPEGImages" / "b.jpg")


def _break_mask(folder):
    path = folder / "SegmentationClass" / "b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 3, (40, 50), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:150])


def _no_image(folder):
    (folder / "JPEGImages" / "b.jpg").write_text("hello")


def _other_size(folder):
    write_mask(folder / "SegmentationClass" / "b.png", np.zeros((50, 40)))


def _wrong_label(folder):
    mask = np.zeros((40, 50))
    mask[3, 4], mask[5, 6], mask[7, 8] = 3, 254, 255
    write_mask(folder / "SegmentationClass" / "b.png", mask)


def _colour_mask(folder):
    write_image(folder / "SegmentationClass" / "b.png")


def _gone(folder):
    (folder / "JPEGImages" / "b.jpg").unlink()


def _loading_error(folder, damage, num_workers):
    data = VOCFolder(str(folder), crop_size=33, num_workers=num_workers)
    data.setup("fit")
    damage(folder)
    with pytest.raises(DataError) as caught:
        list(data.train_dataloader())
    return str(caught.value)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (_break_image, "JPEGImages/b.jpg: cannot read image: "),
        (_break_mask, "SegmentationClass/b.png: cannot read mask: "),
        (_no_image, "JPEGImages/b.jpg: cannot read image: cannot identify image file"),
        (_other_size, "b.png: expected the size of its image, 40 x 50, got 50 x 40"),
        (_wrong_label, "b.png: expected labels 0 to 2 or 255, got [3, 254]"),
        (_colour_mask, "b.png: expected a palette (P) or grey (L) mask of class indices, got mode"),
        (_gone, "JPEGImages/b.jpg: cannot read image: "),
    ],
)
def test_bad_file_is_named_in_one_line(folder, damage, line):
    message = _loading_error(folder, damage, num_workers=0)
    assert message.startswith(str(folder))
    assert line in message
    assert "\n" not in message


def test_the_line_is_the_same_from_a_worker(folder):
    expected = _loading_error(folder, _wrong_label, num_workers=0)
    assert _loading_error(folder, _wrong_label, num_workers=1) == expected


def test_ignored_label_is_kept(folder):
    data = VOCFolder(str(folder))
    data.setup()
    _, mask = data.val_set[0]
    assert mask.dtype == torch.int64
    assert (mask[0] == 255).all()
    assert (mask[1:] == 0).all()


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P"])
def test_images_of_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / f"image.{'jpg' if mode == 'CMYK' else 'png'}"
    Image.new("RGB", (50, 40), (153, 153, 153)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 40, 50)
    assert image.dtype == torch.uint8
    assert (image.int() - 153).abs().max() <= 3


def test_mask_of_palette_png_is_class_indices(tmp_path):
    expected = np.arange(256).reshape(16, 16)
    write_mask(tmp_path / "m.png", expected)
    assert np.array_equal(read_mask(tmp_path / "m.png").numpy(), expected)


def test_exif_orientation_only_where_asked(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (50, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 40, 50)
    assert read_image(tmp_path / "turned.jpg", upright=True).shape == (3, 50, 40)
