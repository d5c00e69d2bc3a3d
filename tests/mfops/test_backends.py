"""Every backend against the float64 reference.

On CUDA where there is a GPU. Under TRITON_INTERPRET=1, as test_triton.py runs this file, the CPU's
part is Triton's kernels in its interpreter.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    SHARING,
    Case,
    assert_within,
    check,
    features,
    judged,
    make,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import IN_PARALLEL, INTERPRETED, Run, on_cpu, on_cuda

from mfops import reference

# What takes the interpreter a minute, with fewer tiles; the edges are as odd.
FEWER_TILES = {
    (4, 70, 64, 1089): (2, 70, 64, 289),
    (1, 200, 7, 2500): (1, 200, 7, 300),
    (1, 5, 9, 9000): (1, 5, 9, 900),
    (3, 2300, 2, 31): (2, 700, 2, 31),
}
# Units of several images, and more bases than the kernels for GPUs take at once.
MORE_SHAPES = [(5, 9, 64, 100), (5, 100, 64, 9), (1, 40, 130, 70), (2, 20, 300, 40)]


class GivenFactors(Run):
    def make(self, *arguments: Any) -> Case:
        return make(*arguments, self.device)

    def check(
        self,
        shape: tuple[int, int, int, int],
        layout: str,
        kind: torch.dtype | Literal["tf32"],
        shared: tuple[bool, bool],
    ) -> None:
        self.skip_unless_able(shape[2])
        dtype = torch.float32 if kind == "tf32" else kind
        check(self, self.make(shape, layout, dtype, shared), self.operands(kind))


ON_CPU = on_cpu(GivenFactors)
NATIVE, TRITON = (on_cuda(GivenFactors, backend) for backend in ("native", "triton"))
# On a GPU Triton compiles its kernels anew for nearly every case, so it has fewer of them.
fast_runs = pytest.mark.parametrize("run", [*ON_CPU, NATIVE], ids=str)
all_runs = pytest.mark.parametrize("run", [*ON_CPU, NATIVE, TRITON], ids=str)


@pytest.fixture(autouse=True)
def _able(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips a run that is not possible; spares Triton the trial of several tile shapes."""
    run = request.getfixturevalue("run")
    run.skip_unless_able()
    if run.backend == "triton":
        for kernel in ("forward", "backward"):
            module = importlib.import_module(f"mfops.triton.{kernel}")
            monkeypatch.setattr(module, "choose", _choose)


def _choose(problem: Any, _: Any, configs: Any, __: Any) -> Any:
    """The first configuration; in the interpreter the largest tiles, by whose number it takes its
    time."""
    config = configs(problem)[0]
    return config._replace(block_m=128, block_n=128) if INTERPRETED else config


def table() -> Iterator[Any]:
    """Parameters of the test below; a dtype may be "tf32": float32 with rounded operands.

    Where a case takes Triton seconds, one of each shape; four in the interpreter, which together
    have every layout, every dtype and every sharing.
    """
    dtypes = [*DTYPES, "tf32"]
    for param in all_runs.args[1]:
        run = param if isinstance(param, Run) else param.values[0]
        for i, shape in enumerate(SHAPES + MORE_SHAPES):
            large = shape in FEWER_TILES or shape[2] > 256
            few = run.backend == "triton" and (large or not INTERPRETED)
            shape = FEWER_TILES.get(shape, shape) if INTERPRETED else shape
            # Layouts come in turn: float64 results are known for a few cases back.
            for (k, dtype), (j, layout) in itertools.product(enumerate(dtypes), enumerate(LAYOUTS)):
                if INTERPRETED and not few and (i + j + k) % 4:
                    continue
                if few and (layout, dtype) != (LAYOUTS[i % 4], dtypes[(i + i // 4) % 4]):
                    continue
                if dtype == "tf32" and run.operands(dtype) is None:
                    continue
                sharing = SHARING
                if few:
                    sharing = SHARING[::3]
                elif INTERPRETED:
                    sharing = [SHARING[(i // 4 + j) % 4]]
                name = f"{run}-{shape}-{layout}-{dtype}"
                marks = getattr(param, "marks", ())
                yield pytest.param(run, shape, layout, dtype, sharing, marks=marks, id=name)


@pytest.mark.parametrize(("run", "shape", "layout", "dtype", "sharing"), list(table()))
def test_agrees_with_float64_reference(run, shape, layout, dtype, sharing):
    for shared in sharing:
        run.check(shape, layout, dtype, shared)


@fast_runs
@settings(max_examples=8 if INTERPRETED else 40, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (4, 70, 20, 150))),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    shared=st.sampled_from(SHARING),
)
def test_agrees_on_any_shape(run, shape, layout, dtype, shared):
    run.check(shape, layout, dtype, shared)


@fast_runs
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shared", SHARING)
def test_gradients_only_when_asked_for(run, layout, shared):
    case = run.make((3, 17, 5, 33), layout, torch.float32, shared)
    every, limits = judged(case, run.operands(torch.float32))
    arguments = case.grad_x_hat, case.grad_mse, case.x, case.y, case.z
    for needs in itertools.product([True, False], repeat=3):
        some = run.reconstruct_backward(*arguments, *needs)
        for name, need, grad in zip(("grad_x", "grad_y", "grad_z"), needs, some, strict=True):
            if need:
                assert_within(grad, getattr(every, name), getattr(limits, name), name)
            else:
                assert grad.numel() == 0


@fast_runs
@pytest.mark.parametrize("shared", SHARING)
def test_missing_and_expanded_gradients(run, shared):
    case = run.make((3, 17, 5, 33), "contiguous", torch.float32, shared)
    backward, factors = run.reconstruct_backward, (case.x, case.y, case.z)
    ones = torch.ones((), device=run.device).expand_as(case.grad_x_hat)
    needs = (True, True, True)
    for upstream, mse in itertools.product((None, ones), (None, case.grad_mse)):
        exact = reference.reconstruct_backward(
            None if upstream is None else upstream.double(),
            None if mse is None else mse.double(),
            *(t.double() for t in factors),
            *needs,
        )
        for grad, expected in zip(backward(upstream, mse, *factors, *needs), exact, strict=True):
            torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)


@fast_runs
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_shared_factors_per_image_or_summed(run, layout):
    case = run.make((3, 17, 5, 33), layout, torch.float32, (True, True))
    backward, factors = run.reconstruct_backward, (case.x, case.y, case.z)
    images = features((3, 17, 33), layout, torch.float32, run.device)
    for mse in (case.grad_mse, None):
        needs = (True, True, True)
        summed = backward(images.sum(0), mse, *factors, *needs)
        for a, b in zip(backward(images, mse, *factors, *needs), summed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@all_runs
def test_expanded_factors_are_per_image(run):
    case = run.make((3, 17, 5, 33), "contiguous", torch.float32, (True, True))
    y, z = case.y.expand(3, -1, -1), case.z.expand(3, -1, -1)
    x_hat, _ = run.reconstruct(case.x, y, z)
    torch.testing.assert_close(x_hat, (case.y @ case.z).expand(3, -1, -1))
    grads = run.reconstruct_backward(
        case.grad_x_hat.expand(3, -1, -1), case.grad_mse, case.x, y, z, True, True, True
    )
    copies = reference.reconstruct_backward(
        case.grad_x_hat.expand(3, -1, -1), case.grad_mse, case.x, y, z, True, True, True
    )
    torch.testing.assert_close(grads, copies, rtol=1e-4, atol=1e-4)


@IN_PARALLEL
@fast_runs
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shared", SHARING)
def test_same_bits_every_run(run, layout, shared):
    case = run.make((4, 300, 16, 1089), layout, torch.float32, shared)
    factors = (case.x, case.y, case.z)

    def results():
        return *run.reconstruct(*factors), *run.reconstruct_backward(
            case.grad_x_hat, case.grad_mse, *factors, True, True, True
        )

    first = results()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


@IN_PARALLEL
@pytest.mark.parametrize("run", ON_CPU, ids=str)
@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("shared", SHARING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads(run, threads, shared, dtype):
    torch.set_num_threads(threads)
    run.check((3, 300, 4, 700), "contiguous", dtype, shared)


@all_runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_go_through(run, dtype):
    case = run.make((2, 9, 3, 40), "contiguous", dtype, (True, True))
    case.x[1, 4, 7] = float("nan")
    x_hat, mse = run.reconstruct(case.x, case.y, case.z)
    assert mse.isnan()
    assert x_hat.isfinite().all()
    case.x[1, 4, 7] = float("inf")
    assert run.mse(case.x, case.y, case.z) == float("inf")
    grad_x, *_ = run.reconstruct_backward(
        None, case.grad_mse, case.x, case.y, case.z, True, True, True
    )
    assert grad_x[1, 4, 7] == float("inf")
    assert grad_x[0].isfinite().all()
    case.y[2, 0] = float("nan")
    x_hat, _ = run.reconstruct(case.x, case.y, case.z)
    assert x_hat[2].isnan().all()
    assert x_hat[3].isfinite().all()


@all_runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_bases_stay_in_their_channel(run, dtype):
    case = run.make((2, 9, 1, 40), "contiguous", dtype, (True, True))
    case.y[2], factors = float("inf"), (case.x, case.y, case.z.abs())
    x_hat, mse = run.reconstruct(*factors)
    assert mse == float("inf")
    assert (x_hat == float("inf")).sum() == 40
    grads = run.reconstruct_backward(None, case.grad_mse, *factors, True, True, True)
    assert (grads[0] == -float("inf")).sum() == 2 * 40
    assert grads[1][2] == float("inf")
    assert all(grad.isfinite().sum() == grad.numel() * 8 / 9 for grad in grads[:2])


@all_runs
def test_small_gradients_survive_float16(run):
    """Scaled by s, each difference X - X' would vanish in float16; their sum does not."""
    pixels, s = 9000, 5e-9
    x = torch.full((1, 1, pixels), 4.0, dtype=torch.float16, device=run.device)
    y, z = torch.zeros_like(x[0, :, :1]), torch.ones_like(x[0])
    grad_mse = torch.tensor(s * pixels / 2, device=run.device)
    _, grad_y, _ = run.reconstruct_backward(None, grad_mse, x, y, z, False, True, False)
    torch.testing.assert_close(grad_y.item(), -s * 4 * pixels, rtol=2e-3, atol=0)
