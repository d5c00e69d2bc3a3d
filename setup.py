"""Builds mfops._C; all that is not a decision about compilers is in pyproject.toml.

The C++ sources are always compiled, the CUDA sources where nvcc and a CUDA build of torch are
there, whether or not a GPU is visible, unless MFOPS_CUDA=0 declines them. Where a tool is missing
the build goes on without it and says so in one line; an error in our own sources always fails it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = (2, 11)  # oldest torch whose stable ABI the extension needs
CXX_STANDARD = "-std=c++20"  # what the headers of current torch need
# Ampere, Ada, Hopper, Blackwell; Hopper's PTX, which is compiled on the first call, for others.
CUDA_ARCHS = ("8.0", "8.6", "8.9", "9.0+PTX", "10.0", "12.0")
METADATA_COMMANDS = {"egg_info", "dist_info", "sdist"}  # commands that compile nothing


def notice(message: str) -> None:
    """One line to stderr and, as pip hides a build's stderr, to the terminal that pip runs in."""
    line = f"mfops: NOTICE: {message}"
    print(line, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"\n{line}", file=terminal)


class CleanBuildPy(build_py):
    """Copies into an empty folder: modules of an earlier build would go into the wheel, too."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def check_requirements(requirements: list[str]) -> None:
    """Ends the build where a `name>=version` is not met: pip checks only when it isolates."""
    for requirement in requirements:
        name, _, oldest = requirement.partition(">=")
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "none"
        if release(found) < release(oldest):
            sys.exit(
                f"mfops: the build needs {requirement}, found {found}: run pip install"
                f" '{requirement}' or drop --no-build-isolation"
            )


def compile_error(command: list[str], source: str, suffix: str) -> str | None:
    """None where `command` compiles `source`, else the first line that says why not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe").with_suffix(suffix)
        path.write_text(source)
        command = [*command, "-c", str(path), "-o", str(path.with_suffix(".o"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            return str(error)
    if done.returncode == 0:
        return None
    lines = (done.stderr + done.stdout).replace(str(path), path.name).splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "no output")


def find_cxx() -> tuple[str, None] | tuple[None, str]:
    """The command of a working C++ compiler, or why there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    cxx = next((name for name in names if shutil.which(shlex.split(name)[0])), None)
    if cxx is None:
        return None, f"no C++ compiler ({' or '.join(names)}) on PATH"
    include = sysconfig.get_paths()["include"]
    command = [*shlex.split(cxx), CXX_STANDARD, f"-I{include}"]
    error = compile_error(command, "#include <Python.h>\n#include <vector>\n", ".cpp")
    if error:
        return None, f"{cxx} can't compile a C++20 file that includes Python.h ({error})"
    return cxx, None


def find_nvcc() -> tuple[str, None] | tuple[None, str]:
    """nvcc where torch looks: CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda; or why there is none."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = shutil.which("nvcc", path=f"{home}/bin")
            return (nvcc, None) if nvcc else (None, f"no nvcc in {home}/bin ({variable})")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return (nvcc, None) if nvcc else (None, "no nvcc on PATH or in /usr/local/cuda/bin")


def cuda_home_of(nvcc: str) -> Path:
    """Root of nvcc's toolkit as nvcc itself tells it: nvcc on PATH may be a wrapper script."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(top.group(1) if top else Path(nvcc).parent.parent).resolve()


def find_cuda(torch_cuda: str | None, cxx: str) -> tuple[Path, None] | tuple[None, str]:
    """Root of a CUDA toolkit that fits torch, built for CUDA `torch_cuda`, or why there is none."""
    if os.environ.get("MFOPS_CUDA") == "0":
        return None, "declined by MFOPS_CUDA=0"
    if torch_cuda is None:
        return None, "the torch it was built with has no CUDA support"
    nvcc, missing = find_nvcc()
    if nvcc is None:
        return None, missing
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", version)
    if release is None:
        return None, f"{nvcc} --version names no release"
    major = torch_cuda.split(".")[0]
    if release.group(1).split(".")[0] != major:
        return None, (
            f"nvcc {release.group(1)} does not match torch's CUDA {torch_cuda}: install a CUDA"
            f" {major} toolkit and point CUDA_HOME at it, or install a torch built for CUDA"
            f" {release.group(1).split('.')[0]} and run pip install --no-build-isolation"
        )
    source = "#include <cuda_runtime.h>\n__global__ void probe() {}\n"
    error = compile_error([nvcc, CXX_STANDARD, "-ccbin", shlex.split(cxx)[-1]], source, ".cu")
    if error:
        return None, f"{nvcc} can't compile an empty kernel ({error})"
    return cuda_home_of(nvcc), None


def known_archs(cuda_home: Path) -> str:
    """Those of CUDA_ARCHS that the toolkit compiles for, as torch reads them."""
    command = [str(cuda_home / "bin" / "nvcc"), "--list-gpu-code"]
    known = subprocess.run(command, capture_output=True, text=True).stdout.split()
    codes = {arch: "sm_" + arch.split("+")[0].replace(".", "") for arch in CUDA_ARCHS}
    return ";".join(arch for arch, code in codes.items() if code in known)


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def extension(cxx: str, cuda_home: Path | None, cuda_missing: str | None) -> Extension:
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    major, minor = TORCH_TARGET
    macros = [("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000")]
    files = sources("*.cpp") + sources("cpu/**/*.cpp")
    flags = [CXX_STANDARD, "-O3", "-g0", "-fvisibility=hidden"]
    # libtorch.so brings torch's CUDA half where there is one; --as-needed would drop it.
    link = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    library_dirs = library_paths()
    nvcc_flags: list[str] = []
    if cuda_home:
        files += sources("cuda/**/*.cpp") + sources("cuda/**/*.cu")
        macros.append(("MFOPS_WITH_CUDA", "1"))
        nvcc_flags = [CXX_STANDARD, "-O3", "-Xcompiler=-fvisibility=hidden"]
        nvcc_flags += ["-ccbin", shlex.split(cxx)[-1]]
        library_dirs += [str(path) for path in (cuda_home / "lib64", cuda_home / "lib")]
        # A static, private CUDA runtime: the extension imports where there is no CUDA at all,
        # and never mixes with the runtime that torch brings along.
        link += ["-lcudart_static", "-ldl", "-lpthread", "-lrt", "-Wl,--exclude-libs,ALL"]
    else:
        # As octal: ninja would take $name for a variable of its own.
        text = json.dumps(cuda_missing).replace("$", r"\044")
        macros.append(("MFOPS_CUDA_MISSING", text))
    return Extension(
        "mfops._C",
        files,
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include(), *include_paths()],
        define_macros=macros,
        library_dirs=library_dirs,
        extra_compile_args={"cxx": flags, "nvcc": nvcc_flags},
        extra_link_args=link,
        language="c++",
    )


def build_arguments() -> dict:
    """ext_modules and cmdclass for setup(): empty, after a notice, without a C++ compiler."""
    cxx, problem = find_cxx()
    if cxx is None:
        notice(
            f"{problem}: installing WITHOUT native kernels, as pure Python. Install g++ and"
            " Python's development headers, then install again."
        )
        return {"cmdclass": {"build_py": CleanBuildPy}}
    os.environ["CXX"] = cxx  # compile and link with the compiler that was tried
    import torch

    cuda_home, cuda_missing = find_cuda(torch.version.cuda, cxx)
    if cuda_home is None:
        notice(f"{cuda_missing}: building the C++ kernels only, no CUDA kernels.")
    else:
        os.environ["CUDA_HOME"] = str(cuda_home)  # read when torch.utils.cpp_extension is imported
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or known_archs(cuda_home)
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    from torch.utils.cpp_extension import BuildExtension

    return {
        "ext_modules": [extension(cxx, cuda_home, cuda_missing)],
        "cmdclass": {"build_ext": BuildExtension, "build_py": CleanBuildPy},
    }


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    check_requirements(project["build-system"]["requires"])
    setup(**({} if METADATA_COMMANDS & set(sys.argv) else build_arguments()))
