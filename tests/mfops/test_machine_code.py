"""What the compiler made of csrc/cuda in the build at hand: its machine code and resource report.

These are checks of this build, not figures; they need neither a GPU nor a CUDA toolkit.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import CUDA_HOME

from benchmarks.machine_code import listing
from benchmarks.machine_code.kernels import ARCH, KERNELS
from benchmarks.machine_code.table import DOCUMENT, ceilings, compiler, measured

ROOT = Path(__file__).parents[2]
OLDEST = "sm_80"
TYPES = ["float32", "tf32", "bf16", "f16"]  # in the order of csrc/cuda/common/types.h
TENSOR_CORE = {
    "tf32": "HMMA.1688.F32.TF32",
    "bf16": "HMMA.16816.F32.BF16",
    "f16": "HMMA.16816.F32",
}
REGISTERS = 64 * 1024  # of a multiprocessor
# By kind: how many operands `fill` brings (backward has two kinds of blocks), how many tiles
# `write_back` writes, how many other loads from global memory there are (g, the error's gradient).
MOVES = {"forward": (3, 1, 0), "backward": (8, 2, 2)}


class Kernel(NamedTuple):
    kind: str  # "forward", "backward", "round", "partials", "nmf_backward" or "persistent"
    type: str
    transposed: bool
    shared: bool  # one product for all images
    warps: int  # of a block
    blocks: int  # on a multiprocessor

    @classmethod
    def of(cls, mangled: str) -> Kernel | None:
        """The template arguments of a product kernel's mangled name; None for other kernels."""
        match = re.search(
            r"\d(forward|backward)_kernelILNS0_4TypeE(\d)ELb(\d)ELb(\d)E\w*Li(\d+)ELi(\d)EEEv",
            mangled,
        )
        if match is not None:
            kind, type_, transposed, shared, warps, blocks = match.groups()
            flags = transposed == "1", shared == "1"
            return cls(kind, TYPES[int(type_)], *flags, int(warps), int(blocks))
        match = re.search(
            r"\d(round|partials|nmf_backward|persistent)_kernelILNS0_4TypeE(\d)ELb(\d)E", mangled
        )
        if match is None:
            return None
        kind, type_, transposed = match.groups()
        warps = 16 if kind == "persistent" else 8
        return cls(kind, TYPES[int(type_)], transposed == "1", False, warps, 1)


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    extension = pytest.importorskip("mfops._C", reason="the extension was not built")
    if extension.build_info()["cuda"] is None:
        pytest.skip(f"no CUDA in this build: {extension.build_info()['cuda_missing']}")
    return extension


@pytest.fixture(scope="module")
def build(extension) -> Path:
    if listing.cuobjdump() is None:
        pytest.skip("no cuobjdump, neither on PATH nor in triton")
    return Path(extension.__file__)


@pytest.fixture(scope="module")
def resources(build) -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack and local memory by architecture and mangled name."""
    return {
        (arch, name): used
        for arch in listing.archs(build)
        for name, used in listing.resources(build, arch).items()
    }


def number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


@pytest.fixture(scope="module")
def arch(extension) -> str:
    """sm_90 where the build has it, else the next one before it, or else a later one."""
    archs = extension.build_info()["cuda_archs"]  # from old to new
    return ([arch for arch in archs if number(arch) <= number(ARCH)] or archs)[-1]


@pytest.fixture(scope="module")
def instructions(arch, build) -> dict[str, Counter[str]]:
    """By mangled name, how often every instruction occurs in one architecture's code.

    A persistent kernel needs clusters: before sm_90 it is empty.
    """
    code = listing.code(build, arch)
    return {
        name: Counter(ins.name for ins in own)
        for name, own in code.items()
        if number(arch) >= 90 or (kernel := Kernel.of(name)) is None or kernel.kind != "persistent"
    }


def test_every_kernel_is_there_for_every_architecture(extension, resources):
    names = {name for _, name in resources}
    archs = {arch for arch, _ in resources}
    assert archs == set(extension.build_info()["cuda_archs"])
    assert set(resources) == {(arch, name) for arch in archs for name in names}
    kernels = [kernel for name in names if (kernel := Kernel.of(name))]
    columns = set(product(TYPES, (False, True)))
    for kind in ("round", "partials", "nmf_backward"):
        assert {(k.type, k.transposed) for k in kernels if k.kind == kind} == columns
    persistent = {(k.type, k.transposed) for k in kernels if k.kind == "persistent"}
    assert persistent == {(t, transposed) for t, transposed in columns if t in ("bf16", "f16")}
    variants = set(product(TYPES, (False, True), (False, True)))
    for kind in ("forward", "backward"):
        assert {(k.type, k.transposed, k.shared) for k in kernels if k.kind == kind} == variants


# Two to sixteen registers, by architecture. What takes fewer, strips of half the width, took 1.6
# times as long on an H200, where it is four.
SPILLS = r"15backward_kernel\w+ELb0ELi128ELi64ELi128ELi8E"


def check_memory(resources: dict[tuple[str, str], dict[str, int]]) -> None:
    for key, used in resources.items():
        assert used["STACK"] <= (64 if re.search(SPILLS, key[1]) else 0), (key, used)
        assert used["LOCAL"] == 0, (key, used)


def check_registers(resources: dict[tuple[str, str], dict[str, int]]) -> None:
    for key, used in resources.items():
        kernel = Kernel.of(key[1])
        if kernel is not None:
            assert used["REG"] * 32 * kernel.warps * kernel.blocks <= REGISTERS, (key, used)


def test_kernels_spill_as_little_as_is_known_and_use_no_local_memory(resources):
    check_memory(resources)


def test_registers_leave_room_for_the_blocks_planned(resources):
    check_registers(resources)


@pytest.mark.parametrize("operation", ["reconstruct", "factorize"])
def test_the_oldest_gpus(operation, tmp_path):
    """Of one type: a build may be for newer ones alone, as that of .ci/run is."""
    if CUDA_HOME is None:
        pytest.skip("no CUDA toolkit")
    cubin, csrc = tmp_path / "oldest.cubin", ROOT / "csrc"
    source = csrc / "cuda" / "instantiations" / f"{operation}_bf16.cu"
    options = ["-std=c++20", "-O3", f"-arch={OLDEST}", f"-I{csrc}"]
    subprocess.run(
        [f"{CUDA_HOME}/bin/nvcc", *options, "-cubin", str(source), "-o", str(cubin)], check=True
    )
    resources = {(OLDEST, name): used for name, used in listing.resources(cubin, OLDEST).items()}
    assert len(resources) >= 10
    check_memory(resources)
    check_registers(resources)


def test_products_run_on_tensor_cores_and_ieee_float32_does_not(instructions):
    for name, counts in instructions.items():
        kernel = Kernel.of(name)
        if kernel is None:
            continue
        tensor = {instruction for instruction in counts if instruction.startswith("HMMA")}
        if kernel.type == "float32":
            assert not tensor, name
            assert counts["FFMA"] >= 16, name  # 4 x 4 accumulators, if no more
        else:
            allowed = {TENSOR_CORE[kernel.type]}
            if kernel.type == "f16" and kernel.kind in ("round", "partials"):
                allowed.add(TENSOR_CORE["tf32"])  # a softmax's range is too large
            assert tensor, name
            assert tensor <= allowed, (name, tensor)


@pytest.mark.parametrize("transposed", [True, False], ids=["channels_last", "contiguous"])
def test_features_move_128_bits_at_a_time(instructions, arch, transposed):
    """Lines of odd length too. One by one go the elements at the ends of those, steps beyond 1."""
    checked = set()
    for name, counts in instructions.items():
        kernel = Kernel.of(name)
        if kernel is None or kernel.transposed != transposed:
            continue
        checked.add(kernel.kind)
        if counts[TENSOR_CORE["bf16"]] or counts[TENSOR_CORE["f16"]]:
            assert any(i.startswith("LDSM") for i in counts), name
        if kernel.kind == "persistent":  # loads once, by way of registers
            assert any(i.startswith("LDG") and ".128" in i for i in counts), name
            assert any(i.startswith("STG") and ".128" in i for i in counts), name
            continue
        copies = {i for i in counts if i.startswith("LDGSTS")}
        assert copies, name
        assert all(".128" in i for i in copies), (name, copies)
        # Coefficients come and go one by one, sums two at a time.
        if kernel.kind not in MOVES:
            continue
        filled, written, others = MOVES[kernel.kind]
        loads = {i: n for i, n in counts.items() if re.match(r"LDG?\.", i)}
        assert sum(loads.values()) <= filled + others, (name, loads)
        assert any(i.startswith("STG") and ".128" in i for i in counts), name
        if kernel.type in ("bf16", "f16"):  # less than 16 bytes at a line's end, no fragments
            assert counts["LDS.U16"] <= 8 * written, name
            assert counts["STS.U16"] <= filled, name
    assert checked >= {"forward", "backward", "round", "partials", "nmf_backward"}
    assert ("persistent" in checked) == (number(arch) >= 90)


def test_memory_is_never_addressed_generically(instructions, arch):
    if number(arch) > number(ARCH):
        pytest.skip(f"ptxas makes some stores generic for {arch}; nothing older is in this build")
    for name, counts in instructions.items():
        if kernel := Kernel.of(name):
            generic = {i for i in counts if re.match(r"(LD|ST)(\.|$)", i)}
            if kernel.kind == "persistent":  # other blocks' shared memory is reached in this way
                generic -= {"LD.E.128", "ST.E.64"}
            assert not generic, (name, generic)


def test_tiles_cost_no_more_instructions_than_recorded(extension, build):
    archs = extension.build_info()["cuda_archs"]
    if ARCH not in archs:
        pytest.skip(f"no machine code for {ARCH} in this build, only for {', '.join(archs)}")
    document = (ROOT / DOCUMENT).read_text("utf-8")
    ours, release = compiler(build), re.search(r"ptxas \d+\.\d+", document)
    assert release is not None
    if not ours.startswith(release[0]):
        pytest.skip(f"instructions were recorded of {release[0]}, this build is by {ours}")
    recorded = ceilings(document)
    assert set(recorded) == {kernel.title for kernel in KERNELS}
    issued = {row.kernel.title: row.issued.total() for row in measured(build)}
    more = {
        title: (n, recorded[title]) for title, n in issued.items() if n > 1.05 * recorded[title]
    }
    assert not more, f"instructions, and those in {DOCUMENT}"
