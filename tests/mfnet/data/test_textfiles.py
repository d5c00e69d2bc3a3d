"""Lists of classes and of images as people write them: read as meant, or refused by line."""

import unicodedata

import pytest
from made_up import write_image, write_mask, write_voc
from PIL import Image

from mfnet.data import PascalVOC, Synthetic, VOCFolder
from mfnet.data.textfiles import read_class_names
from mfnet.data.voc import list_folder


@pytest.mark.parametrize(
    "content",
    [
        b"sky\nroad\n3 wheeler\n",
        b"sky\r\nroad\r\n3 wheeler\r\n",
        b"sky\rroad\r3 wheeler",
        "sky\nroad\n3 wheeler\n".encode("utf-8-sig"),
        "sky\nroad\n3 wheeler\n".encode("utf-16"),
        b"# the classes\n\nsky\n  \n road \n3 wheeler\n\n",
        b"0: sky\n1: road\n2: 3 wheeler\n",
        b"0 sky\n1\troad\n2 3 wheeler\n",
        b"0,sky\n1,road\n2,3 wheeler\n",
        b"0. sky\n1) road\n2. 3 wheeler\n",
    ],
)
def test_classes_are_read_as_meant(tmp_path, content):
    (tmp_path / "classes.txt").write_bytes(content)
    assert read_class_names(tmp_path / "classes.txt") == ["sky", "road", "3 wheeler"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sky\nf\xfaßball\n".encode("latin-1"), "line 2: expected UTF-8 text, got byte 0xfa"),
        ("a\rb\rf\xfaß".encode("latin-1"), "line 3: expected UTF-8 text, got byte 0xfa"),
        ("sky\nroad\n".encode("utf-16-le"), "line 1: expected text, got a zero byte"),
        (b"sky\nroad\n\nsky\n", "line 4: expected different names, got 'sky' as in line 1"),
        (b"1: sky\n2: road\n", "line 1: expected number 0 in a numbered list"),
        (b"1 sky\n2 road\n", "line 1: expected number 0 in a numbered list"),
        (b"0: sky\n1: road\n255: void\n", "line 3: expected number 2 in a numbered list"),
        (b"0: sky\nroad\n", "line 2: expected number 1 in a numbered list"),
        (b"sky\n", r"expected 2 to 255 class names, one per line .*, got 1"),
        (b"# nothing\n", r"expected 2 to 255 class names, one per line .*, got 0"),
    ],
)
def test_classes_are_refused_by_line(tmp_path, content, message):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_class_names(tmp_path / "classes.txt")
    assert str(caught.value).startswith(str(tmp_path / "classes.txt"))


def images_of(root, split="train"):
    return [sample.image.name for sample in list_folder(root, split)]


def write_split(root, text, split="train"):
    (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_bytes(text.encode())


def test_any_extension_is_found_with_or_without_it(folder):
    for name, mask in (("p.png", "p.tif"), ("q.JPG", "q.PNG"), ("r.s.webp", "r.s.png")):
        write_image(folder / "JPEGImages" / name)
        write_mask(folder / "SegmentationClass" / "m.png", [[0]])
        with Image.open(folder / "SegmentationClass" / "m.png") as written:
            written.save(folder / "SegmentationClass" / mask)
    (folder / "JPEGImages" / "p.json").write_text("{}")  # as annotation tools leave them
    (folder / "JPEGImages" / "._p.png").write_text("")
    write_split(folder, "p\nq\r\nr.s\na.jpg\n# b\nJPEGImages/c.jpg\n")
    samples = list_folder(folder, "train")
    assert [s.image.name for s in samples] == ["p.png", "q.JPG", "r.s.webp", "a.jpg", "c.jpg"]
    assert [s.mask.name for s in samples] == ["p.tif", "q.PNG", "r.s.png", "a.png", "c.png"]
    write_split(folder, "p.png\nq.JPG\nr.s.webp\n")
    assert images_of(folder) == ["p.png", "q.JPG", "r.s.webp"]


def test_two_masks_of_one_image_are_named(folder):
    write_image(folder / "SegmentationClass" / "a.jpg")  # a preview
    write_split(folder, "a.jpg\n")
    with pytest.raises(ValueError, match=r"fits .*a\.jpg and .*a\.png; keep one of them"):
        list_folder(folder, "train")


def test_an_absolute_line_is_refused(folder):
    write_image(folder / "a.png")
    write_split(folder, f"{folder / 'a'}\n")
    with pytest.raises(ValueError, match=r"line 1: expected a name below .*JPEGImages, got"):
        list_folder(folder, "train")


def test_files_that_are_no_pictures_are_passed_over(folder):
    (folder / "JPEGImages" / "a.h5").write_bytes(b"features")
    assert images_of(folder)[0] == "a.jpg"


def test_two_files_of_one_name_are_named(folder):
    write_image(folder / "JPEGImages" / "a.png")
    with pytest.raises(ValueError, match=r"train\.txt, line 1: 'a' fits .*a\.jpg and .*a\.png"):
        list_folder(folder, "train")
    write_split(folder, "a.png\n")
    assert images_of(folder) == ["a.png"]


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_unicode_forms_are_one_name(folder, written):
    other = {"NFC": "NFD", "NFD": "NFC"}[written]
    stored, listed = (unicodedata.normalize(form, "f\u00fc\u00df") for form in (other, written))
    write_image(folder / "JPEGImages" / f"{stored}.jpg")
    write_mask(folder / "SegmentationClass" / f"{listed}.png", [[0]])
    write_split(folder, listed)
    assert images_of(folder) == [f"{stored}.jpg"]


@pytest.mark.parametrize("line", ["a  1", "JPEGImages/a.jpg SegmentationClass/a.png", "nowhere"])
def test_other_lines_are_refused(folder, line):
    write_split(folder, f"b\n{line}\n")
    with pytest.raises(FileNotFoundError, match=r"no file of that name, but .*train\.txt, line 2"):
        list_folder(folder, "train")


def test_a_repeated_line_is_told(folder):
    write_split(folder, "a\nb\na\n")
    with pytest.warns(UserWarning, match=r"train\.txt, line 3: 'a' stands in line 1 already"):
        list_folder(folder, "train")


def test_test_reads_its_own_split(folder):
    data = VOCFolder(str(folder))
    with pytest.raises(FileNotFoundError, match=r"test\.txt: no such file.*'mfnet validate'"):
        data.setup("test")
    write_split(folder, "e\n", "test")
    data.setup("test")
    assert [sample.image.name for sample in data.test_set.samples] == ["e.jpg"]
    assert len(data.test_dataloader()) == 1


@pytest.mark.parametrize(
    ("left", "possible"), [("val", "validate"), ("test", "test"), (None, "predict")]
)
def test_a_folder_needs_only_the_split_in_use(tmp_path, left, possible):
    root = write_voc(tmp_path / "set", {left or "train": ["a", "b"]}, classes=["p", "q", "r"])
    if left is None:
        (root / "ImageSets" / "Segmentation" / "train.txt").unlink()
        for mask in (root / "SegmentationClass").iterdir():
            mask.unlink()
    data = VOCFolder(str(root))
    assert data.class_names == ["p", "q", "r"]
    data.setup(possible)
    with pytest.raises(FileNotFoundError, match=r"(train|val)\.txt: no such file"):
        data.setup("fit")


def test_test_masks_that_are_not_to_be_had(tmp_path):
    write_voc(tmp_path / "VOCdevkit" / "VOC2012", {"train": ["a"], "val": ["v"]})
    with pytest.raises(ValueError, match="test images are not public; 'mfnet validate'"):
        PascalVOC(str(tmp_path)).setup("test")
    made = Synthetic(cache_dir=str(tmp_path), train=1, val=1, size=33)
    made.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"test\.txt: no such file"):
        made.setup("test")


def test_images_of_both_splits_are_told(folder):
    write_split(folder, "x\na\n", "val")
    with pytest.warns(UserWarning, match=r"1 images are in the training and in the validation"):
        VOCFolder(str(folder), crop_size=33).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"crop_size": 513}, True),
        ({"crop_size": (40, 50)}, False),
        ({"crop_size": 50}, False),
        ({"crop_size": 513, "resize": (500, 375)}, False),
        ({"crop_size": 513, "recipe": "paper"}, False),
    ],
)
def test_crops_of_mostly_padding_are_told(folder, arguments, told, recwarn):
    VOCFolder(str(folder), **arguments).setup("fit")
    messages = [str(w.message) for w in recwarn if "crop_size" in str(w.message)]
    assert len(messages) == told
    assert all("--data.crop_size [40,50]" in message for message in messages)
