"""`python -m mfops`: versions, the GPU, what the extension was built with, which backends run."""

from __future__ import annotations

import importlib
import platform
from typing import Any

import torch

import mfops
from mfops.backends import EXTENSION_ERROR, TRITON_ERROR


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none visible to torch"
    index = torch.cuda.current_device()
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"


def _cpu_products(extension: Any) -> str:
    """In what the kernels on the CPU multiply bfloat16 features."""
    try:
        units, missing = extension.cpu_bfloat16_units(), extension.cpu_bfloat16_missing()
    except RuntimeError as error:  # MFOPS_CPU_PRODUCTS asks for what is not there
        return str(error).splitlines()[0]
    return f"in bfloat16, by {units}" if units else f"in float32: {missing}"


def _extension() -> list[tuple[str, str]]:
    if EXTENSION_ERROR is not None:
        return [("extension", EXTENSION_ERROR)]
    extension = importlib.import_module("mfops._C")
    info = extension.build_info()
    rows = [
        (
            "extension",
            f"built with torch {info['torch']} for torch >= {info['torch_stable_abi']}, "
            f"{info['compiler']}",
        ),
        ("CPU, bfloat16", f"multiplied {_cpu_products(extension)}"),
    ]
    if info["cuda"] is None:
        return [*rows, ("CUDA sources", f"not compiled: {info['cuda_missing']}")]
    rows.append(("CUDA sources", f"nvcc {info['cuda']}, {', '.join(info['cuda_archs'])}"))
    if torch.cuda.is_available():
        try:
            ran = f"ran as sm_{extension.cuda_probe(torch.cuda.current_device())}"
        except RuntimeError as error:
            ran = f"does not run: {error}"
        rows.append(("CUDA probe", ran))
    return rows


def report() -> str:
    """The environment, a line each: what a bug report should carry."""
    rows = [
        ("mfops", mfops.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("triton", TRITON_ERROR or importlib.import_module("triton").__version__),
        ("GPU", _gpu()),
        ("CPU threads", str(torch.get_num_threads())),
        *_extension(),
        *(
            (f"backend {name}", "runs" if reason is None else f"does not run: {reason}")
            for name, reason in mfops.available_backends().items()
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    print(report())
