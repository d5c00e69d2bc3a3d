"""Made-up rows of every benchmark, for tests of what is written from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import bench_factorizers, rows
from benchmarks.bench_op import Problem
from benchmarks.kernels import BOTH, FORWARD, LAYOUTS, PASSES, Case
from benchmarks.schema import (
    ACCURACY,
    ACCURACY_COST,
    ATTENTION,
    BACKENDS,
    BEST,
    CEILINGS,
    COMPILE,
    CONTEXTS,
    COPY,
    EAGER,
    FACTORIZERS,
    HOST,
    MFOPS,
    MODELS,
    NATIVE,
    OP,
    REFERENCE,
    SDPA,
    TRAINING,
    TRITON,
    Benchmark,
)

CPU, GPU = "a-cpu-2-threads", "a-gpu"
SHAPE = (4, 2048, 64, 1089)
RUN = {
    "run": "2026-11-24T08:00:00Z",
    "commit": "abc1234",
    "environment": "",
    "command": "python -m pytest benchmarks",
    "device": "A CPU, 2 threads",
    "threads": "2",
    "versions": "Python 3.11.7, torch 2.14.1",
    "built": "extension without CUDA; backends: native, reference",
}


def append(benchmark: Benchmark, folder: Path, new: list[dict[str, Any]]) -> Path:
    """Appends rows, and the runs that they are of."""
    runs: dict[tuple[str, ...], str] = {}
    own = []
    for row in new:
        of = {column: row.get(column, "") for column in rows.PROVENANCE}
        key = tuple(of.values())
        runs[key] = runs.get(key) or rows.add_run(folder, of)
        rest = {column: value for column, value in row.items() if column not in of}
        own.append(rest | {"run": runs[key]})
    return rows.append(benchmark, folder, own)


def timed(seconds: float, **over: float) -> dict[str, Any]:
    """A time with quartiles 10 % below and above, and ratios over bases."""
    return {
        "rounds": 10,
        "median_s": seconds,
        "q1_s": 0.9 * seconds,
        "q3_s": 1.1 * seconds,
        "late": 0,
        **{f"over_{base.replace('_', ' ')}": ratio for base, ratio in over.items()},
    }


def case(
    benchmark: Benchmark, columns: dict[str, Any], seconds: dict[str, float], **run: Any
) -> list[dict[str, Any]]:
    """The rows of baselines that take so many seconds."""
    return [
        {
            **RUN,
            **columns,
            "baseline": baseline,
            **timed(own, **{b: own / seconds[b] for b in benchmark.bases if b in seconds}),
            **run,
        }
        for baseline, own in seconds.items()
    ]


def op_case(
    problem: Problem, which: str, seconds: dict[str, float], **more: Any
) -> list[dict[str, Any]]:
    """Baselines' extra memory is a tenth of X, ours a thousandth."""
    x, floor = problem.x_bytes(), problem.floor_bytes(which)
    flops = 2 * problem.shape[0] * problem.shape[1] * problem.shape[2] * problem.shape[3]
    found = case(OP, Case(problem, which).columns(), seconds)
    for row in found:
        row |= {"x_bytes": x, "floor_bytes": floor, **more}
        if row["baseline"] != COPY:
            ours = row["baseline"] == NATIVE
            row |= {"flops": flops * (1 if which == FORWARD else 3), "peak_bytes": 2 * x}
            row |= {"extra_bytes": x // (1000 if ours else 10)}
            row |= {"moved_bytes": floor if ours else 3 * floor}
    return found


def op(dtype: str = "float32", shapes: tuple = (SHAPE,), **more: Any) -> list[dict[str, Any]]:
    found = []
    for shape in shapes:
        for layout in LAYOUTS:
            for factors in ("per image", "shared"):
                problem = Problem(shape, dtype, layout, factors)
                for place, which in enumerate(PASSES, start=1):
                    seconds = {NATIVE: 0.007, EAGER: 0.035, BEST: 0.014, COMPILE: 0.0105}
                    seconds = {k: place * v for k, v in (seconds | {COPY: 0.0056}).items()}
                    found += op_case(problem, which, seconds, **more)
                    skip = Case(problem, which).columns() | {"baseline": TRITON, **RUN, **more}
                    found.append(skip | {"skipped": "backend 'triton' cannot run this call"})
    return found


def factorizers(
    dtype: str = "float32",
    shapes: tuple = ((4, 512, 64, 1089),),
    ours: float | None = 0.02,
    **more: Any,
) -> list[dict[str, Any]]:
    """Ours in so many seconds, or skipped; the published lines take 0.1 and twice X, at least."""
    found = []
    for shape in shapes:
        for layout in LAYOUTS:
            for method, passes in bench_factorizers.PASSES.items():
                problem = bench_factorizers.Problem(shape, dtype, layout, method)
                for place, which in enumerate(passes, start=1):
                    columns = Case(problem, which).columns()
                    seconds = {EAGER: 0.1, BEST: 0.08, COMPILE: 0.05, COPY: 0.004}
                    seconds = ({} if ours is None else {NATIVE: ours}) | seconds
                    seconds = {baseline: place * own for baseline, own in seconds.items()}
                    for row in case(FACTORIZERS, columns, seconds):
                        row |= {
                            "x_bytes": problem.x_bytes(),
                            "floor_bytes": problem.floor_bytes(which),
                        }
                        if row["baseline"] != COPY:
                            sparing = row["baseline"] == NATIVE
                            row |= {"peak_bytes": problem.x_bytes() * (1 if sparing else 2 * place)}
                            row |= {"extra_bytes": 1000, "moved_bytes": problem.floor_bytes(which)}
                        found.append(row | more)
                    for baseline in (TRITON,) if ours else (NATIVE, TRITON):
                        why = f"backend '{baseline.split()[1]}' cannot run this call: no kernels"
                        found.append(
                            {**RUN, **columns, "baseline": baseline, "skipped": why} | more
                        )
    return found


CONTEXT_COSTS = {  # seconds, parameters, FLOPs
    "mf": (0.06, 5_000_000, 10.5e9),
    "em": (0.05, 1_200_000, 2.6e9),
    "aspp": (0.10, 15_500_000, 33.3e9),
    "aspp_separable": (0.04, 3_600_000, 7.1e9),
    "none": (0.01, 525_000, 1.1e9),
}
NETWORK_COSTS = {
    "mfnet": (0.5, 29_738_997, 122.26e9),
    "deeplabv3plus": (0.8, 40_352_181, 144.39e9),
    "emanet": (0.4, 34_657_621, 92.95e9),
    "smp DeepLabV3Plus": (0.35, 26_678_000, 73.6e9),
    "smp PSPNet": (0.15, 24_300_000, 23.3e9),
    "smp FPN": (0.3, 26_100_000, 63.0e9),
    "smp Unet": (0.45, 32_500_000, 85.7e9),
}
SCORES = {  # of the seeds 0, 1, 2
    "mf": (0.60, 0.62, 0.64),
    "em": (0.61, 0.62, 0.63),
    "aspp": (0.65, 0.66, 0.67),
    "aspp_separable": (0.645, 0.655, 0.65),
    "none": (0.55, 0.56, 0.60),
}


def contexts() -> list[dict[str, Any]]:
    found = []
    for side in (33, 65):
        for which in (FORWARD, BOTH):
            columns = {"in_channels": 2048, "out_channels": 256, "size": f"{side}x{side}"}
            columns |= {"batch": 1, "dtype": "float32", "pass": which}
            scale = (side / 33) ** 2 * (1 if which == FORWARD else 3)
            seconds = {name: scale * cost[0] for name, cost in CONTEXT_COSTS.items()}
            for row in case(CONTEXTS, columns, seconds, setting="channels_last"):
                _, parameters, flops = CONTEXT_COSTS[row["baseline"]]
                row |= {"parameters": parameters, "flops": round(flops * scale)}
                found.append(row | {"peak_bytes": 2**24})
    return found


def models() -> list[dict[str, Any]]:
    found = []
    for which, batch in (("inference", 1), ("training", 2)):
        columns = {"backbone": "resnet50", "size": "513x513", "batch": batch}
        columns |= {"dtype": "float32", "pass": which}
        scale = 1 if which == "inference" else 6
        seconds = {name: scale * cost[0] for name, cost in NETWORK_COSTS.items()}
        for row in case(MODELS, columns, seconds, setting="channels_last", input="513x513"):
            _, parameters, flops = NETWORK_COSTS[row["baseline"]]
            row |= {"images_per_s": batch / row["median_s"], "peak_bytes": 2**29}
            found.append(row | {"parameters": parameters, "flops": round(flops)})
        skip = {**RUN, **columns, "baseline": "smp UPerNet"}
        found.append(skip | {"skipped": "segmentation_models_pytorch not installed"})
    return found


def backends() -> list[dict[str, Any]]:
    columns = {"backbone": "resnet50", "size": "513x513", "batch": 1, "dtype": "bfloat16 autocast"}
    columns |= {"pass": "inference", "network": "emanet"}
    return case(BACKENDS, columns, {MFOPS: 0.2, REFERENCE: 0.3}, setting="contiguous")


def training() -> list[dict[str, Any]]:
    columns = {"data": "camvid", "backbone": "resnet18", "size": "360x480", "batch": 8}
    columns |= {"precision": "32-true", "workers": 1}
    found = []
    for row in case(TRAINING, columns, {"mfnet": 1.0, "deeplabv3plus": 1.6, "emanet": 0.8}):
        step = row["median_s"]
        parts = {"loader": 0.1, "forward": 0.3, "backward": 0.5, "optimizer": 0.08, "other": 0.02}
        found.append(
            {**row, "images_per_s": 8 / step, **{f"{k}_s": v * step for k, v in parts.items()}}
        )
    return found


def accuracy(**flags: str) -> list[dict[str, Any]]:
    columns = {"data": "camvid", "recipe": "camvid", "flags": "", **flags}
    return [
        {
            **RUN,
            **columns,
            **{
                "baseline": baseline,
                "seed": seed,
                "network": "deeplabv3plus",
                "backbone": "resnet18",
            },
            **{"size": "360x480", "epochs": 40, "parameters": 16_000_000, "best_epoch": 38},
            **{"flops": round(1e10 + CONTEXT_COSTS[baseline][2]), "best_mIoU": miou + 0.01},
            **{"mIoU": miou, "fwIoU": miou + 0.2, "accuracy": miou + 0.25},
        }
        for baseline, scores in SCORES.items()
        for seed, miou in enumerate(scores)
    ]


def accuracy_cost(**flags: str) -> list[dict[str, Any]]:
    columns = {"data": "camvid", "recipe": "camvid", "flags": "", **flags}
    columns |= {"size": "360x480", "dtype": "float32"}
    seconds = {baseline: 0.1 + cost[0] for baseline, cost in CONTEXT_COSTS.items()}
    return case(ACCURACY_COST, columns, seconds)


def ceilings(*dtypes: str) -> list[dict[str, Any]]:
    found = []
    for dtype in dtypes:
        own = case(CEILINGS, {"dtype": dtype}, {COPY: 0.04, "matmul": 0.1})
        found += [row | {"rate": rate} for row, rate in zip(own, (1.3e10, 1.7e11), strict=True)]
    return found


def host() -> list[dict[str, Any]]:
    found = []
    for mode in ("no gradients", "gradients wanted"):
        columns = {"shape": "2 64 16 100", "dtype": "float32", "mode": mode}
        found += case(HOST, columns, {"mfops": 2e-5, EAGER: 2.5e-5})
    return found


def attention() -> list[dict[str, Any]]:
    columns = {"operation": "gather", "shape": "8 256 32 1600", "dtype": "float32"}
    columns |= {"layout": "contiguous", "pass": FORWARD}
    return case(ATTENTION, columns, {MFOPS: 2e-3, SDPA: 5e-3})


def write(results: Path) -> Path:
    """Rows of every benchmark, from a CPU, and of the op from a GPU; returns the CPU's folder."""
    cpu, gpu = results / CPU, results / GPU
    append(CEILINGS, cpu, ceilings("float32"))
    append(OP, cpu, op())
    append(FACTORIZERS, cpu, factorizers())
    append(HOST, cpu, host())
    append(ATTENTION, cpu, attention())
    append(CONTEXTS, cpu, contexts())
    append(MODELS, cpu, models())
    append(BACKENDS, cpu, backends())
    append(TRAINING, cpu, training())
    append(ACCURACY, cpu, accuracy())
    append(ACCURACY_COST, cpu, accuracy_cost())
    append(OP, gpu, op("bfloat16", device="A GPU, 80 GiB"))
    return cpu
