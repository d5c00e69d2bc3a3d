"""``mfnet export RUN --to onnx|pt2|aoti|weights``: a trained network for use elsewhere.

What was written is run and compared with the network before it is left in place.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim
from torchvision.transforms.v2 import functional as tv

from mfnet.checkpoint import find_checkpoint
from mfnet.files import atomic_write, refuse_to_replace
from mfnet.pretrained import SOURCE, TrainedNetwork, load
from mfnet.run_directory import holds_run

Run = Callable[[Tensor], Tensor]

# Batch, height and width of what the file is compared on; the first is the example of an export.
SIZES = ((2, 97, 129), (1, 65, 65), (3, 128, 80))
LARGEST_ERROR = 1e-3  # of the largest logit
METADATA = "mfnet"


class Normalized(nn.Module):
    """A network on images in 0 to 1, float (B, C, H, W), that normalizes them itself."""

    def __init__(self, network: TrainedNetwork) -> None:
        super().__init__()
        self.network = network
        self.channels = network.channels

    def forward(self, images: Tensor) -> Tensor:
        return self.network(tv.normalize(images, *self.network.normalization))


Exported = TrainedNetwork | Normalized


def _write_onnx(model: Exported, path: Path, metadata: str) -> None:
    sizes = {0: "batch", 2: "height", 3: "width"}
    program = torch.onnx.export(
        model,
        (_example(0, model.channels),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=(sizes,),
        verbose=False,
    )
    assert program is not None  # it is where no path is given
    program.model.metadata_props[METADATA] = metadata
    program.save(path)


def _run_onnx(path: Path) -> Run:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Else they would spin on for a while, which slows down whatever is called next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _program(model: Exported) -> torch.export.ExportedProgram:
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    return torch.export.export(model, (_example(0, model.channels),), dynamic_shapes=(sizes,))


def _write_pt2(model: Exported, path: Path, metadata: str) -> None:
    torch.export.save(_program(model), path, extra_files={METADATA: metadata})


def _run_pt2(path: Path) -> Run:
    return torch.export.load(path).module()


def _write_aoti(model: Exported, path: Path, metadata: str) -> None:
    torch._inductor.aoti_compile_and_package(
        _program(model),
        package_path=str(path),
        # Frozen: batch norms become part of the convolutions, whose weights are packed.
        inductor_configs={"aot_inductor.metadata": {METADATA: metadata}, "freezing": True},
    )


def _run_aoti(path: Path) -> Run:
    return torch._inductor.aoti_load_package(str(path))


class Format(NamedTuple):
    """How a kind of file is written and run, and the packages that this needs."""

    name: str
    write: Callable[[Exported, Path, str], None]
    run: Callable[[Path], Run]
    packages: tuple[str, ...] = ()


FORMATS = {
    "onnx": Format("network.onnx", _write_onnx, _run_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "pt2": Format("network.pt2", _write_pt2, _run_pt2),
    "aoti": Format("network.aoti.pt2", _write_aoti, _run_aoti),
}


def export(
    source: str | Path, to: str, output: str | Path | None = None, normalize: bool = False
) -> tuple[Path, float]:
    """Write a trained network to a file that takes any batch, height and width.

    Args:
        source: what ``mfnet.load`` takes.
        to: ``"onnx"``, ``"pt2"`` (torch.export; where it is loaded, ``import mfops`` comes first),
            ``"aoti"`` (AOTInductor, compiled for this machine's kind of processor), or
            ``"weights"``, a folder for ``mfnet.load`` and ``from_pretrained``.
        output: the file or, of weights, the folder; default: ``network.onnx``, ``network.pt2``,
            ``network.aoti.pt2`` or ``weights`` in the source's folder, of a network in the package
            in the current one.
        normalize: whether the program takes RGB in 0 to 1 and normalizes it itself.

    Returns:
        Where it is, and the largest difference of its logits from the network's, in units of the
        network's largest logit, over three sizes.

    Raises:
        FileNotFoundError, ValueError: as ``mfnet.load``; an unknown format, a package that it
            needs is missing, torch cannot export the network, or what was written does not run on
            images of every size or differs by more than 1e-3.
    """
    if to not in (*FORMATS, "weights"):
        raise ValueError(f"to: expected {', '.join(FORMATS)} or weights, got {to!r}")
    if to == "weights" and normalize:
        raise ValueError("normalize: weights hold the network alone; predict() normalizes")
    packages = () if to == "weights" else FORMATS[to].packages
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(f"{to} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    network = load(source)
    folder = Path(source).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    name = "weights" if to == "weights" else FORMATS[to].name
    path = folder / name if output is None else Path(output).expanduser()
    refuse_to_replace(find_checkpoint(source), path)
    if to == "weights" and holds_run(path):
        raise ValueError(f"{path}: expected a folder of the weights' own, but it holds a run")
    if to == "weights":
        with _atomic_folder(path) as partial:
            network.save_pretrained(partial)
            return path, _compare(network, TrainedNetwork.from_pretrained(partial))
    model = Normalized(network) if normalize else network
    metadata = {
        "class_names": network.class_names,
        "palette": network.palette,
        "resize": network.resize,
        "normalization": None if normalize else network.normalization._asdict(),
    }
    with atomic_write(path) as partial:
        try:
            FORMATS[to].write(model.eval(), partial, json.dumps(metadata))
        except OSError:
            raise
        except Exception as error:  # exporters and compilers have errors of many classes
            kind = type(network.network).__name__
            reason = error.__cause__ or error  # ONNX's exporter says little beside it
            raise ValueError(f"{to}: torch cannot export {kind}: {reason}") from error
        return path, _compare(model, FORMATS[to].run(partial))


def _example(index: int, channels: int) -> Tensor:
    batch, height, width = SIZES[index]
    generator = torch.Generator().manual_seed(index)
    return torch.rand(batch, channels, height, width, generator=generator)


@torch.inference_mode()
def _compare(model: Exported, run: Run) -> float:
    worst = 0.0
    for index, size in enumerate(SIZES):
        images = _example(index, model.channels)
        expected = model(images)
        try:
            got = run(images)
        except Exception as refusal:  # a program asserts what its export took for granted
            raise ValueError(
                f"export: what torch exported does not run on images {size}: {refusal}; nothing "
                "was written"
            ) from refusal
        if got.shape != expected.shape:
            raise ValueError(
                f"export: expected logits {tuple(expected.shape)} of images {size}, got "
                f"{tuple(got.shape)}"
            )
        error = float((got - expected).abs().max() / expected.abs().max())
        if not error <= LARGEST_ERROR:
            raise ValueError(
                f"export: on images {size} the logits differ by {error:.1e} of the largest, more "
                f"than {LARGEST_ERROR:.0e}; nothing was written"
            )
        worst = max(worst, error)
    return worst


@contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, whose files are moved there once the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder)
        path.mkdir(exist_ok=True)
        for file in Path(folder).iterdir():
            # A description that somebody wrote stays, as in huggingface_hub.
            if file.name != "README.md" or not (path / file.name).exists():
                os.replace(file, path / file.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``mfnet export``; user errors are raised, for the caller to print."""
    parser = argparse.ArgumentParser(
        prog="mfnet export",
        description="Write a trained network to a file for use elsewhere (docs/deploy.md).",
    )
    parser.add_argument("run", metavar="RUN", help=SOURCE)
    parser.add_argument("--to", required=True, choices=[*FORMATS, "weights"])
    where = "default: in RUN's folder; of a shipped network, in the current one"
    parser.add_argument("--output", metavar="PATH", help=where)
    parser.add_argument(
        "--normalize", action="store_true", help="take RGB in 0 to 1 and normalize it inside"
    )
    options = parser.parse_args(arguments)
    path, error = export(options.run, options.to, options.output, options.normalize)
    print(f"written: {path}; largest difference from the network: {error:.1e} of its largest logit")
    if options.to in ("pt2", "aoti"):
        print("mfops's operators are in it: import mfops before you load it")
