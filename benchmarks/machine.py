"""The machine that a figure is from: its clock, its cache, its memory, its description."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import math
import os
import re
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

import mfops
from benchmarks.harness import Clock, EventClock, WallClock

CPU_CACHE = 32 * 2**20  # where Linux does not say
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


AUTOCAST = "bfloat16 autocast"


def network_dtype(device: str) -> str:
    """The arithmetic that networks run in: that of `Machine.autocast`."""
    return AUTOCAST if device == "cuda" else "float32"


class Machine:
    """What differs between a GPU and the CPU."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self.cuda = device == "cuda"
        self.threads = threads
        torch.set_num_threads(threads)
        if self.cuda:
            # What the baselines' users set: the fastest convolution is found at the first call.
            torch.backends.cudnn.benchmark = True
        else:
            keep_freed_memory()
        self.past_cache = 3 * self._cache_bytes()

    def clock(self) -> Clock:
        """A new one for each case: it counts that case's calls."""
        return EventClock() if self.cuda else WallClock()

    def _cache_bytes(self) -> int:
        if self.cuda:
            return torch.cuda.get_device_properties().L2_cache_size
        sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        kib = [int(path.read_text().strip().removesuffix("K")) for path in sizes]
        return 1024 * max(kib) if kib else CPU_CACHE

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16) if self.cuda else contextlib.nullcontext()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def sets(self, set_bytes: int) -> int:
        """How many sets of inputs to rotate, so that none is still in the cache at its turn."""
        return max(2, math.ceil(self.past_cache / set_bytes))

    @functools.cached_property
    def _reader(self) -> torch.Tensor:
        return torch.zeros(self.past_cache // 4, device=self.device)

    def empty_cache(self) -> None:
        """Reads more than the cache holds. Reads: what a write leaves there is written back later,
        in the time of the call that follows."""
        self._reader.sum()

    def release(self) -> bool:
        """Gives back memory that nothing holds any more; False where the GPU has broken down."""
        if not self.cuda:
            return True
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """Bytes by which the memory in use grew at most during the call, its results included.

        GPU: what torch's allocator was asked for. CPU: the process's resident set, by Linux's own
        high-water mark.
        """
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_stats()["requested_bytes.all.current"]
            call()
            return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        before = _status_kib("VmRSS")
        call()
        return 1024 * max(0, _status_kib("VmHWM") - before)

    def name(self) -> str:
        """The device as its maker calls it; for a CPU with the number of processors in use."""
        if self.cuda:
            return torch.cuda.get_device_name()
        return f"{processor()}, {self.threads} threads"

    def folder(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name().lower()).strip("-")

    def description(self) -> str:
        """The device, and for a GPU its driver and clocks."""
        if not self.cuda:
            return self.name()
        gpu = torch.cuda.get_device_properties()
        driver = output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        return (
            f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, "
            f"{gpu.total_memory / 2**30:.0f} GiB, L2 {gpu.L2_cache_size / 2**20:.0f} MiB, "
            f"driver {driver.splitlines()[0] if driver else 'unknown'}, {clocks()}"
        )


def keep_freed_memory() -> None:
    """Lets glibc hand freed memory to the next call, as GPU and caching allocators do.

    Else each large tensor is new to the process, and the kernel's work on its pages, more than the
    op's own, is in the figure. On a virtual machine it changes by the hour.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory needs Linux")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def output(command: list[str]) -> str:
    """What a command prints; nothing where it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def clocks() -> str:
    """nvidia-smi's answer while a kernel keeps the GPU awake."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,temperature.gpu,power.limit"
    torch.cuda._sleep(1_000_000_000)
    uuid = torch.cuda.get_device_properties().uuid
    answer = output(
        ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={fields}", "--format=csv,noheader"]
    )
    torch.cuda.synchronize()
    names = ("SM", "of at most", "memory", "of at most", "degrees C", "power limit")
    if not answer:
        return "nvidia-smi did not answer"
    return ", ".join(f"{n} {v.strip()}" for n, v in zip(names, answer.split(","), strict=False))


def extension() -> str:
    """How mfops's extension was built."""
    try:
        info = importlib.import_module("mfops._C").build_info()
    except ImportError:
        return "no extension"
    if info["cuda"] is None:
        return "extension without CUDA"
    return f"extension by nvcc {info['cuda']} for {', '.join(info['cuda_archs'])}"


def backends() -> str:
    """Which of mfops's backends run here."""
    return ", ".join(name for name, why in mfops.available_backends().items() if why is None)
