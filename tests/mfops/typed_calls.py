"""Calls whose types `make lint` checks; nothing here runs."""

from __future__ import annotations

from typing import assert_type

from torch import Tensor

import mfops


def context(module: mfops.FactorizedContext, x: Tensor, either: bool) -> None:
    assert_type(module(x), Tensor)
    assert_type(module(x, return_loss=False), Tensor)
    assert_type(module(x, return_loss=True), tuple[Tensor, Tensor])
    assert_type(module.forward(x, True), tuple[Tensor, Tensor])
    assert_type(module(x, either), Tensor | tuple[Tensor, Tensor])


def functions(x: Tensor, y: Tensor, z: Tensor) -> None:
    assert_type(mfops.factorized_reconstruction(x, y, z), tuple[Tensor, Tensor])
    assert_type(mfops.factorized_mse(x, y, z), Tensor)
    assert_type(mfops.factorize(x, y), tuple[Tensor, Tensor])
    assert_type(mfops.factorize_reconstruct(x, y, "nmf", 6), tuple[Tensor, Tensor, Tensor])
