"""Reading files: damaged ones end in one line that names them."""

import numpy as np
import pytest
import torch
from made_up import first_sample, write_image, write_mask
from PIL import Image, ImageOps

from mfnet.data import DataError, VOCFolder, denormalize
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


def _color_mask(folder):
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
        (_color_mask, "b.png: expected a palette (P) or gray (L) mask of class indices, got mode"),
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
    _, mask = first_sample(folder)
    assert mask.dtype == torch.int64
    assert (mask[0] == 255).all()
    assert (mask[1:] == 0).all()


@pytest.mark.parametrize("mode", ["L", "LA", "CMYK", "RGBA", "P"])
def test_images_of_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / f"image.{'jpg' if mode == 'CMYK' else 'png'}"
    Image.new("RGB", (50, 40), (153, 153, 153)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 40, 50)
    assert image.dtype == torch.uint8
    assert (image.int() - 153).abs().max() <= 3


RAMP = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32


@pytest.mark.parametrize("name", ["i.png", "i.tif", "big_endian.tif", "i.jp2", "i.pgm"])
def test_16_bit_images_are_scaled(tmp_path, name):
    gray = Image.fromarray(RAMP.astype(">u2") if "big" in name else RAMP)
    options = {"irreversible": False} if name.endswith("jp2") else {}
    gray.save(tmp_path / name, **options)
    image = read_image(tmp_path / name)
    assert image.dtype == torch.uint8
    expected = torch.from_numpy((RAMP / 257).round()).byte()
    assert torch.equal(image, expected.expand(3, 40, 50))


def test_16_bit_images_of_fewer_bits_are_warned_of(tmp_path):
    Image.fromarray(RAMP // 16).save(tmp_path / "i.png")
    with pytest.warns(UserWarning, match="16-bit images whose values end below 4096 are read as"):
        assert read_image(tmp_path / "i.png").max() <= 16


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (np.float32, "i.tif: expected 8 or 16 bits a channel, got mode F, values 0 to 63968"),
        (np.int32, "i.tif: expected 8 or 16 bits a channel, got mode I, values 0 to 63968"),
    ],
)
def test_images_without_a_known_range_are_refused(tmp_path, dtype, message):
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "i.tif")
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / "i.tif")
    assert message in str(caught.value)


def test_bilevel_images_become_rgb(tmp_path):
    pixels = RAMP > 999
    Image.fromarray(pixels).save(tmp_path / "i.png")
    expected = torch.from_numpy(pixels).byte() * 255
    assert torch.equal(read_image(tmp_path / "i.png"), expected.expand(3, 40, 50))


def _with_transparency(path, colors):
    """An image whose left half is transparent."""
    image = Image.new("RGBA", (50, 40), (*colors[0], 0))
    image.paste((*colors[1], 255), (25, 0, 50, 40))
    if path.stem == "P":
        image = image.convert("RGB").quantize(2)
        image.info["transparency"] = bytes([0, 255])
    image.save(path)
    return path


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparency_is_left_out(tmp_path, mode, recwarn):
    image = read_image(_with_transparency(tmp_path / f"{mode}.png", [(10, 20, 30), (90, 80, 70)]))
    assert image[:, 0, 0].tolist() == [10, 20, 30]
    assert image[:, 0, 49].tolist() == [90, 80, 70]
    assert not recwarn.list


def test_a_picture_in_the_transparency_alone_is_refused(tmp_path):
    path = _with_transparency(tmp_path / "RGBA.png", [(0, 0, 0), (0, 0, 0)])
    with pytest.raises(DataError, match=r"RGBA\.png: expected an image, got one color throughout"):
        read_image(path)


@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize("name", ["pages.tif", "pages.gif", "pages.png"])
def test_several_pictures_in_a_file_are_refused(tmp_path, name, read):
    pages = [Image.new("L", (50, 40), value) for value in (0, 1, 2)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=r"pages\.\w+: expected one picture, got 3"):
        read(tmp_path / name)


def test_overviews_of_a_tiff_are_passed_over(tmp_path):
    overview = Image.new("L", (25, 20))
    overview.encoderinfo = {"tiffinfo": {254: 1}}
    picture = Image.new("L", (50, 40), 7)
    picture.save(tmp_path / "i.tif", save_all=True, append_images=[overview])
    assert (read_image(tmp_path / "i.tif") == 7).all()
    assert (read_mask(tmp_path / "i.tif").pixels == 7).all()


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("upright_mask", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_where_the_mask_agrees(folder, orientation, upright_mask):
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    path = folder / "JPEGImages" / "x.jpg"
    stored.save(path, format="PNG", exif=_exif(orientation))
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file)
    mask_size = (upright if upright_mask else stored).size
    write_mask(folder / "SegmentationClass" / "x.png", np.zeros(mask_size[::-1]))
    image, mask = first_sample(folder)
    expected = stored if orientation > 4 and not upright_mask else upright
    assert torch.equal(denormalize(image), torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert image.shape[1:] == mask.shape


def test_exif_orientation_of_a_mask_counts(folder):
    write_image(folder / "JPEGImages" / "x.jpg", (50, 40))
    mask = Image.new("L", (50, 40))
    mask.putpixel((0, 0), 1)
    mask.save(folder / "SegmentationClass" / "x.png", exif=_exif(6))
    _, labels = first_sample(folder)
    assert labels.nonzero().tolist() == [[0, 39]]


def test_sizes_that_differ_either_way_name_exif(folder):
    Image.new("RGB", (50, 41)).save(folder / "JPEGImages" / "x.jpg", exif=_exif(6))
    expected = r"x\.png: .* its image, 50 x 41 turned by EXIF, 41 x 50 as stored, got 40 x 50"
    with pytest.raises(DataError, match=expected):
        first_sample(folder)


def test_prediction_is_upright(tmp_path):
    Image.new("RGB", (50, 40)).save(tmp_path / "turned.jpg", exif=_exif(6))
    assert read_image(tmp_path / "turned.jpg").shape == (3, 50, 40)


def test_mask_of_palette_png_is_class_indices(tmp_path):
    expected = np.arange(256).reshape(16, 16)
    write_mask(tmp_path / "m.png", expected)
    assert np.array_equal(read_mask(tmp_path / "m.png").pixels, expected)
