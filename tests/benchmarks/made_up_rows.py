"""Made-up rows of every benchmark, for tests of what is written from them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import bench_factorizers, bench_op, rows
from benchmarks.kernels import BACKWARD, BOTH, FORWARD, Case
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
    DEPLOYMENT,
    EAGER,
    FACTORIZERS,
    HOST,
    MFOPS,
    MODELS,
    NATIVE,
    OP,
    PYTORCH,
    REFERENCE,
    SDPA,
    TRAINING,
    TRITON,
    Benchmark,
)

CPU, GPU = "a-cpu-2-threads", "a-gpu"
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
NEWER = {"run": "2026-11-25T08:00:00Z", "commit": "def5678"}
NOT_MEASURED = {"median_s": None, "q1_s": None, "q3_s": None}
Row = dict[str, Any]


def append(benchmark: Benchmark, folder: Path, new: Iterable[Row]) -> Path:
    """Appends rows, and the runs that they are of: RUN, but for what a row says of it."""
    own, runs = [], {}
    for row in new:
        of = tuple(row.get(key, value) for key, value in RUN.items())
        if of not in runs:
            runs[of] = rows.add_run(folder, dict(zip(RUN, of, strict=True)))
        own.append({key: value for key, value in row.items() if key not in RUN} | {"run": runs[of]})
    return rows.append(benchmark, folder, own)


def timed(
    benchmark: Benchmark, columns: Row, seconds: dict[str, float], scale: float = 1, **more: Any
) -> list[Row]:
    """The rows of baselines that take so many seconds, with quartiles 10 % below and above."""
    return [
        {
            **columns,
            "baseline": baseline,
            "rounds": 10,
            "median_s": scale * own,
            "q1_s": 0.9 * scale * own,
            "q3_s": 1.1 * scale * own,
            "late": 0,
            **{f"over_{b}": own / seconds[b] for b in benchmark.bases if b in seconds},
            **more,
        }
        for baseline, own in seconds.items()
    ]


def operation(benchmark: Benchmark, case: Case, seconds: dict[str, float]) -> list[Row]:
    """Ours moves what it has to and a thousandth of X besides; the others need twice the memory."""
    x, floor = case.problem.x_bytes(), case.problem.floor_bytes(case.which)
    passes = {FORWARD: 1, BACKWARD: 2, BOTH: 3}[case.which]
    found = timed(benchmark, case.columns(), seconds, passes)
    for row in found:
        row |= {"x_bytes": x, "floor_bytes": floor}
        if row["baseline"] != COPY:
            ours = row["baseline"] == NATIVE
            row |= {"peak_bytes": x if ours else 2 * x, "extra_bytes": x // (1000 if ours else 10)}
            row |= {"moved_bytes": floor if ours else 3 * floor, "flops": 1e9 * passes}
    for baseline in (name for name in (NATIVE, TRITON) if name not in seconds):
        why = f"backend '{baseline.split()[1]}' cannot run this call"
        found.append({**case.columns(), "baseline": baseline, "skipped": why})
    return found


OP_SECONDS = {NATIVE: 0.007, EAGER: 0.035, BEST: 0.014, COMPILE: 0.0105, COPY: 0.0056}
FACTORIZER_SECONDS = {NATIVE: 0.02, EAGER: 0.1, BEST: 0.08, COMPILE: 0.05, COPY: 0.004}


def op(kind: str = "cpu", dtype: str = "float32", **more: Any) -> list[Row]:
    cases = [c for c in bench_op.cases(kind, small=False) if c.problem.dtype == dtype]
    return [row | more for case in cases for row in operation(OP, case, OP_SECONDS)]


def factorizers(
    kind: str = "cpu", dtype: str = "float32", ours: float | None = 0.02, **more: Any
) -> list[Row]:
    cases = [c for c in bench_factorizers.cases(kind, small=False) if c.problem.dtype == dtype]
    seconds = FACTORIZER_SECONDS | {NATIVE: ours}
    seconds = {baseline: own for baseline, own in seconds.items() if own}
    return [row | more for case in cases for row in operation(FACTORIZERS, case, seconds)]


# Seconds, parameters, FLOPs.
CONTEXT_COSTS = {
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
    "smp PSPNet": (0.15, 24_300_000, 23.3e9),
}
SCORES = {  # of the seeds 0, 1, 2
    "mf": (0.60, 0.62, 0.64),
    "em": (0.61, 0.62, 0.63),
    "aspp": (0.65, 0.66, 0.67),
    "aspp_separable": (0.645, 0.655, 0.65),
    "none": (0.55, 0.56, 0.60),
}
RECIPE = {"data": "camvid", "recipe": "camvid", "flags": ""}


def costing(
    benchmark: Benchmark, columns: Row, costs: dict[str, tuple], scale: float, **more: Any
) -> list[Row]:
    found = timed(benchmark, columns, {name: own[0] for name, own in costs.items()}, scale)
    for row in found:
        _, row["parameters"], row["flops"] = costs[row["baseline"]]
        row |= {"setting": "channels_last", "peak_bytes": 2**24, **more}
    return found


def contexts() -> list[Row]:
    place = {"in_channels": 2048, "out_channels": 256, "batch": 1, "dtype": "float32"}
    return [
        row
        for size in ("33x33", "65x65")
        for which, scale in ((FORWARD, 1), (BOTH, 3))
        for row in costing(CONTEXTS, place | {"size": size, "pass": which}, CONTEXT_COSTS, scale)
    ]


def models() -> list[Row]:
    found = []
    for which, batch, scale in (("inference", 1, 1), ("training", 2, 6)):
        columns = {"backbone": "resnet50", "size": "513x513", "batch": batch}
        columns |= {"dtype": "float32", "pass": which}
        more = {"input": "513x513", "images_per_s": batch / scale}
        found += costing(MODELS, columns, NETWORK_COSTS, scale, **more)
        why = "segmentation_models_pytorch not installed"
        found.append({**columns, "baseline": "smp UPerNet", "skipped": why})
    return found


def accuracy(**columns: Any) -> list[Row]:
    return [
        {
            **RECIPE,
            **{"baseline": baseline, "seed": seed, "network": "deeplabv3plus"},
            **{"backbone": "resnet18", "size": "360x480", "epochs": 40, "parameters": 16_000_000},
            **{"flops": 1e10 + CONTEXT_COSTS[baseline][2]},
            **{"mIoU": miou, "fwIoU": miou + 0.2, "accuracy": miou + 0.25},
            **columns,
        }
        for baseline, scores in SCORES.items()
        for seed, miou in enumerate(scores)
    ]


def accuracy_cost(scale: float = 1, **columns: str) -> list[Row]:
    columns = {**RECIPE, "size": "360x480", "dtype": "float32", **columns}
    seconds = {baseline: 0.1 + cost[0] for baseline, cost in CONTEXT_COSTS.items()}
    return timed(ACCURACY_COST, columns, seconds, scale)


def ceilings() -> list[Row]:
    found = timed(CEILINGS, {"dtype": "float32"}, {COPY: 0.04, "matmul": 0.1})
    return [row | {"rate": rate} for row, rate in zip(found, (1.3e10, 1.7e11), strict=True)]


def host() -> list[Row]:
    columns = {"shape": "2 64 16 100", "dtype": "float32"}
    seconds = {MFOPS: 2e-5, EAGER: 2.5e-5}
    modes = ("no gradients", "gradients wanted")
    return [row for mode in modes for row in timed(HOST, columns | {"mode": mode}, seconds)]


def attention() -> list[Row]:
    columns = {"operation": "gather", "shape": "8 256 32 1600", "dtype": "float32"}
    columns |= {"layout": "contiguous", "pass": FORWARD}
    return timed(ATTENTION, columns, {MFOPS: 2e-3, SDPA: 5e-3})


def backends() -> list[Row]:
    columns = {"backbone": "resnet50", "size": "513x513", "batch": 1, "dtype": "bfloat16 autocast"}
    columns |= {"pass": "inference", "network": "emanet"}
    return timed(BACKENDS, columns, {MFOPS: 0.2, REFERENCE: 0.3}, setting="contiguous")


def deployment() -> list[Row]:
    columns = {"network": "camvid_light", "size": "360x480"}
    return timed(DEPLOYMENT, columns, {PYTORCH: 0.05, "onnx": 0.02})


def training() -> list[Row]:
    columns = {"data": "camvid", "backbone": "resnet18", "size": "360x480", "batch": 8}
    columns |= {"precision": "32-true", "workers": 1}
    shares = {"loader": 0.1, "forward": 0.3, "backward": 0.5, "optimizer": 0.08, "other": 0.02}
    return [
        row
        | {f"{part}_s": share * row["median_s"] for part, share in shares.items()}
        | {"images_per_s": 8 / row["median_s"]}
        for row in timed(TRAINING, columns, {"mfnet": 1.0, "deeplabv3plus": 1.6, "emanet": 0.8})
    ]


def write(results: Path) -> None:
    """Rows of every benchmark, from a CPU, and of the op from a GPU."""
    found = {CEILINGS: ceilings, OP: op, FACTORIZERS: factorizers, HOST: host}
    found |= {ATTENTION: attention, CONTEXTS: contexts, MODELS: models, BACKENDS: backends}
    found |= {
        DEPLOYMENT: deployment,
        TRAINING: training,
        ACCURACY: accuracy,
        ACCURACY_COST: accuracy_cost,
    }
    for benchmark, make in found.items():
        append(benchmark, results / CPU, make())
    append(OP, results / GPU, op(dtype="bfloat16", device="A GPU, 80 GiB"))
