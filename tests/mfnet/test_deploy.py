"""`mfnet export`, `mfnet video`, and the page that shows how their files are used."""

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_docs import blocks
from torch import Tensor, nn

import mfnet
from mfnet import export as module
from mfnet.__main__ import main
from mfnet.export import FORMATS, export
from mfnet.pretrained import TrainedNetwork

# As small as they come, with one of mfops's operators inside.
TINY = {"class_path": "mfops.FactorizedContext", "init_args": {"channels": 3, "rank": 2}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What may stand in a run's place, in the folder of the page's blocks."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = TrainedNetwork(
        network=TINY,
        class_names=["sky", "road", "car"],
        normalization={"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        resize=[30, 40],
    )
    network.save_pretrained(tmp_path / "runs" / "camvid")
    Image.new("RGB", (50, 40), (200, 100, 0)).save("photo.jpg")
    return tmp_path / "runs" / "camvid"


ELSEWHERE = """
import sys, torch, mfops
images, logits = torch.load("case.pt")
for network in (
    torch.export.load("network.pt2").module(),
    torch._inductor.aoti_load_package("network.aoti.pt2"),
):
    torch.testing.assert_close(network(images), logits)
assert "mfnet" not in sys.modules
"""


def test_the_page(run, monkeypatch, capsys):
    """Its commands, then its blocks in the page's order; then a process without mfnet."""
    compiler = torch._inductor.config.aot_inductor  # for one program, as quick as can be
    monkeypatch.setattr(compiler, "compile_wrapper_opt_level", "O0")
    monkeypatch.setattr(compiler, "precompile_headers", False)
    path, error = export(run, "onnx", "network.onnx")
    assert str(path) == "network.onnx"
    assert error < 1e-5
    export(run, "pt2", "network.pt2", normalize=True)
    export(run, "aoti", "network.aoti.pt2", normalize=True)
    for number, block in enumerate(blocks("docs/deploy.md")):
        block = block.replace("mobilenetv2_100", "test_efficientnet")  # another small one
        exec(compile(block, f"docs/deploy.md, block {number}", "exec"), {})
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["class_names"] == ["sky", "road", "car"]
    assert told["resize"] == [30, 40]
    images = torch.rand(2, 3, 37, 41)
    network = mfnet.load(run)
    mean, std = (torch.tensor(values)[:, None, None] for values in network.normalization)
    torch.save((images, network((images - mean) / std).detach()), "case.pt")
    subprocess.run([sys.executable, "-c", ELSEWHERE], check=True)


def test_what_differs_is_not_left_in_place(run, monkeypatch, capsys):
    main(["export", str(run), "--to", "pt2"])
    assert "import mfops before you load it" in capsys.readouterr().out
    good = run / "network.pt2"
    before = good.read_bytes()
    network = mfnet.load(run)
    wrong = FORMATS["pt2"]._replace(run=lambda path: lambda images: network(images) + 1)
    monkeypatch.setitem(FORMATS, "pt2", wrong)
    with pytest.raises(SystemExit):
        main(["export", str(run), "--to", "pt2"])
    assert "of the largest, more than 1e-03; nothing was written" in capsys.readouterr().err
    assert good.read_bytes() == before
    assert {p.name for p in run.iterdir()} >= {"network.pt2", "config.json"}
    assert not list(run.glob(".*"))


class Branching(nn.Module):
    """Has neither parameters nor a program: which way it goes depends on the image."""

    def forward(self, images: Tensor) -> Tensor:
        return images if images.sum() > 0 else -images


class Wide(nn.Module):
    """Of its program torch.export takes the example's way, and asserts that a size goes it too."""

    def forward(self, images: Tensor) -> Tensor:
        return images if images.shape[3] > images.shape[2] else -images


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Branching, "pt2: torch cannot export Branching: Could not guard"),
        (Wide, "export: what torch exported does not run on images (1, 65, 65): Guard failed"),
    ],
)
def test_what_torch_cannot_export_ends_in_one_line(run, capsys, network, message):
    told = json.loads((run / "config.json").read_text())
    class_path = f"{__name__}.{network.__name__}"
    network = TrainedNetwork(**{**told, "network": {"class_path": class_path}})
    network.save_pretrained("trained")
    assert mfnet.load("trained").predict("photo.jpg").shape == (40, 50)
    with pytest.raises(SystemExit):
        main(["export", "trained", "--to", "pt2"])
    said = capsys.readouterr().err.splitlines()[-1]  # torch logs before
    assert said.startswith(f"mfnet: error: {message}")
    assert {p.name for p in Path("trained").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }


def test_weights_into_a_folder_that_is_there(run, capsys):
    (run / "weights").mkdir()
    (run / "weights" / "notes.txt").write_text("mine")
    main(["export", str(run), "--to", "weights"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (
        f"written: {run / 'weights'}; largest difference from the network: 0.0e+00 of its largest "
        "logit"
    )
    assert (run / "weights" / "notes.txt").read_text() == "mine"
    assert mfnet.load(run / "weights").class_names == ["sky", "road", "car"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "pt2", "output": "runs/camvid"}, "runs/camvid: expected another file than what it"),
        ({"to": "tflite"}, "to: expected onnx, pt2, aoti or weights, got 'tflite'"),
        ({"to": "weights", "normalize": True}, "normalize: weights hold the network alone"),
        ({"to": "onnx"}, "onnx needs onnxscript, onnxruntime: pip install onnxscript onnxruntime"),
    ],
)
def test_bad_exports(run, monkeypatch, arguments, message):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name != "onnx" else name)
    with pytest.raises(ValueError, match=message):
        export(run, **arguments)


def test_a_film(run, tmp_path, capsys):
    with av.open("in.mp4", "w") as film:
        stream = film.add_stream("libx264", rate=7)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        for shade in range(0, 250, 50):
            picture = np.full((48, 64, 3), shade, np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        film.mux(stream.encode())
    main(["video", str(run), "in.mp4", "new/out.mp4"])
    assert capsys.readouterr().out.splitlines()[-1] == "5 pictures painted: new/out.mp4"
    with av.open("new/out.mp4") as film:
        assert film.streams.video[0].average_rate == 7
        pictures = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert [picture.shape for picture in pictures] == [(48, 64, 3)] * 5
    means = [picture.mean() for picture in pictures]
    assert means == sorted(means)

    Path("link.mp4").symlink_to("in.mp4")
    before = Path("in.mp4").read_bytes()
    for source, output, message in (
        ("in.mp4", "in.mp4", "in.mp4: expected another file than what it is made of"),
        ("in.mp4", "link.mp4", "link.mp4: expected another file than what it is made of"),
        ("photo.txt", "out.mp4", "photo.txt: no such file"),
        ("runs/camvid/config.json", "out.mp4", "runs/camvid/config.json to out.mp4: "),
        ("in.mp4", "out.txt", "in.mp4 to out.txt: Could not determine output format"),
    ):
        with pytest.raises(SystemExit):
            main(["video", str(run), source, output])
        assert f"mfnet: error: {message}" in capsys.readouterr().err
    assert Path("in.mp4").read_bytes() == before
    Path("link.mp4").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "new", "photo.jpg", "runs"]


def test_a_film_of_a_telephone_held_upright(run):
    """Its pictures lie on their side, and a matrix in the file turns them clockwise."""
    with av.open("in.mp4", "w") as film:
        stream = film.add_stream("libx264", rate=7)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:, :32] = 255
        film.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        film.mux(stream.encode())
    one, last = 1 << 16, 1 << 30  # fixed point
    upright = np.array([one, 0, 0, 0, one, 0, 0, 0, last], ">i4").tobytes()
    turned = np.array([0, one, 0, -one, 0, 0, 0, 0, last], ">i4").tobytes()
    head, track, tail = Path("in.mp4").read_bytes().partition(b"tkhd")
    Path("in.mp4").write_bytes(head + track + tail.replace(upright, turned, 1))

    main(["video", str(run), "in.mp4", "out.mp4"])
    with av.open("out.mp4") as film:
        (frame,) = film.decode(video=0)
    assert (frame.width, frame.height, frame.rotation) == (48, 64, 0)
    picture = frame.to_ndarray(format="rgb24")
    assert picture[:30].mean() > 2 * picture[34:].mean()
