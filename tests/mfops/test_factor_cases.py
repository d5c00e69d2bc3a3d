"""The comparison that judges the backends tells a wrong result from a rounded one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from factor_cases import check, make
from torch import Tensor

from mfops import reference
from mfops.methods import METHODS

KINDS = [(torch.float32, None), (torch.float32, "tf32"), (torch.bfloat16, torch.bfloat16)]
every_kind = pytest.mark.parametrize(("dtype", "operands"), KINDS, ids=str)
every_method = pytest.mark.parametrize("method", METHODS)


def backend(factorize) -> SimpleNamespace:
    return SimpleNamespace(
        factorize=factorize,
        factorize_reconstruct=reference.factorize_reconstruct,
        nmf_backward=reference.nmf_backward,
    )


def without_the_last_pixel(x: Tensor, y0: Tensor, method: str, steps: int, *_: float):
    return reference.factorize(x[..., :-1], y0, method, steps)[0], reference.factorize(
        x, y0, method, steps
    )[1]


def a_round_less(x: Tensor, y0: Tensor, method: str, steps: int, *_: float):
    return reference.factorize(x, y0, method, steps - 1)


def at_another_temperature(x: Tensor, y0: Tensor, method: str, steps: int, *_: float):
    return reference.factorize(x, y0, method, steps, inverse_temperature=99)


@every_kind
@every_method
@pytest.mark.parametrize("mistake", [without_the_last_pixel, a_round_less])
def test_mistakes_are_seen(mistake, method, dtype, operands):
    case = make((2, 70, 24, 289), "contiguous", dtype, method)
    check(backend(reference.factorize), case, method, operands)
    with pytest.raises(AssertionError, match="more than roundings explain"):
        check(backend(mistake), case, method, operands)


@pytest.mark.parametrize("method", ["vq", "cd"])
def test_another_temperature_is_seen(method):
    case = make((2, 70, 24, 289), "contiguous", torch.float32, method)
    with pytest.raises(AssertionError, match="more than roundings explain"):
        check(backend(at_another_temperature), case, method)


@every_method
def test_16_bit_operands_do_not_pass_for_float32(method):
    case = make((2, 70, 24, 289), "contiguous", torch.float32, method)

    def rounded(x: Tensor, *arguments):
        return reference.factorize(x.bfloat16().float(), *arguments)

    with pytest.raises(AssertionError, match="more than roundings explain"):
        check(backend(rounded), case, method)


def test_a_wrong_gradient_is_seen():
    case = make((2, 70, 24, 289), "contiguous", torch.float32, "nmf")
    run = backend(reference.factorize)

    def without_the_error(grad_x_hat, grad_mse, *factors):
        return reference.nmf_backward(grad_x_hat, None, *factors)

    run.nmf_backward = without_the_error
    with pytest.raises(AssertionError, match=r"nmf_backward .*: dX: off by"):
        check(run, case, "nmf")
