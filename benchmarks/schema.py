"""The benchmarks, and the columns of their rows: a bench_*.py file each."""

from __future__ import annotations

from dataclasses import dataclass

# `late`: how many of the case's calls, all baselines', were not queued when a GPU came to them.
TIMES = ("rounds", "median_s", "q1_s", "q3_s", "late")


@dataclass(frozen=True)
class Benchmark:
    """What a file of rows holds.

    `case` names the columns that say what is compared (rows with equal ones stand side by side),
    `measures` the numbers that are measured beside the time, `texts` what else is told. Ratios are
    over each of `bases`.
    """

    name: str
    case: tuple[str, ...]
    measures: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    timed: bool = True

    @property
    def ratios(self) -> tuple[str, ...]:
        return tuple(f"over_{base}" for base in self.bases)

    @property
    def numbers(self) -> tuple[str, ...]:
        times = (*TIMES, *self.ratios) if self.timed else ()
        return (*times, *self.measures)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.case, "baseline", "setting", *self.numbers, *self.texts, "skipped", "run")


# Baselines of the op.
NATIVE, TRITON, COPY = "mfops native", "mfops triton", "copy"
EAGER, BEST = "eager, as published", "eager, at its best"
COMPILE, COMPILE_GRAPHS = "compile, max-autotune-no-cudagraphs", "compile, max-autotune"

MFOPS = "mfops"  # whichever backend the automatic choice takes
REFERENCE = "mfops reference"
# Baselines of gather and distribute. A bias on the scores: as a mask, or as the key of a channel.
SDPA = "scaled_dot_product_attention"
SDPA_CHANNEL = f"{SDPA}, bias as a channel"

# Our network, and how the names of its variants begin.
LIGHT, VARIANT = "mfnet_light", "light: "

# What the machine can do at most: bytes per second of a copy, FLOPs per second of a product.
CEILINGS = Benchmark("ceilings", case=("dtype",), measures=("rate",))

OP = Benchmark(
    "op",
    case=("shape", "dtype", "layout", "factors", "pass"),
    measures=("peak_bytes", "extra_bytes", "x_bytes", "floor_bytes", "moved_bytes", "flops"),
    bases=(NATIVE, TRITON, EAGER, COPY),
)

# From X to X' by the methods that find the factors on each image.
FACTORIZERS = Benchmark(
    "factorizers",
    case=("method", "steps", "shape", "dtype", "layout", "pass"),
    measures=OP.measures,
    bases=(NATIVE, TRITON, EAGER, BEST, COMPILE, COPY),
)

# Time from call to return, of one call on small tensors.
HOST = Benchmark("host", case=("shape", "dtype", "mode"), bases=(EAGER,))

# gather and distribute, as MFNet Light calls them. The shape is (batch, channels, K, pixels).
ATTENTION = Benchmark(
    "attention", case=("operation", "shape", "dtype", "layout", "pass"), bases=(MFOPS,)
)

# A context module in the place it has in a network. FLOPs are those of a forward pass: the counter
# of torch 2.14 takes the backward pass of a grouped convolution for that of an ungrouped one.
CONTEXTS = Benchmark(
    "contexts",
    case=("in_channels", "out_channels", "size", "batch", "dtype", "pass"),
    measures=("peak_bytes", "parameters", "flops"),
    bases=("aspp", "em"),
)

# Whole networks. FLOPs are those of one image, forward, at the row's own input size.
MODELS = Benchmark(
    "models",
    case=("backbone", "size", "batch", "dtype", "pass"),
    measures=("images_per_s", "peak_bytes", "parameters", "flops"),
    texts=("input",),
    bases=("deeplabv3plus", "emanet"),
)

# A whole network, on mfops's kernels and on the lines of its reference.
BACKENDS = Benchmark(
    "backends",
    case=(*MODELS.case, "network"),
    measures=MODELS.measures,
    texts=MODELS.texts,
    bases=(MFOPS,),
)

# A trained network on a CPU, as PyTorch runs it and as `mfnet export` writes it, one image.
PYTORCH, TORCH_COMPILE = "PyTorch", "torch.compile"
DEPLOYMENT = Benchmark("deployment", case=("network", "size"), bases=(PYTORCH,))

# A training step of the trainer. Times are of a whole step; the parts are from a run of their own,
# in which each waits for the device.
TRAINING = Benchmark(
    "training",
    case=("data", "backbone", "size", "batch", "precision", "workers"),
    measures=("images_per_s", "loader_s", "forward_s", "backward_s", "optimizer_s", "other_s"),
    bases=("deeplabv3plus",),
)

# A training run. `baseline` is the context, or a network, and mIoU that of the last epoch.
ACCURACY = Benchmark(
    "accuracy",
    case=("data", "recipe", "flags"),
    measures=(
        "seed",
        "epochs",
        "parameters",
        "flops",
        "mIoU",
        "fwIoU",
        "accuracy",
        "best_mIoU",
        "best_epoch",
    ),
    texts=("network", "backbone", "size"),
    timed=False,
)

# What the networks of those runs cost, at the size of their validation images, batch 1.
ACCURACY_COST = Benchmark(
    "accuracy_cost",
    case=("data", "recipe", "flags", "size", "dtype"),
    measures=("images_per_s", "peak_bytes", "parameters", "flops"),
    texts=("input",),
    bases=(LIGHT, "aspp"),
)

BENCHMARKS = (
    CEILINGS,
    OP,
    FACTORIZERS,
    HOST,
    ATTENTION,
    CONTEXTS,
    MODELS,
    BACKENDS,
    DEPLOYMENT,
    TRAINING,
    ACCURACY,
    ACCURACY_COST,
)
