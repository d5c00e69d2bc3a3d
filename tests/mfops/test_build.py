"""setup.py's decisions, with the tools it looks for put in place or hidden, and what it built."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mfops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()
requires_cxx = pytest.mark.skipif(setup.find_cxx()[0] is None, reason="no C++ compiler")


@pytest.fixture
def extension() -> ModuleType:
    return pytest.importorskip("mfops._C", reason="the extension was not built")


@pytest.fixture
def cuda_extension(extension: ModuleType) -> ModuleType:
    if extension.build_info()["cuda"] is None:
        pytest.skip(f"no CUDA in this build: {extension.build_info()['cuda_missing']}")
    return extension


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, empty, besides which no tool is named by the environment."""
    folder = tmp_path / "toolkit" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CC", "CXX", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(folder.parent))
    return folder


def test_who_installs_the_tests_has_what_a_build_requires() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = told["project"]
    installed = {*project["dependencies"], *project["optional-dependencies"]["test"]}
    assert installed >= set(told["build-system"]["requires"])


def write_tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def write_nvcc(folder: Path, release: str, compiles: bool = True) -> None:
    compile_line = "exit 0" if compiles else "echo 'error: unsupported GNU version' >&2; exit 1"
    write_tool(
        folder,
        "nvcc",
        f"""case "$1" in
--version) echo 'Cuda compilation tools, release {release}, V{release}.99' ;;
--dryrun) echo '#$ TOP={folder}/..' >&2 ;;
*) {compile_line} ;;
esac""",
    )


def test_no_compiler_is_one_notice_and_no_extension(
    bin_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "ext_modules" not in setup.build_arguments()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mfops: NOTICE: no C++ compiler (c++ or g++ or clang++) on PATH:")
    assert "pure Python" in lines[0]


def test_named_compiler_that_is_absent_is_named(
    bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "icpx")
    assert setup.find_cxx() == (None, "no C++ compiler (icpx) on PATH")


def test_compiler_that_fails_is_reported_in_its_own_words(bin_folder: Path) -> None:
    write_tool(bin_folder, "c++", "echo 'x.cpp:1: fatal error: Python.h: No such file' >&2; exit 1")
    cxx, reason = setup.find_cxx()
    assert cxx is None
    assert "Python.h: No such file" in reason


def test_compiler_may_be_behind_a_launcher(
    bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tool(bin_folder, "launcher", "exit 0")
    monkeypatch.setenv("CXX", "launcher g++-12")
    assert setup.find_cxx() == ("launcher g++-12", None)


def test_no_cuda_without_a_cuda_torch(bin_folder: Path) -> None:
    write_nvcc(bin_folder, "13.0")
    assert setup.find_cuda(None, "c++") == (
        None,
        "the torch it was built with has no CUDA support",
    )


def test_no_cuda_without_nvcc(bin_folder: Path) -> None:
    home, reason = setup.find_cuda("13.2", "c++")
    assert home is None
    assert reason == f"no nvcc in {bin_folder} (CUDA_HOME)"


def test_cuda_can_be_declined(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(bin_folder, "13.0")
    monkeypatch.setenv("MFOPS_CUDA", "0")
    assert setup.find_cuda("13.2", "c++") == (None, "declined by MFOPS_CUDA=0")


def test_the_reason_for_no_cuda_reaches_the_extension_as_it_is() -> None:
    built = setup.extension("c++", None, "no nvcc in $HOME/bin")
    assert dict(built.define_macros)["MFOPS_CUDA_MISSING"] == r'"no nvcc in \044HOME/bin"'


@pytest.mark.parametrize("release", ["12.9", "14.0"])
def test_another_major_version_of_cuda_is_told_with_the_remedy(
    bin_folder: Path, release: str
) -> None:
    write_nvcc(bin_folder, release)
    home, reason = setup.find_cuda("13.2", "c++")
    assert home is None
    assert reason.startswith(f"nvcc {release} does not match torch's CUDA 13.2: ")
    assert "install a CUDA 13 toolkit and point CUDA_HOME at it" in reason
    assert f"a torch built for CUDA {release[:2]}" in reason
    assert "\n" not in reason


@pytest.mark.parametrize("release", ["13.0", "13.2", "13.9"])
def test_the_same_major_version_of_cuda_is_used(bin_folder: Path, release: str) -> None:
    write_nvcc(bin_folder, release)
    assert setup.find_cuda("13.2", "c++") == (bin_folder.parent, None)


def test_toolkit_behind_a_wrapper_script_is_found(
    bin_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nvcc(bin_folder, "13.0")
    wrappers = tmp_path / "wrappers" / "bin"
    wrappers.mkdir(parents=True)
    write_tool(wrappers, "nvcc", f'exec {bin_folder}/nvcc "$@"')
    monkeypatch.setenv("PATH", str(wrappers))
    monkeypatch.delenv("CUDA_HOME")
    assert setup.find_cuda("13.2", "c++") == (bin_folder.parent, None)


@pytest.mark.parametrize(
    ("listed", "taken"),
    [
        ("75 80 86 87 89 90", "8.0;8.6;8.9;9.0+PTX"),  # before CUDA 12.8
        ("75 80 86 87 88 89 90 100 110 103 120 121", "8.0;8.6;8.9;9.0+PTX;10.0;12.0"),
    ],
)
def test_architectures_are_those_that_nvcc_knows(bin_folder: Path, listed: str, taken: str) -> None:
    write_tool(bin_folder, "nvcc", f"for arch in {listed}; do echo sm_$arch; done")
    assert setup.known_archs(bin_folder.parent) == taken


def test_nvcc_that_cannot_compile_is_reported_in_its_own_words(bin_folder: Path) -> None:
    write_nvcc(bin_folder, "13.0", compiles=False)
    home, reason = setup.find_cuda("13.2", "c++")
    assert home is None
    assert "error: unsupported GNU version" in reason


@pytest.mark.parametrize("requirement", ["torch>=99.1", "no-such-package>=1"])
def test_build_requirement_that_is_absent_or_too_old_is_named(requirement: str) -> None:
    with pytest.raises(SystemExit, match=f"the build needs {requirement}, found .*pip install"):
        setup.check_requirements(["torch>=2", requirement])


def test_build_requirements_that_are_met_pass() -> None:
    setup.check_requirements(["torch>=2", "torch>=2.11", "ninja", "no-such-package-of-any-version"])


def source_tree(folder: Path) -> Path:
    """The build files and a package to install, with a csrc of the caller's own making."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for package in ("mfops", "mfnet"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    (folder / "csrc").mkdir()
    return folder


def run_setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@requires_cxx
def test_an_error_in_our_sources_fails_the_build(tmp_path: Path) -> None:
    tree = source_tree(tmp_path)
    (tree / "csrc" / "broken.cpp").write_text("int broken( {\n")
    done = run_setup(tree, "build_ext", CUDA_HOME=str(tree))
    assert done.returncode != 0
    assert "broken.cpp:1" in done.stdout + done.stderr
    assert f"NOTICE: no nvcc in {tree}/bin (CUDA_HOME)" in done.stderr


def test_without_a_compiler_the_pure_python_packages_are_built(
    tmp_path: Path, bin_folder: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    source_tree(tree)
    done = run_setup(tree, "build", "--build-base", str(tmp_path / "build"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("NOTICE: no C++ compiler") == 1
    built = {path.name for path in (tmp_path / "build" / "lib").iterdir()}
    assert built == {"mfops", "mfnet"}
    assert not list((tmp_path / "build").rglob("*.so"))


def test_modules_of_an_earlier_build_do_not_come_back(tmp_path: Path, bin_folder: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    source_tree(tree)
    (tree / "mfops" / "deleted.py").touch()
    assert run_setup(tree, "build").returncode == 0
    (tree / "mfops" / "deleted.py").unlink()
    assert run_setup(tree, "build").returncode == 0
    assert {path.name for path in (tree / "build" / "lib" / "mfops").iterdir()} == {"__init__.py"}


def test_a_notice_reaches_the_terminal_that_pip_runs_in(tmp_path: Path, bin_folder: Path) -> None:
    """pip keeps a build's output to itself."""
    tree = tmp_path / "tree"
    tree.mkdir()
    source_tree(tree)
    in_a_terminal = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]))"
    build = f"{sys.executable} setup.py build > build.log 2>&1"
    done = subprocess.run(
        [sys.executable, "-c", in_a_terminal, "/bin/sh", "-c", build],
        cwd=tree,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (tree / "build.log").read_text()
    assert done.stdout.strip().startswith("mfops: NOTICE: no C++ compiler")


def test_configurations_and_trained_networks_are_packed(tmp_path: Path, bin_folder: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    source_tree(tree)
    network = "mfnet/trained/tiny"
    files = {"mfnet/configs/tiny.yaml", "mfnet/trained/README.md"}
    files |= {f"{network}/config.json", f"{network}/model.safetensors"}
    for file in files:
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).touch()
    for command in (["build", "--build-base", str(tmp_path / "build")], ["sdist"]):
        done = run_setup(tree, *command)
        assert done.returncode == 0, done.stderr
    built = {str(path.relative_to(tmp_path / "build" / "lib"))
             for path in (tmp_path / "build" / "lib").rglob("*")}  # fmt: skip
    assert built >= files
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as packed:
        assert {name.partition("/")[2] for name in packed.getnames()} >= files


def test_build_info(extension: ModuleType) -> None:
    info = extension.build_info()
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["torch"])
    assert info["torch_stable_abi"] == "2.11"
    assert info["compiler"]
    assert (info["cuda"] is None) == bool(info["cuda_missing"])
    assert (info["cuda"] is None) == (info["cuda_archs"] == [])
    assert hasattr(extension, "cuda_probe") == (info["cuda"] is not None)


def test_extension_needs_no_cuda_library(extension: ModuleType) -> None:
    """So that it imports beside a CPU-only torch and on a machine without a driver."""
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    command = ["readelf", "--dynamic", "--wide", extension.__file__]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name]


@pytest.mark.parametrize("name", ["reconstruct", "mse", "reconstruct_backward"])
def test_operators_are_registered_for_cuda(cuda_extension: ModuleType, name: str) -> None:
    """Native kernels straight at the dispatcher's key: a call has no Python on its way to them."""
    table = torch._C._dispatch_dump(f"mfops::{name}")
    (cuda,) = (line for line in table.splitlines() if line.startswith("CUDA: "))
    assert "ops.cpp" in cuda


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_probe_without_a_device_says_so(cuda_extension: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"^CUDA error: .*\(cudaError\w+\) in cudaGetDevice"):
        cuda_extension.cuda_probe(0)


@pytest.mark.gpu
def test_probe_runs_code_of_this_build(cuda_extension: ModuleType) -> None:
    major, minor = torch.cuda.get_device_capability(0)
    arch = cuda_extension.cuda_probe(device_index=0)
    assert f"sm_{arch}" in cuda_extension.build_info()["cuda_archs"]
    assert arch <= 10 * major + minor


@pytest.mark.gpu
def test_probe_of_an_absent_device_leaves_cuda_usable(cuda_extension: ModuleType) -> None:
    device = torch.cuda.current_device()
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        cuda_extension.cuda_probe(torch.cuda.device_count())
    assert torch.cuda.current_device() == device
    assert torch.ones(3, device="cuda").sum().item() == 3
