"""The VOC layout, PASCAL VOC 2012 and SBD: which files and classes are found."""

import shutil
import sys

import numpy as np
import pytest
from made_up import write_image, write_voc
from PIL import Image
from scipy.io import savemat

from mfnet.data import DataError, PascalVOC, VOCFolder
from mfnet.data.files import read_mask
from mfnet.data.voc import PASCAL_CLASSES, list_folder, list_pascal, pascal_palette


def test_pascal_palette_is_the_published_one():
    palette = pascal_palette(256)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 7: (128, 128, 128), 8: (64, 0, 0)}
    known |= {15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {index: palette[index] for index in known} == known
    assert len(set(palette)) == 256


def test_folder_gives_files_classes_and_palette(folder):
    samples = list_folder(folder, "val")
    assert [s.image for s in samples] == [folder / "JPEGImages" / f"{n}.jpg" for n in "xyz"]
    assert [s.mask for s in samples] == [folder / "SegmentationClass" / f"{n}.png" for n in "xyz"]
    data = VOCFolder(str(folder))
    assert data.num_classes == 3
    assert data.class_names == ["sky", "road", "car"]
    assert data.palette == [(0, 0, 0), (128, 0, 0), (0, 128, 0)]


def test_palette_is_the_masks_own(tmp_path):
    colors = [(9, 8, 7), (1, 2, 3), *pascal_palette(256)[2:]]
    root = write_voc(tmp_path, {"train": "a", "val": "b"}, classes=["p", "q"], palette=colors)
    assert VOCFolder(str(root)).palette == [(9, 8, 7), (1, 2, 3)]


def test_gray_masks_have_pascals_palette(folder):
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(folder / "SegmentationClass" / "a.png")
    assert VOCFolder(str(folder)).palette == pascal_palette(3)


def test_short_palette_is_completed(folder):
    image = Image.fromarray(np.zeros((40, 50), np.uint8))
    image.putpalette([5, 6, 7])
    image.save(folder / "SegmentationClass" / "a.png", bits=1)
    palette = VOCFolder(str(folder)).palette
    assert len(palette) == 3
    assert palette[0] == (5, 6, 7)


def test_without_classes_txt_pascals_palette_means_pascals_classes(folder):
    (folder / "classes.txt").unlink()
    data = VOCFolder(str(folder))
    assert data.class_names == list(PASCAL_CLASSES)
    assert len(PASCAL_CLASSES) == 21
    assert data.palette == pascal_palette(21)


def test_without_classes_txt_another_palette_is_an_error(tmp_path):
    palette = [(i, i, i) for i in range(256)]
    root = write_voc(tmp_path, {"train": "a", "val": "b"}, palette=palette)
    with pytest.raises(FileNotFoundError, match=r"classes\.txt: missing"):
        VOCFolder(str(root))


@pytest.mark.parametrize(
    "missing",
    [
        "",
        "ImageSets/Segmentation/train.txt",
        "ImageSets/Segmentation/val.txt",
        "JPEGImages",
        "JPEGImages/b.jpg",
        "SegmentationClass/y.png",
    ],
)
def test_what_is_missing_is_named(folder, missing):
    path = folder / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        VOCFolder(str(folder)).setup("fit")
    named = path.with_suffix("") if "." in path.name and path.suffix != ".txt" else path
    assert str(caught.value).startswith(f"{named}: no ")
    assert "\n" not in str(caught.value)


def test_empty_split_is_named(folder):
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"train\.txt: names no image"):
        VOCFolder(str(folder)).setup("fit")


@pytest.fixture
def voc2012(tmp_path):
    write_voc(tmp_path / "VOCdevkit" / "VOC2012", {"train": ["a", "b"], "val": ["v", "w"]})
    return tmp_path


@pytest.fixture
def sbd(tmp_path):
    """SBD holds some of VOC's training and validation images, and others."""
    root = tmp_path / "sbd"
    for split, names in {"train": ["a", "c", "v"], "val": ["d", "w"]}.items():
        for name in names:
            write_image(root / "img" / f"{name}.jpg")
            (root / "cls").mkdir(exist_ok=True)
            mask = np.full((40, 50), 20, dtype=np.uint8)
            savemat(root / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": mask}})
        (root / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def test_pascal_voc_without_sbd(voc2012):
    data = PascalVOC(str(voc2012))
    assert data.class_names == list(PASCAL_CLASSES)
    assert [s.image.stem for s in data.list_samples("train")] == ["a", "b"]
    assert [s.image.stem for s in data.list_samples("val")] == ["v", "w"]


def test_trainaug_leaves_out_validation_images_and_prefers_vocs_masks(voc2012, sbd):
    samples = list_pascal(voc2012, "train", sbd)
    assert [(s.image.stem, s.mask.suffix) for s in samples] == [
        ("a", ".png"),
        ("b", ".png"),
        ("c", ".mat"),
        ("d", ".mat"),
    ]
    assert [s.image.stem for s in list_pascal(voc2012, "val", sbd)] == ["v", "w"]


def test_sbd_masks_train(voc2012, sbd):
    data = PascalVOC(str(voc2012), sbd_root=str(sbd), num_workers=0, crop_size=33)
    data.setup("fit")
    image, mask = data.train_set[3]
    assert image.shape == (3, 33, 33)
    assert set(mask.unique().tolist()) <= {20, 255}
    assert (read_mask(data.train_set.samples[3].mask).pixels == 20).all()


def test_pascal_names_what_is_missing(voc2012, sbd):
    with pytest.raises(FileNotFoundError, match=r"nowhere/VOCdevkit/VOC2012.*val\.txt: no such"):
        PascalVOC("nowhere").setup("fit")
    (sbd / "cls" / "d.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"cls/d\.mat: no such file"):
        PascalVOC(str(voc2012), sbd_root=str(sbd)).setup("fit")
    shutil.rmtree(sbd)
    with pytest.raises(FileNotFoundError, match=r"sbd/train\.txt: no such file"):
        PascalVOC(str(voc2012), sbd_root=str(sbd)).setup("fit")


def test_damaged_mat_file_is_named(sbd):
    path = sbd / "cls" / "c.mat"
    for content in (b"", b"not matlab" * 50):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"^.*c\.mat: cannot read mask: "):
            read_mask(path)


def test_sbd_without_scipy_is_named(voc2012, sbd, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match=r"sbd: reading SBD's \.mat masks needs scipy"):
        PascalVOC(str(voc2012), sbd_root=str(sbd)).setup("fit")


def test_download_only_when_asked_and_only_what_is_missing(tmp_path, monkeypatch):
    fetched = []

    def fake_download(url, root, filename, md5):
        fetched.append((filename, md5))
        write_voc(tmp_path / "VOCdevkit" / "VOC2012", {"train": ["a"], "val": ["v"]})

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", fake_download)
    with pytest.raises(FileNotFoundError, match="no such file"):
        PascalVOC(str(tmp_path)).setup("fit")
    assert fetched == []
    data = PascalVOC(str(tmp_path), download=True)
    assert fetched == []  # one process per machine does it, in prepare_data
    data.prepare_data()
    assert fetched == [("VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd")]
    data.prepare_data()
    assert len(fetched) == 1
    assert [s.image.stem for s in data.list_samples("val")] == ["v"]
