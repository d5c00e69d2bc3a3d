"""csrc/cuda's operators that find Y and Z without a GPU, as test_cuda_emulated.py runs the others.

A shape takes the emulator seconds; the table's are dealt out over types and methods.
"""

from __future__ import annotations

from typing import Any

import emulator
import pytest
import torch
from cases import LAYOUTS
from factor_cases import SHAPES, Case, check, make
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_emulated import KIB, TYPES

from mfops.methods import METHODS

# From more bases than a block takes of X Z^T to all that kernels take; all channels of a tile at
# once, or chunk by chunk; on small GPUs chunk by chunk, but with several partials of each.
RANK_SHAPES = [
    (1, 40, 256, 35),
    (1, 140, 128, 40),
    (1, 300, 70, 20),
    (2, 300, 33, 99),
    (1, 250, 60, 201),
    (1, 1100, 64, 17),
    (1, 2048, 64, 5),
]


TYPES_IN_ORDER = [type_.values[1] for type_ in TYPES]


@pytest.fixture(scope="session")
def run() -> Any:
    return emulator.operators(factors=True)


def results(run: Any, case: Case, method: str) -> list[torch.Tensor]:
    found = list(run.factorize(case.x, case.y0, method, 2, False))
    if method in ("em", "nmf"):
        found += run.factorize_reconstruct(case.x, case.y0, method, 2, False)
    if method == "nmf":
        y, z, z_scale = found[2:5]
        for gradients in [(case.grad_x_hat, case.grad_mse), (None, case.grad_mse)]:
            found.append(run.nmf_backward(*gradients, case.x, y, z, z_scale, False))
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64_reference(run, shape, layout, method):
    i = SHAPES.index(shape) + LAYOUTS.index(layout) + list(METHODS).index(method)
    small = shape[1] * shape[3] < 2000
    for j, (dtype, operands) in enumerate(p.values for p in TYPES):
        if small or (i + j) % 4 == 0:
            case = make(shape, layout, dtype, method, j % 2 == 0)
            check(run, case, method, operands, steps=2)


@pytest.mark.parametrize("method", ["vq", "cd"])
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_agrees_at_other_temperatures(run, method, temperature):
    case = make((2, 19, 5, 70), "contiguous", torch.float32, method)
    check(run, case, method, steps=2, temperature=temperature)


# 99, 163 and 227 KiB are what a block has on compute capability 8.6 and 8.9, 8.0, and 9.0.
@pytest.mark.parametrize(("dtype", "operands"), TYPES)
@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("shape", RANK_SHAPES, ids=str)
def test_every_rank_on_every_gpu(run, monkeypatch, shape, kib, dtype, operands):
    monkeypatch.setenv("MFOPS_EMULATOR_SHARED_BYTES", str(kib * KIB))
    i = RANK_SHAPES.index(shape) + kib // 60
    rounds = [("nmf", 2), ("em", 2), (("vq", "cd")[i % 2], 1)]
    if shape[1] > 1000:  # many seconds for all three
        j = (TYPES_IN_ORDER.index(operands) + i) % 3
        rounds = rounds[j : j + 1]
    for method, steps in rounds:
        case = make(shape, LAYOUTS[i % 2], dtype, method)
        check(run, case, method, operands, steps)


# From one stage of the pipeline, where nothing is loaded ahead, to four, and with the bases of all
# channels in shared memory or not.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kib", [60, 80, 120, 227])
@pytest.mark.parametrize("shape", [(2, 130, 16, 135), (1, 264, 40, 72)], ids=str)
def test_same_bits_in_any_order_of_threads(run, monkeypatch, shape, kib, dtype):
    monkeypatch.setenv("MFOPS_EMULATOR_SHARED_BYTES", str(kib * KIB))
    for layout, method in [("contiguous", "nmf"), ("channels_last", "nmf"), ("contiguous", "vq")]:
        case = make(shape, layout, dtype, method)
        first, *others = (
            (monkeypatch.setenv("MFOPS_EMULATOR_ORDER", order), results(run, case, method))[1]
            for order in ("ascending", "descending", "7")
        )
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        monkeypatch.delenv("MFOPS_EMULATOR_ORDER")


# One round of vq and cd: they multiply a rounding by 100 in each, which makes far outliers.
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 150, 80, 100))),
    layout=st.sampled_from(LAYOUTS),
    type_=st.sampled_from([p.values for p in TYPES]),
    shared=st.booleans(),
)
def test_agrees_on_any_shape(run, method, shape, layout, type_, shared):
    dtype, operands = type_
    steps = 1 if method in ("vq", "cd") else 2
    check(run, make(shape, layout, dtype, method, shared), method, operands, steps)


PERSISTENT = [("em", torch.bfloat16), ("nmf", torch.bfloat16), ("nmf", torch.float16)]
# Blocks of a cluster with nothing to do; channels and bases that are no multiples; several tiles of
# a block, to the most columns that it takes; the most channels and bases, and with them an image
# that fills the shared memory.
RESIDENT_SHAPES = [
    (2, 17, 5, 33),
    (1, 70, 64, 145),
    (1, 40, 16, 289),
    (1, 24, 20, 70),
    (1, 33, 33, 2048),
    (1, 512, 64, 40),
    (1, 512, 64, 1089),
]


@pytest.fixture
def clusters(monkeypatch) -> None:
    """The persistent kernel wherever an image fits."""
    monkeypatch.setenv("MFOPS_EMULATOR_CLUSTERS", "1")


@pytest.mark.parametrize(("method", "dtype"), PERSISTENT)
@pytest.mark.parametrize("shape", RESIDENT_SHAPES, ids=str)
def test_persistent_agrees_with_float64_reference(run, clusters, shape, method, dtype):
    for i, layout in enumerate(LAYOUTS):
        if i == 0 or shape[3] < 1000:
            case = make(shape, layout, dtype, method, i % 2 == 0)
            check(run, case, method, dtype, steps=2)


@pytest.mark.parametrize("method", ["em", "nmf"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_persistent_same_bits_in_any_order_of_blocks(run, clusters, monkeypatch, layout, method):
    case = make((2, 70, 40, 150), layout, torch.bfloat16, method)
    first, *others = (
        (monkeypatch.setenv("MFOPS_EMULATOR_ORDER", order), results(run, case, method))[1]
        for order in ("ascending", "descending", "7", "8")
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("pixels", "fits"), [(300, True), (2049, False)])
def test_persistent_is_taken_where_an_image_fits(run, clusters, monkeypatch, pixels, fits):
    """It computes with other tiles, so its last bits are others."""
    case = make((1, 64, 16, pixels), "contiguous", torch.bfloat16, "em")
    found = run.factorize(case.x, case.y0, "em", 2, False)[0]
    monkeypatch.delenv("MFOPS_EMULATOR_CLUSTERS")
    streamed = run.factorize(case.x, case.y0, "em", 2, False)[0]
    torch.testing.assert_close(found, streamed, rtol=0.02, atol=0.01)
    assert torch.equal(found, streamed) == (not fits)


# Of 15 clusters side by side, as on an H200, the second wave may be too empty.
STREAMED = {0: range(1, 100), 1: [], 15: [16]}


@pytest.mark.parametrize("clusters", STREAMED)
@pytest.mark.parametrize("method", ["em", "nmf"])
def test_persistent_is_taken_where_its_waves_are_full(run, monkeypatch, method, clusters):
    monkeypatch.setenv("MFOPS_EMULATOR_CLUSTERS", str(clusters))
    image = torch.empty(512, 1089, dtype=torch.bfloat16)
    batches = range(1, 100)
    streamed = [b for b in batches if not run.is_persistent(image.expand(b, -1, -1), 64, method)]
    assert streamed == list(STREAMED[clusters])


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_base_far_from_every_pixel_lives_in_float16(run, clusters, layout):
    """Its coefficients, e^-18, are zeros in float16; the mean that they weigh has unit length."""
    case = make((1, 24, 2, 70), layout, torch.float16, "em")
    near, aside = torch.eye(24)[:2]
    case.x.mul_(0.1).add_((40 * near).half()[:, None])
    case.y0.copy_(torch.stack([near, 0.55 * near + 0.7 * aside], dim=1))
    assert run.factorize(case.x, case.y0, "em", 1, False)[0].norm(dim=1).min() > 0.9
    check(run, case, "em", torch.float16, steps=1)


CHANNELS = [6, 300]  # all of a tile at once, chunk by chunk


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_constant_and_zero_features_give_finite_factors(run, channels, method):
    y0 = METHODS[method].noise(channels, 3)
    for value in (0.0, 1.0, 3e4):
        for result in run.factorize(torch.full((2, channels, 20), value), y0, method, 3, False):
            assert result.isfinite().all(), value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_image(run, channels, method, value):
    case = make((3, channels, 4, 20), "contiguous", torch.float32, method)
    x = case.x.clone()
    x[1, 2, 3] = value
    clean, spoilt = (run.factorize(t, case.y0, method, 2, False) for t in (case.x, x))
    for a, b in zip(clean, spoilt, strict=True):
        assert b[1].isnan().any()
        assert torch.equal(a[[0, 2]], b[[0, 2]])


def test_small_gradients_do_not_vanish_in_float16(run):
    case = make((2, 40, 4, 300), "contiguous", torch.float16, "nmf")
    y, z, z_scale = run.factorize_reconstruct(case.x, case.y0, "nmf", 3, False)[:3]
    one = run.nmf_backward(None, torch.tensor(24000.0), case.x, y, z, z_scale, False)
    tiny = run.nmf_backward(None, torch.tensor(24.0), case.x, y, z, z_scale, False)
    torch.testing.assert_close(1000 * tiny.float(), one.float(), rtol=1e-2, atol=1e-3)


def test_gradients_that_are_expanded_or_laid_out_otherwise(run):
    case = make((2, 40, 4, 70), "channels_last", torch.float32, "nmf")
    factors = run.factorize_reconstruct(case.x, case.y0, "nmf", 2, False)[:3]
    one = torch.ones(())
    for upstream in (one.expand(2, 40, 70), torch.randn(2, 40, 70)):
        dense = upstream.mT.contiguous().mT
        grads = [
            run.nmf_backward(g, case.grad_mse, case.x, *factors, False) for g in (upstream, dense)
        ]
        assert torch.equal(*grads)


def test_more_bases_than_the_kernels_take(run):
    with pytest.raises(RuntimeError, match="K <= 256, got 257"):
        run.factorize(torch.zeros(1, 3, 5), torch.zeros(3, 257), "em", 1, False)
