"""Label maps, palettes that contradict each other, and what masks may be."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from made_up import first_sample, write_mask, write_voc
from PIL import Image
from torch.torch_version import TorchVersion

from mfnet.data import DataError, SegmentationDataModule, VOCFolder
from mfnet.data.files import read_mask
from mfnet.data.labels import LabelMap

# What is drawn, as the number of one of four regions, and the labels that shall come of it.
REGIONS = np.arange(40 * 50).reshape(40, 50) // 500
LABELS = torch.tensor([0, 1, 2, 255])
NUMBERS = np.array([5, 7, 9, 255])
COLORS = np.array([(0, 0, 0), (255, 0, 0), (0, 128, 255), (255, 255, 255)], dtype=np.uint8)
BY_NUMBER = {5: 0, 7: "road", 9: 2, 255: "ignore"}
BY_COLOR = {"#000000": "sky", "255,0,0": 1, "0, 128, 255": "car", "#FFffFF": 255}


def drawn(kind: str) -> Image.Image:
    numbers = NUMBERS[REGIONS]
    if kind in ("RGB", "RGBA"):
        return Image.fromarray(COLORS[REGIONS]).convert(kind)
    if kind == "RGBA, partly transparent":
        image = Image.fromarray(COLORS[REGIONS])
        image.putalpha(Image.fromarray((REGIONS > 0).astype(np.uint8) * 255))
        return image
    if kind == "permuted palette":
        image = Image.fromarray((3 - REGIONS).astype(np.uint8))
        image.putpalette(COLORS[::-1].tobytes())
        return image
    image = {
        "L": numbers.astype(np.uint8),
        "LA": numbers.astype(np.uint8),
        "P": numbers.astype(np.uint8),
        "I;16": numbers.astype(np.uint16),
        "I;16B": numbers.astype(">u2"),
        "I": numbers.astype(np.int32),
        "F": numbers.astype(np.float32),
    }[kind]
    image = Image.fromarray(image)
    if kind == "P":
        image.putpalette(range(256))
    return image.convert("LA") if kind == "LA" else image


def labels_of(folder, mask: Image.Image, name: str = "x.png", **arguments) -> torch.Tensor:
    mask.save(folder / "SegmentationClass" / "x.png", format=Image.registered_extensions()[name])
    return first_sample(folder, **arguments)[1]


@pytest.mark.parametrize(
    ("kind", "label_map"),
    [
        *((kind, BY_NUMBER) for kind in ("L", "LA", "P", "I;16", "I;16B", "I", "F")),
        *((kind, BY_COLOR) for kind in ("RGB", "RGBA", "RGBA, partly transparent")),
        ("permuted palette", BY_COLOR),
    ],
)
def test_label_map_of_every_kind_of_mask(folder, kind, label_map):
    for suffix in [".tif"] if kind in ("I", "F") else [".png", ".tif"]:
        labels = labels_of(folder, drawn(kind), suffix, label_map=label_map)
        assert torch.equal(labels, LABELS[torch.from_numpy(REGIONS)])


@pytest.mark.parametrize("label_map", [{0: 1, 1: 2}, {"#000000": 1, "#ffffff": 2}])
def test_label_map_of_bilevel_masks(folder, label_map):
    labels = labels_of(folder, Image.fromarray(REGIONS > 1), ".png", label_map=label_map)
    assert torch.equal(labels, torch.from_numpy(REGIONS > 1) + 1)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_colors_apply_to_gray_masks(folder, mode):
    """An optimizer of PNGs that turns a black and white RGB mask into gray changes nothing."""
    mask = Image.fromarray((REGIONS > 1).astype(np.uint8) * 255).convert(mode)
    labels = labels_of(folder, mask, ".png", label_map={"#000000": 2, "#ffffff": 1})
    assert torch.equal(labels, 2 - torch.from_numpy(REGIONS > 1).long())


def test_numbers_in_range_need_no_label_map_whatever_their_bits(folder):
    expected = torch.from_numpy(REGIONS % 3)
    for dtype in (np.uint8, np.uint16, np.int32, np.float32):
        mask = Image.fromarray((REGIONS % 3).astype(dtype))
        assert torch.equal(labels_of(folder, mask, ".tif"), expected)
    assert labels_of(folder, Image.fromarray(REGIONS > 1), ".png").unique().tolist() == [0, 1]


def test_other_takes_what_is_not_listed(folder):
    labels = labels_of(folder, drawn("RGB"), ".png", label_map={"#ff0000": 1, "other": "ignore"})
    assert torch.equal(labels, torch.tensor([255, 1, 255, 255])[torch.from_numpy(REGIONS)])
    labels = labels_of(folder, drawn("I"), ".tif", label_map={7: 1, "other": "sky"})
    assert torch.equal(labels, torch.tensor([0, 1, 0, 0])[torch.from_numpy(REGIONS)])


SHARES = '"#000000" (25 %), "#0080ff" (25 %), "#ff0000" (25 %), "#ffffff" (25 %)'


@pytest.mark.parametrize(
    ("kind", "label_map", "pieces"),
    [
        # A remedy that can be copied: what there is, and what to type.
        (
            "RGB",
            None,
            [
                f"mode RGB with colors {SHARES}",
                "--data.label_map '{\"#000000\": ..., \"#0080ff\": ..., \"#ff0000\": ..., ",
            ],
        ),
        ("RGBA", None, ["mode RGBA with colors", "--data.label_map"]),
        ("L", None, ["0 to 2 or 255, got [5, 7, 9]", "'{5: ..., 7: ..., 9: ..., 255: ...}'"]),
        ("I;16", None, ["got [5, 7, 9]", "--data.label_map"]),
        ("RGB", BY_NUMBER, ["label_map lists numbers", f"colors {SHARES}"]),
        ("I;16", BY_COLOR, ["label_map lists colors", "numbers 5 (25 %), 7 (25 %)"]),
        ("RGB", {"#000000": 0}, ['does not list "#0080ff" (25 %), "#ff0000"', "ignore", "other"]),
        ("L", {5: 0, 7: 1}, ["label_map does not list 9 (25 %), 255 (25 %)"]),
        ("permuted palette", {"#000000": 0}, ['does not list "#0080ff" (25 %)']),
        ("L", {"#000000": 0, "#050505": 0}, ['"#070707" (25 %), "#090909" (25 %), "#ffffff"']),
    ],
)  # fmt: skip
def test_what_is_not_listed_is_refused_by_name(folder, kind, label_map, pieces):
    with pytest.raises(DataError) as caught:
        labels_of(folder, drawn(kind), ".tif" if kind == "I" else ".png", label_map=label_map)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'SegmentationClass' / 'x.png'}: ")
    for piece in pieces:
        assert piece in message


def test_shifted_labels_are_refused_with_the_map_to_type(folder):
    mask = Image.fromarray(REGIONS.astype(np.uint8))  # 0 = unlabeled, 1, 2, 3 are the classes
    with pytest.raises(DataError, match=r"got \[3\].* '\{0: ignore, 1: 0, 2: 1, \.\.\.\}'"):
        labels_of(folder, mask, ".png")
    labels = labels_of(folder, mask, ".png", label_map={0: "ignore", 1: 0, 2: 1, 3: 2})
    assert torch.equal(labels, torch.tensor([255, 0, 1, 2])[torch.from_numpy(REGIONS)])


def test_blurred_colors_name_jpeg(folder):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    mask = folder / "SegmentationClass" / "x.jpg"
    Image.fromarray(noise).save(mask)
    mask.with_suffix(".png").unlink()
    with pytest.raises(DataError, match=r"and \d+ more \(JPEG changes labels .*as PNG\)"):
        first_sample(folder)


@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_jpegs_are_no_class_indices(folder, name):
    """Told by what the file is, not by its name."""
    mask = folder / "SegmentationClass" / name
    mask.with_suffix(".png").unlink()
    Image.fromarray(np.ones((40, 50), np.uint8)).save(mask, format="JPEG")
    with pytest.raises(DataError, match=r"expected class indices, got a JPEG \(.*as PNG"):
        first_sample(folder)
    with pytest.warns(UserWarning, match=r"SegmentationClass: masks are JPEGs.*as PNG"):
        labels = first_sample(folder, label_map={0: 0, 1: 1})[1]
    assert labels.unique().tolist() == [1]
    with pytest.raises(DataError, match=r"does not list 1 .*\(JPEG changes labels.*as PNG"):
        first_sample(folder, label_map={0: 0})


def deep_png() -> bytes:
    """RGB of 16 bits, which Pillow reads (as 8) but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + checksum

    header = (50).to_bytes(4, "big") + (40).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    pixels = zlib.compress(bytes(40 * (1 + 50 * 6)))
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


old_pillow = pytest.mark.xfail(
    TorchVersion(PIL.__version__) < "12", reason="Pillow cannot read the YCbCr TIFF that it writes"
)


@pytest.mark.parametrize(
    "kind",
    ["CMYK", "LAB", pytest.param("YCbCr", marks=old_pillow), "float", "16-bit RGB", "both"],
)
def test_what_is_no_mask_is_refused(folder, kind):
    path = folder / "SegmentationClass" / "x.png"
    if kind == "float":
        mask, message = Image.new("F", (50, 40), 0.5), "got mode F"
    elif kind == "both":  # the same color, once opaque and once transparent
        mask, message = Image.new("RGBA", (50, 40)), "got color #000000 opaque and transparent"
        mask.putpixel((0, 0), (0, 0, 0, 255))
    elif kind == "16-bit RGB":
        mask, message = None, "got mode RGB of 16 bits"
        path.write_bytes(deep_png())
    else:
        mask, message = Image.new(kind, (50, 40)), f"got mode {kind}"
    if mask is not None:
        mask.save(path, format="PNG" if kind == "both" else "TIFF")
    with pytest.raises(DataError, match=rf"x\.png: expected a mask .*{message}"):
        first_sample(folder)


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        ({}, "label_map: expected entries like"),
        ([1], r"label_map: expected entries like .* got \[1\]"),
        ({5: 0, "#000000": 1}, "expected keys that are all numbers or all colors"),
        ({"other": 1}, "expected keys that are all numbers or all colors"),
        ({5: 3}, r"label_map: 5: expected a class index \(0 to 2\), .* got 3"),
        ({5: -1}, "label_map: 5: expected a class index"),
        ({5: True}, "label_map: 5: expected a class index"),
        ({5: "bus"}, "got 'bus'"),
        ({"#ff00": 1}, "label_map: expected as keys numbers .* got '#ff00'"),
        ({"255,0": 1}, "got '255,0'"),
        ({"256,0,0": 1}, "got '256,0,0'"),
        ({1.5: 1}, "got 1.5"),
        ({10**20: 1}, "got 1" + 20 * "0"),
        ({"#ff0000": 1, "255,0,0": 2}, "color '255,0,0' is listed twice, for two classes"),
        ({5: 1, "5": 2}, "number '5' is listed twice"),
        ("nowhere.yaml", "label_map: nowhere.yaml: no such file"),
    ],
)
def test_bad_label_maps_are_named(folder, label_map, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        VOCFolder(str(folder), label_map=label_map)


def test_files_that_are_no_label_map_are_named(folder):
    file = folder / "map.yaml"
    for content in (b"a: [", b"", b"5", b"\xff\xfe\x00", b"#ff0000: 1\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"label_map: .*map\.yaml: "):
            VOCFolder(str(folder), label_map=str(file))


@pytest.mark.parametrize("name", ["map.yaml", "map.json", "~/map.yaml"])
def test_label_map_from_a_file(folder, name, monkeypatch):
    (folder / "home").mkdir()
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.chdir(folder)
    path = folder / name.replace("~", "home")
    path.write_text(json.dumps({str(key): value for key, value in BY_NUMBER.items()}))
    labels = labels_of(folder, drawn("I;16"), ".png", label_map=name)
    assert torch.equal(labels, LABELS[torch.from_numpy(REGIONS)])


@pytest.mark.parametrize("how", ["flag", "file", "in the configuration", "file there"])
def test_the_record_of_a_run_holds_the_map(folder, how, monkeypatch):
    """Whatever becomes of the file, config.yaml says what was done."""
    monkeypatch.chdir(folder)
    written = '{"#000000": sky, "255,0,0": 1}'
    (folder / "map.yaml").write_text(written)
    flags = ["--data=VOCFolder", f"--data.root={folder}"]
    if how in ("flag", "file"):
        flags += ["--data.label_map", written if how == "flag" else "map.yaml"]
    else:  # paths are those of the working folder there too, as all others
        (folder / "deep").mkdir()
        value = "map.yaml" if how == "file there" else written
        text = (
            f"data:\n  class_path: VOCFolder\n  init_args:\n    root: .\n    label_map: {value}\n"
        )
        (folder / "deep" / "c.yaml").write_text(text)
        flags = ["--config=deep/c.yaml"]

    def parser():
        result = LightningArgumentParser(exit_on_error=False)
        result.add_argument("--config", action="config")
        result.add_lightning_class_args(SegmentationDataModule, "data", subclass_mode=True)
        return result

    record = parser().dump(parser().parse_args(flags))
    (folder / "map.yaml").unlink()
    (folder / "config.yaml").write_text(record)
    config = parser().parse_args(["--config=config.yaml"])
    assert parser().dump(config) == record
    data = VOCFolder(**vars(config.data.init_args))
    assert data.label_map.by_color
    assert data.palette[:2] == [(0, 0, 0), (255, 0, 0)]


def test_classes_are_shown_in_the_colors_of_the_map(folder):
    data = VOCFolder(str(folder), label_map={"#102030": 2, "#FF0000": "sky", "#00ff00": "ignore"})
    assert data.palette == [(255, 0, 0), (128, 0, 0), (16, 32, 48)]
    data = VOCFolder(str(folder), label_map={0: "ignore", 1: 0, 2: 1, 7: 1, 300: 2})
    assert data.palette == [(128, 0, 0), (0, 128, 0), (0, 128, 0)]  # PASCAL's 1 and 2, and class 2


RED, GREEN, BLUE, GRAY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)


@pytest.fixture
def permuted(tmp_path):
    """In b the numbers 1 and 2 have swapped their colors."""
    splits = {"train": ["a", "b", "c"], "val": ["x"]}
    root = write_voc(tmp_path / "set", splits, classes=["p", "q", "r"])
    for name in "abcx":
        palette = [GRAY, GREEN, BLUE] if name == "b" else [GRAY, BLUE, GREEN]
        write_mask(root / "SegmentationClass" / f"{name}.png", REGIONS % 3, palette)
    return root


@pytest.mark.parametrize("num_workers", [0, 3])
def test_palettes_that_contradict_each_other_are_refused(permuted, num_workers):
    data = VOCFolder(str(permuted), crop_size=33, batch_size=1, num_workers=num_workers)
    data.setup("fit")
    with pytest.raises(DataError) as caught:
        list(data.train_dataloader())
    message = str(caught.value)
    assert "SegmentationClass/b.png" in message
    assert "SegmentationClass/a.png" in message or "SegmentationClass/c.png" in message
    assert "number 1 has the color #" in message
    assert "#00ff00" in message
    assert "#0000ff" in message
    assert "--data.label_map" in message


@pytest.mark.parametrize(
    "label_map",
    [
        {"#090909": 0, "#0000ff": 1, "#00ff00": 2},  # by their colors: no contradiction
        {0: 0, 1: 1, 2: 2},  # the numbers are said to count
    ],
)
def test_a_label_map_settles_contradicting_palettes(permuted, label_map):
    data = VOCFolder(str(permuted), crop_size=33, num_workers=0, label_map=label_map)
    data.setup("fit")
    list(data.train_dataloader())
    masks = [data.label_map(read_mask(sample.mask)) for sample in data.train_set.samples]
    same = "#090909" not in label_map
    assert np.array_equal(masks[0], masks[1]) == same
    assert np.array_equal(masks[0], REGIONS % 3)


def test_colors_that_no_pixel_has_do_not_contradict(tmp_path):
    splits = {"train": ["a", "b", "c"], "val": ["x"]}
    root = write_voc(tmp_path, splits, (2, 2), classes=["p", "q", "r"])
    masks = root / "SegmentationClass"
    write_mask(masks / "a.png", [[0, 255], [1, 1]], [GRAY, RED, BLUE, *[GREEN] * 253])
    write_mask(masks / "b.png", [[0, 255], [2, 2]], [GRAY, GREEN, GREEN, *[BLUE] * 253])
    Image.fromarray(np.array([[0, 1], [2, 2]], dtype=np.uint8)).save(masks / "c.png")  # gray
    # Larger first: torch fails where the random scale leaves one pixel.
    data = VOCFolder(str(root), resize=(33, 33), crop_size=33, num_workers=0)
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 1


def test_the_maps_of_the_page_are_label_maps():
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text("utf-8")
    maps = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    maps += re.findall(r"--data\.label_map '(.*?)'", page)
    assert len(maps) == 5
    for text in maps:
        LabelMap(yaml.safe_load(text), ["background", "road", "car"])
