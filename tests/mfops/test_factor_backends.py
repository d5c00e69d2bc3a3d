"""Every backend's kernels that find Y and Z against the float64 reference.

On CUDA where there is a GPU. Under TRITON_INTERPRET=1, as test_triton.py runs this file, the CPU's
part is Triton's kernels in its interpreter.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DTYPES, LAYOUTS
from factor_cases import SHAPES, STEPS, check, make
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import IN_PARALLEL, INTERPRETED, Run, on_cpu, on_cuda

from mfops.methods import METHODS

KINDS = [*DTYPES, "tf32"]
if "MFOPS_CPU_PRODUCTS" in os.environ:  # the products of bfloat16 features are chosen
    KINDS = [torch.bfloat16]
# More bases than the kernels for GPUs take at once.
MORE_SHAPES = [(1, 20, 300, 40)]
# What takes the interpreter long, with fewer tiles; the edges are as odd.
FEWER_TILES = {
    (2, 70, 64, 289): (2, 70, 64, 97),
    (1, 200, 7, 700): (1, 200, 7, 188),
    (1, 5, 9, 1500): (1, 5, 9, 300),
    (3, 129, 3, 1): (2, 129, 3, 1),
    (2, 300, 12, 31): (1, 300, 12, 31),
    (1, 20, 300, 40): (1, 20, 130, 40),  # of Triton's no program holds more than 128
}
ROUNDS = 2 if INTERPRETED else STEPS


class FoundFactors(Run):
    def check(
        self,
        shape: Any,
        layout: str,
        kind: Any,
        method: str,
        shared: bool,
        steps: int = ROUNDS,
        **options: float,
    ) -> None:
        self.skip_unless_able(shape[2], method)
        dtype = torch.float32 if kind == "tf32" else kind
        check(
            self,
            make(shape, layout, dtype, method, shared, self.device),
            method,
            self.operands(kind),
            steps,
            **options,
        )


ON_CUDA = [on_cuda(FoundFactors, backend) for backend in ("native", "triton")]
every_run = pytest.mark.parametrize("run", [*on_cpu(FoundFactors), *ON_CUDA], ids=str)
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def _fewer_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares Triton the trial of several tile shapes, its interpreter many tiles and programs."""

    def choose(problem: Any, traits: Any, configs: Any, launch: Any) -> Any:
        config = configs(problem)[0]
        return config._replace(block_m=128, block_n=64) if INTERPRETED else config

    run = request.getfixturevalue("run")
    if run.backend == "triton":
        for kernel in ("forward", "backward", "rounds", "finish"):
            monkeypatch.setattr(importlib.import_module(f"mfops.triton.{kernel}"), "choose", choose)
        if INTERPRETED:
            monkeypatch.setattr("mfops.triton.rounds.PROGRAMS", 8)


def table() -> Iterator[Any]:
    """Parameters of the test below; Triton's share has every method, layout and kind."""
    for i, shape in enumerate(SHAPES + MORE_SHAPES):
        shape = FEWER_TILES.get(shape, shape) if INTERPRETED else shape
        for param in every_run.args[1]:  # one after the other, as they are judged by the same
            run = param if isinstance(param, Run) else param.values[0]
            marks = getattr(param, "marks", ())
            for (j, layout), (m, method) in itertools.product(
                enumerate(LAYOUTS), enumerate(METHODS)
            ):
                kinds = [k for k in KINDS if k != "tf32" or run.operands(k) is not None]
                if run.backend == "triton":  # seconds each
                    if (i + j + m) % 4:
                        continue
                    kinds = [KINDS[(i + i // 4) % len(KINDS)]]
                name = f"{run}-{shape}-{layout}-{method}"
                yield pytest.param(run, shape, layout, kinds, method, marks=marks, id=name)


@pytest.mark.parametrize(("run", "shape", "layout", "kinds", "method"), list(table()))
def test_agrees_with_float64_reference(run, shape, layout, kinds, method):
    for i, kind in enumerate(kinds):
        run.check(shape, layout, kind, method, shared=(shape[2] + i) % 2 == 0)


@every_run
@every_method
@settings(max_examples=2 if INTERPRETED else 30, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 70, 20, 150))),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([kind for kind in KINDS if kind != "tf32"]),
    shared=st.booleans(),
)
def test_agrees_on_any_shape(run, method, shape, layout, dtype, shared):
    # vq and cd multiply a rounding by 100 in each round, which makes far outliers.
    steps = 1 if method in ("vq", "cd") else ROUNDS
    run.check(shape, layout, dtype, method, shared, steps)


@every_run
@pytest.mark.parametrize("method", ["vq", "cd"])
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_agrees_at_other_temperatures(run, method, temperature):
    layouts = LAYOUTS[:1] if INTERPRETED else LAYOUTS
    for layout in layouts:
        shape = (2, 19, 5, 70)
        run.check(shape, layout, torch.float32, method, True, temperature=temperature)


@every_run
@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_channel_of_many(run, method, dtype):
    """Pixels lie apart, and so would channels, were there two."""
    run.skip_unless_able(2, method)
    case = make((2, 1, 2, 40), "contiguous", dtype, method, False, run.device)
    apart = case.x.repeat(1, 4, 1).mT.contiguous().mT[:, :1]
    assert apart.stride()[1:] == (1, 4)
    check(run, replace(case, x=apart), method, run.operands(dtype), steps=1)


@every_run
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_gradient_arrives(run, dtype):
    run.skip_unless_able(5, "nmf")
    case = make((2, 19, 5, 70), "contiguous", dtype, "nmf", True, run.device)
    y, z, z_scale, *_ = run.factorize_reconstruct(case.x, case.y0, "nmf", 1)
    assert not run.nmf_backward(None, None, case.x, y, z, z_scale).any()


@IN_PARALLEL
@every_run
@every_method
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_same_bits_every_run(run, method, layout):
    run.skip_unless_able(method=method)
    case = make((3, 40, 9, 300), layout, torch.bfloat16, method, True, run.device)

    def results() -> list[torch.Tensor]:
        found = list(run.factorize(case.x, case.y0, method, 2))
        if method in ("em", "nmf"):
            found += run.factorize_reconstruct(case.x, case.y0, method, 2)
        if method == "nmf":
            y, z, z_scale = found[2:5]
            found.append(run.nmf_backward(case.grad_x_hat, case.grad_mse, case.x, y, z, z_scale))
        return found

    first = results()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


@every_run
@every_method
def test_constant_and_zero_features_give_finite_factors(run, method):
    run.skip_unless_able(method=method)
    y0 = METHODS[method].noise(6, 3).to(run.device)
    for value in (0.0, 1.0, 3e4):
        x = torch.full((2, 6, 20), value, device=run.device)
        for result in run.factorize(x, y0, method, 3):
            assert result.isfinite().all(), (method, value)


@every_run
@every_method
def test_a_nan_stays_in_its_image(run, method):
    run.skip_unless_able(method=method)
    case = make((3, 6, 4, 20), "contiguous", torch.float32, method, True, run.device)
    x = case.x.clone()
    x[1, 2, 3] = float("nan")
    clean, spoilt = (run.factorize(t, case.y0, method, 2) for t in (case.x, x))
    for a, b in zip(clean, spoilt, strict=True):
        assert b[1].isnan().any()
        assert torch.equal(a[[0, 2]], b[[0, 2]])
