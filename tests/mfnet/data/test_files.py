"""Reading files: damaged ones end in one line that names them."""

import numpy as np
import pytest
import torch
from made_up import write_image, write_mask
from PIL import Image
from torch.utils.data import DataLoader

from mfnet.data import DataError, VOCFolder
from mfnet.data.files import find_images, read_image, read_mask


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
    damage(folder)
    data.setup("fit")
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


def test_find_images(tmp_path):
    for name in ("b.jpg", "a.PNG", "sub/c.jpeg", "odd[1].png"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    assert [p.name for p in find_images(str(tmp_path))] == ["a.PNG", "b.jpg", "odd[1].png"]
    assert [p.name for p in find_images(f"{tmp_path}/*.jpg")] == ["b.jpg"]
    assert [p.name for p in find_images(f"{tmp_path}/**/*.jp*g")] == ["b.jpg", "c.jpeg"]
    assert find_images(f"{tmp_path}/odd[1].png") == [tmp_path / "odd[1].png"]
    for pattern in ("nothing", "*.gif"):
        with pytest.raises(FileNotFoundError, match="expected an image, a folder or a glob"):
            find_images(str(tmp_path / pattern))


def test_predict_batches(folder):
    images = folder / "JPEGImages"
    write_image(images / "big.jpg", size=(60, 80), value=124)
    data = VOCFolder(str(folder), resize=(33, 45), predict_images=f"{images}/*g.jpg", num_workers=0)
    data.setup("predict")
    loader = data.predict_dataloader()
    assert isinstance(loader, DataLoader)
    [(image, original, paths)] = loader
    assert image.shape == (1, 3, 33, 45)
    assert image.dtype == torch.float32
    assert abs(image).max() < 0.4  # near the mean colour
    assert original.shape == (1, 3, 60, 80)
    assert original.dtype == torch.uint8
    assert type(image) is type(original) is torch.Tensor
    assert list(paths) == [str(images / "big.jpg")]


def test_predict_names_a_bad_image(folder):
    _no_image(folder)
    data = VOCFolder(str(folder), predict_images=str(folder / "JPEGImages"), num_workers=0)
    with pytest.raises(DataError, match=r"b\.jpg: cannot read image"):
        list(data.predict_dataloader())
    with pytest.raises(ValueError, match="predict_images: expected"):
        VOCFolder(str(folder)).predict_dataloader()
