"""Triton's kernels without a GPU: in the interpreter, compiled ahead of time, and their choice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import check, make
from torch.torch_version import TorchVersion

from benchmarks.machine_code import listing
from mfops.backends import BACKENDS, TRITON_ERROR

if TRITON_ERROR is not None:
    pytest.skip(TRITON_ERROR, allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

import mfops.triton
from mfops.triton import configs
from mfops.triton.backward import backward_kernel
from mfops.triton.bases import means_kernel, ratios_kernel
from mfops.triton.common import Problem
from mfops.triton.configs import Config
from mfops.triton.finish import finish_kernel, nmf_backward_kernel
from mfops.triton.forward import forward_kernel
from mfops.triton.rounds import round_kernel

HERE = Path(__file__).parent
NEW_PTXAS = TorchVersion(triton.__version__) >= "3.9"
# The least shared memory a program may use: that of compute capability 8.6 and 8.9.
SHARED_MEMORY = 99 * 1024
KERNELS = (
    forward_kernel,
    backward_kernel,
    round_kernel,
    means_kernel,
    ratios_kernel,
    finish_kernel,
    nmf_backward_kernel,
)
KINDS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


INTERPRETED = ("test_backends.py", "test_factor_backends.py", "triton_interpreted.py")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """All files' tests at once, each in a process: Triton wants to be told about the interpreter
    before it is imported."""
    folder = tmp_path_factory.mktemp("interpreted")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = {}
    for file in INTERPRETED:
        with (folder / file).open("w") as output:
            running[file] = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "--tb=short", HERE / file],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
    yield lambda file: (running[file].wait(), (folder / file).read_text())
    for process in running.values():
        process.kill()


@pytest.mark.parametrize("file", INTERPRETED)
def test_in_the_interpreter(interpreted, file):
    returncode, output = interpreted(file)
    if returncode != 0:
        pytest.fail(output, pytrace=False)


class AheadOfTime:
    """Compiles what a call would launch, for a GPU that need not be there."""

    def __init__(self, monkeypatch):
        self.compiled = []
        monkeypatch.setattr(triton.runtime.driver, "_active", self)
        for kernel in KERNELS:
            module = sys.modules[kernel.__module__]
            monkeypatch.setattr(module, kernel.fn.__name__, self.instead_of(kernel))
            monkeypatch.setattr(module, "choose", self.choose, raising=False)
        self.arch, self.config = 80, 0  # None: every one

    def instead_of(self, kernel):
        class Warmup:
            def __getitem__(_, grid):
                def run(*arguments, **options):
                    # Triton's default for it changes from 3.9 to 3.10.
                    assert options["enable_fp_fusion"], kernel.fn.__name__
                    self.compiled.append(kernel.warmup(*arguments, grid=grid, **options))

                return run

        return Warmup()

    def choose(self, problem, traits, candidates, launch):
        if self.config is None:
            for config in candidates(problem)[1:]:
                launch(config)
            return candidates(problem)[0]
        return candidates(problem)[self.config]

    # What Triton asks its driver. Each architecture has kernels of its own, as each device has.
    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def __call__(self, shape, kind, channels_last, shared=(False, False)):
        """The compiled kernels of a forward and a backward pass."""
        batch, channels, rank, pixels = shape
        empty = self.empty(kind)
        x = empty(batch, pixels, channels).mT if channels_last else empty(batch, channels, pixels)
        y = empty(*([] if shared[0] else [batch]), channels, rank)
        z = empty(*([] if shared[1] else [batch]), rank, pixels)
        grad_mse = torch.empty((), device="meta")
        self.compiled.clear()
        tf32 = kind == "tf32"
        mfops.triton.reconstruct(x, y, z, tf32)
        upstream = torch.empty_like(x)
        mfops.triton.reconstruct_backward(upstream, grad_mse, x, y, z, True, True, True, tf32)
        assert len(self.compiled) == 2
        return self.compiled

    def rounds(self, shape, kind, channels_last, method):
        """The compiled kernels, each once, of three rounds, what follows them, and its gradient."""
        batch, channels, rank, pixels = shape
        empty = self.empty(kind)
        x = empty(batch, pixels, channels).mT if channels_last else empty(batch, channels, pixels)
        y0 = torch.empty(channels, rank, device="meta")
        grad_mse = torch.empty((), device="meta")
        self.compiled.clear()
        tf32 = kind == "tf32"
        if method == "nmf":
            y, z, z_scale, *_ = mfops.triton.factorize_reconstruct(x, y0, method, 3, tf32)
            mfops.triton.nmf_backward(torch.empty_like(x), grad_mse, x, y, z, z_scale, tf32)
        else:
            mfops.triton.factorize(x, y0, method, 3, tf32)
        return list({kernel.hash: kernel for kernel in self.compiled}.values())

    def empty(self, kind):
        dtype = KINDS.get(kind, torch.float16)
        return lambda *size: torch.empty(size, dtype=dtype, device="meta")


@pytest.fixture
def ahead_of_time(monkeypatch):
    return AheadOfTime(monkeypatch)


def accesses(kernel, what: str) -> tuple[int, int]:
    """Of global memory in PTX ("ld" or "st"): those of 16 bytes, and smaller ones."""
    every = re.findall(rf"{what}\.global[.\w:]*", kernel.asm["ptx"])
    wide = [a for a in every if re.search(r"\.v4\.b32|\.v2\.b64", a)]
    return len(wide), len(every) - len(wide)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", [*KINDS, "float16"])
@pytest.mark.parametrize(
    ("channels_last", "pixels"), [(False, 4096), (False, 1089), (True, 1089)], ids=str
)
def test_compiles_ahead_of_time(ahead_of_time, arch, kind, channels_last, pixels):
    ahead_of_time.arch = arch
    kernels = forward, backward = ahead_of_time((2, 512, 64, pixels), kind, channels_last)
    for kernel in kernels:
        assert kernel.metadata.shared <= SHARED_MEMORY
        tensor_cores = re.search(r"mma\.sync|wgmma\.mma_async", kernel.asm["ptx"])
        assert bool(tensor_cores) == (kind != "float32")
        # Offsets are 64 bit: more than 2^31 elements.
        assert not re.search(r"arith\.muli .*: (tensor<.*x)?i32", kernel.asm["ttir"])
    if channels_last or pixels % 16 == 0:  # rows of X and X' are aligned
        wide, other = accesses(forward, "st")
        assert wide > 0
        assert other == 1  # a part of the error
    if pixels % 16 == 0:  # and those of Z
        assert accesses(forward, "ld")[1] == 0
        assert accesses(backward, "ld")[1] == 2  # the gradient of the error, in two places


def spilled(kernel, folder: Path) -> int:
    """Bytes of registers that the kernel keeps in memory."""
    machine_code = folder / "kernel.cubin"
    machine_code.write_bytes(kernel.asm["cubin"])
    usage = listing.dump(machine_code, "--dump-resource-usage")
    assert "STACK:" in usage
    return sum(int(n) for n in re.findall(r"STACK:(\d+)", usage))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", [*KINDS, "float16"])
@pytest.mark.parametrize("method", ["nmf", "vq"])  # vq does more than em, and what cd does
def test_rounds_compile_ahead_of_time(ahead_of_time, tmp_path, arch, kind, method):
    ahead_of_time.arch = arch
    kernels = ahead_of_time.rounds((2, 512, 64, 4096), kind, False, method)
    assert len(kernels) == {"nmf": 5, "vq": 3}[method]  # nmf: two kinds of rounds, vq also
    for kernel in kernels:
        assert kernel.metadata.shared <= SHARED_MEMORY
        tensor_cores = re.search(r"mma\.sync|wgmma\.mma_async", kernel.asm["ptx"])
        assert bool(tensor_cores) == (kind != "float32" and kernel.name != "means_kernel")
        assert not re.search(r"arith\.muli .*: (tensor<.*x)?i32", kernel.asm["ttir"])
        # Two registers, by triton 3.9's ptxas alone.
        known = NEW_PTXAS and (method, kind, arch) == ("vq", "float32", 90)
        assert spilled(kernel, tmp_path) <= (8 if known else 0)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_no_configuration_of_nmfs_gradient_spills(ahead_of_time, tmp_path, arch, kind):
    """On odd grids, too."""
    ahead_of_time.arch, ahead_of_time.config = arch, None
    empty = ahead_of_time.empty(kind)
    for pixels in (4096, 1089):
        x, z = empty(2, 512, pixels), empty(2, 64, pixels)
        y, grad_mse = (torch.empty(size, device="meta") for size in [(2, 512, 64), ()])
        mfops.triton.nmf_backward(x, grad_mse, x, y, z, z)
    assert len(ahead_of_time.compiled) == 4
    for kernel in ahead_of_time.compiled:
        assert spilled(kernel, tmp_path) == 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_no_configuration_for_odd_grids_spills(ahead_of_time, tmp_path, channels_last):
    """In bfloat16 on sm_90, where nmf's rounds may keep a few bytes in memory."""
    ahead_of_time.arch, ahead_of_time.config = 90, None
    empty = ahead_of_time.empty("bfloat16")
    x = empty(2, 1089, 512).mT if channels_last else empty(2, 512, 1089)
    y, z, grad_mse = empty(2, 512, 64), empty(2, 64, 1089), torch.empty((), device="meta")
    mfops.triton.reconstruct(x, y, z)
    mfops.triton.reconstruct_backward(x, grad_mse, x, y, z, True, True, True)
    kernels = list(ahead_of_time.compiled)
    kernels += ahead_of_time.rounds((2, 512, 64, 1089), "bfloat16", channels_last, "em")
    for kernel in {kernel.hash: kernel for kernel in kernels}.values():
        assert spilled(kernel, tmp_path) == 0, (kernel.name, kernel.metadata.num_warps)


@pytest.mark.parametrize("channels_last", [False, True])
def test_rounds_on_odd_grids(ahead_of_time, channels_last):
    """They fit, and grids and batches share kernels."""
    hashes = set()
    for batch, pixels in [(2, 1089), (5, 129 * 97)]:
        kernels = ahead_of_time.rounds((batch, 512, 64, pixels), "bfloat16", channels_last, "nmf")
        hashes.add(tuple(kernel.hash for kernel in kernels))
        for kernel in kernels:
            assert kernel.metadata.shared <= SHARED_MEMORY
    assert len(hashes) == 1


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["nmf", "vq"])
def test_rounds_with_more_bases_than_a_program_holds(ahead_of_time, kind, method):
    for kernel in ahead_of_time.rounds((2, 512, 300, 4096), kind, False, method):
        assert kernel.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [128, 256, 300])
def test_more_bases_fit_the_smallest_gpu(ahead_of_time, kind, rank):
    for kernel in ahead_of_time((2, 512, rank, 4096), kind, channels_last=False):
        assert kernel.metadata.shared <= SHARED_MEMORY


def test_no_kernel_for_each_size(ahead_of_time):
    """Grids and batches share kernels, those with rows of a multiple of 16 apart from others."""
    for channels_last in (False, True):
        forward, backward = set(), set()
        for batch, pixels in [(2, 1089), (3, 33 * 35), (16, 65 * 65), (5, 129 * 97)]:
            compiled = ahead_of_time((batch, 512, 64, pixels), "bfloat16", channels_last)
            forward.add(compiled[0].hash)
            backward.add(compiled[1].hash)
        assert len(forward) == 1
        # Gradients of large problems are summed in float32 partials.
        assert len(backward) <= 2


CASE = torch.zeros(2, 30, 50), torch.zeros(30, 7), torch.zeros(7, 50)


def problem(pixels: int = 50) -> Problem:
    x, y, z = CASE
    return Problem.of(x.repeat(1, 1, 9)[..., :pixels], y, z.repeat(1, 9)[..., :pixels], tf32=False)


@pytest.fixture
def timed(monkeypatch):
    """The configurations timed so far; the second is the fastest."""
    seen = []

    def milliseconds(launch, config):
        seen.append(config)
        return 1.0 if config == CONFIGS[1] else 2.0

    monkeypatch.setattr(configs, "_chosen", {})
    monkeypatch.setattr(configs, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return seen


CONFIGS = [Config(32, 32, 16, 4, 2), Config(64, 32, 16, 4, 2), Config(64, 64, 16, 4, 2)]


def choose(pixels: int = 50, traits: tuple = ("forward",)) -> Config:
    return configs.choose(problem(pixels), traits, lambda _: CONFIGS, launch=None)


def test_a_choice_is_timed_once_for_each_class_of_shapes(timed):
    assert choose() == CONFIGS[1]
    assert timed == CONFIGS
    for pixels in (49, 50, 51, 60):  # between the same powers of four
        assert choose(pixels) == CONFIGS[1]
    assert timed == CONFIGS
    choose(300)
    choose(48)  # a multiple of 16
    choose(traits=("backward",))
    assert timed == CONFIGS * 4


def test_nothing_is_timed_during_capture_and_nothing_kept(timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == CONFIGS[0]
    monkeypatch.undo()
    assert timed == []
    assert configs._chosen == {}


def test_deterministic_algorithms_depend_on_no_timing(timed):
    torch.use_deterministic_algorithms(True)
    try:
        assert choose() == CONFIGS[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert timed == []


@pytest.mark.gpu
def test_tunes_on_a_gpu(monkeypatch):
    monkeypatch.setattr(configs, "_chosen", {})
    case = make((2, 70, 20, 1089), "contiguous", torch.bfloat16, (False, False), "cuda")
    check(BACKENDS["triton"], case, torch.bfloat16)
    assert len(configs._chosen) == 3  # X' with the error, the error alone, the gradients
    check(BACKENDS["triton"], case, torch.bfloat16)
    assert len(configs._chosen) == 3
