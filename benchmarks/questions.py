"""The questions, and the columns of the rows that answer them: a bench_*.py file each."""

from __future__ import annotations

from benchmarks.rows import Question

# Rivals of the op.
NATIVE, TRITON, COPY = "mfops native", "mfops triton", "copy"
EAGER, BEST = "eager, as published", "eager, at its best"
COMPILE, COMPILE_GRAPHS = "compile, max-autotune-no-cudagraphs", "compile, max-autotune"

MFOPS = "mfops"  # whichever backend the automatic choice takes
REFERENCE = "mfops reference"
# Rivals of gather and distribute. A bias on the scores: as a mask, or as the key of a channel.
SDPA = "scaled_dot_product_attention"
SDPA_CHANNEL = f"{SDPA}, bias as a channel"

# Our network, and how the names of its variants begin.
LIGHT, VARIANT = "mfnet_light", "light: "

# What the machine can do at most: bytes per second of a copy, FLOPs per second of a product.
CEILINGS = Question("ceilings", figure=("dtype",), measures=("rate",))

OP = Question(
    "op",
    figure=("shape", "dtype", "layout", "factors", "pass"),
    measures=("peak_bytes", "extra_bytes", "x_bytes", "floor_bytes", "moved_bytes", "flops"),
    bases=(NATIVE, TRITON, EAGER, COPY),
)

# From X to X' by the methods that find the factors on each image.
FACTORIZERS = Question(
    "factorizers",
    figure=("method", "steps", "shape", "dtype", "layout", "pass"),
    measures=OP.measures,
    bases=(NATIVE, TRITON, EAGER, BEST, COMPILE, COPY),
)

# Time from call to return, of one call on small tensors.
HOST = Question("host", figure=("shape", "dtype", "mode"), bases=(EAGER,))

# gather and distribute, as MFNet Light calls them. The shape is (batch, channels, K, pixels).
ATTENTION = Question(
    "attention", figure=("operation", "shape", "dtype", "layout", "pass"), bases=(MFOPS,)
)

# A context module in the place it has in a network. FLOPs are those of a forward pass: the counter
# of torch 2.14 takes the backward pass of a grouped convolution for that of an ungrouped one.
CONTEXTS = Question(
    "contexts",
    figure=("in_channels", "out_channels", "size", "batch", "dtype", "pass"),
    measures=("peak_bytes", "parameters", "flops"),
    bases=("aspp", "em"),
)

# Whole networks. FLOPs are those of one image, forward, at the row's own input size.
MODELS = Question(
    "models",
    figure=("backbone", "size", "batch", "dtype", "pass"),
    measures=("input", "images_per_s", "peak_bytes", "parameters", "flops"),
    bases=("deeplabv3plus", "emanet"),
)

# A whole network, on mfops's kernels and on the lines of its reference.
BACKENDS = Question(
    "backends", figure=(*MODELS.figure, "network"), measures=MODELS.measures, bases=(MFOPS,)
)

# A training step of the trainer. Times are of a whole step; the parts are from a run of their own,
# in which each waits for the device.
TRAINING = Question(
    "training",
    figure=("data", "backbone", "size", "batch", "precision", "workers"),
    measures=("images_per_s", "loader_s", "forward_s", "backward_s", "optimizer_s", "other_s"),
    bases=("deeplabv3plus",),
)

# A training run. `rival` is the context, or a network, and mIoU that of the last epoch.
ACCURACY = Question(
    "accuracy",
    figure=("data", "recipe", "flags"),
    measures=(
        "seed",
        "network",
        "backbone",
        "size",
        "epochs",
        "parameters",
        "flops",
        "mIoU",
        "fwIoU",
        "accuracy",
        "best_mIoU",
        "best_epoch",
    ),
    timed=False,
)

# What the networks of those runs cost, at the size of their validation images, batch 1.
ACCURACY_COST = Question(
    "accuracy_cost",
    figure=("data", "recipe", "flags", "size", "dtype"),
    measures=("input", "images_per_s", "peak_bytes", "parameters", "flops"),
    bases=(LIGHT, "aspp"),
)
