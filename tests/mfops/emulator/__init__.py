"""Runs csrc/cuda's kernels without a GPU: compiles them against cuda/common of this folder; and
csrc/cpu's bfloat16 kernels without AVX512-BF16 and AMX, against x86/immintrin.h.

An entry point is an extern "C" function that returns `mfops::emulator::error_of(...)`. The
environment's MFOPS_EMULATOR_ORDER ("ascending", "descending" or a number, the seed of a shuffle) is
the order in which threads run where CUDA leaves it open: a result that depends on it shows a race.
Between lanes of one warp only plain loads and stores race here: a collective (ldmatrix, mma,
shuffle_down) sees whatever any lane did before it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
MFOPS = HERE.parents[2] / "mfops"
WITH_TORCH = (
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-Wno-attributes",
    *(f"-isystem{path}" for path in include_paths()),
    *(f"-L{path}" for path in library_paths()),
    "-Wl,--no-as-needed",
    "-ltorch",
    "-ltorch_cpu",
)


@functools.cache
def build_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mfops-emulator-")


@functools.cache
def build(*sources: Path, flags: tuple[str, ...] = ()) -> str:
    """The library made of these .cpp and .cu files, compiled once a session, all at a time; skips
    the test where there is no C++ compiler."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler[0]})")
    folder = tempfile.mkdtemp(dir=build_folder().name)
    compiler += ["-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", f"-I{HERE}", f"-I{CSRC}"]
    objects = [f"{folder}/{i}.o" for i in range(len(sources))]
    commands = [
        [*compiler, *flags, "-x", "c++", "-c", str(source), "-o", target]
        for source, target in zip(sources, objects, strict=True)
    ]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate()[1] for process in running]
    assert not any(process.returncode for process in running), "".join(errors)
    # g++ makes statics of templates and inline functions unique in the process: with two libraries
    # loaded, one would use the other's. So no C++ name is exported.
    exports = Path(folder, "exports")
    exports.write_text("{ local: _Z*; };")
    library = f"{folder}/emulated.so"
    link = [*compiler, "-shared", f"-Wl,--version-script={exports}", *objects, "-o", library]
    done = subprocess.run([*link, *flags], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    return library


def load(*sources: Path) -> ctypes.CDLL:
    return ctypes.CDLL(build(*sources))


@functools.cache
def operators(*, factors: bool) -> Any:
    """csrc/cuda's operators on CPU tensors, those that find factors or the others, as
    torch.ops.mfops_emulated: two libraries, so that no process need compile both."""
    source = HERE / ("factor_operators.cpp" if factors else "operators.cpp")
    torch.ops.load_library(build(source, flags=WITH_TORCH))
    return torch.ops.mfops_emulated


def package_with_bfloat16(folder: Path) -> None:
    """mfops as the package in ``folder``, its C++ extension with AVX512-BF16 and AMX emulated."""
    shutil.copytree(MFOPS, folder / "mfops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    includes = pybind11.get_include(), sysconfig.get_paths()["include"]
    library = build(
        *sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*/*.cpp")]),
        flags=(
            *(f"-I{HERE}/x86", "-O3", "-Wno-psabi", '-DMFOPS_CUDA_MISSING="not emulated"'),
            *(f"-isystem{path}" for path in includes),
            *WITH_TORCH,
        ),
    )
    shutil.copy(library, folder / "mfops" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")


def call(function: Any, *arguments: torch.Tensor | int) -> None:
    """Calls an entry point, tensors as pointers and numbers as int; its error is a RuntimeError."""
    function.restype = ctypes.c_char_p
    error = function(
        *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments)
    )
    if error is not None:
        raise RuntimeError(error.decode())
