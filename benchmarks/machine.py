"""The GPU that a figure is from, or the CPU of a trial: its clock, its cache, its description."""

from __future__ import annotations

import importlib
import re

import torch

import mfops
from benchmarks.harness import EventClock, WallClock, output, provenance


class Machine:
    """What differs between a GPU and a trial on the CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cuda = device == "cuda"
        self.clock = EventClock() if self.cuda else WallClock()
        cache = torch.cuda.get_device_properties().L2_cache_size if self.cuda else 2**16
        self.past_cache = 3 * cache
        self._reader = torch.zeros(self.past_cache // 4, device=device)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

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


def environment(machine: Machine) -> dict[str, str]:
    """The GPU and what the extension and Triton were."""
    of = provenance()
    of["float32 products"] = torch.get_float32_matmul_precision()
    of["backends"] = ", ".join(f"{k}: {v or 'runs'}" for k, v in mfops.available_backends().items())
    try:
        info = importlib.import_module("mfops._C").build_info()
        built = f"nvcc {info['cuda']}, {', '.join(info['cuda_archs'])}"
        of["extension"] = f"no CUDA: {info['cuda_missing']}" if info["cuda"] is None else built
    except ImportError:
        of["extension"] = "not built"
    try:
        of["triton"] = importlib.import_module("triton").__version__
    except ImportError:
        of["triton"] = "not installed"
    if not machine.cuda:
        return of
    gpu = torch.cuda.get_device_properties()
    driver = output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {
        "GPU": f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, "
        f"{gpu.total_memory / 2**30:.0f} GiB, L2 {gpu.L2_cache_size / 2**20:.0f} MiB",
        "driver": driver.splitlines()[0] if driver else "unknown",
        "CUDA of torch": str(torch.version.cuda),
        "clocks before": clocks(),
        **of,
    }


def folder_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
