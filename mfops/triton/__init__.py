"""The operators on Triton, with the arguments and results of `mfops.ops`.

Needs a GPU, or TRITON_INTERPRET=1 in the environment before triton is imported: the kernels then
run, slowly, on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfops.methods import METHODS
from mfops.methods.base import INVERSE_TEMPERATURE
from mfops.reference import empty_like_x
from mfops.triton import rounds
from mfops.triton.backward import launch_backward
from mfops.triton.common import Problem
from mfops.triton.finish import launch_finish, launch_nmf_backward
from mfops.triton.forward import launch_forward


def reconstruct(x: Tensor, y: Tensor, z: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
    problem = Problem.of(x, y, z, tf32)
    x_hat = empty_like_x(x, list(x.shape[1:] if problem.one_product else x.shape))
    return x_hat, launch_forward(problem, x_hat)


def mse(x: Tensor, y: Tensor, z: Tensor, tf32: bool = False) -> Tensor:
    return launch_forward(Problem.of(x, y, z, tf32), None)


def reconstruct_backward(
    grad_x_hat: Tensor | None,
    grad_mse: Tensor | None,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    need_x: bool,
    need_y: bool,
    need_z: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem.of(x, y, z, tf32)
    grad_x = empty_like_x(x, list(x.shape)) if need_x else x.new_empty(0)
    if need_x and grad_mse is None:  # X' does not depend on X
        grad_x.zero_()
        need_x = False
    if not (need_x or need_y or need_z):
        return grad_x, x.new_empty(0), x.new_empty(0)
    grad_y, grad_z = launch_backward(
        problem, grad_x_hat, grad_mse, grad_x if need_x else None, need_y, need_z
    )
    return grad_x, grad_y, grad_z


def factorize(
    x: Tensor,
    y0: Tensor,
    method: str,
    steps: int,
    tf32: bool = False,
    inverse_temperature: float = INVERSE_TEMPERATURE,
) -> tuple[Tensor, Tensor]:
    z = x.new_empty(x.shape[0], y0.shape[-1], x.shape[2])
    return rounds.factorize(x, y0, method, steps, z, tf32, inverse_temperature).y, z


def factorize_reconstruct(
    x: Tensor, y0: Tensor, method: str, steps: int, tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z = x.new_empty(x.shape[0], y0.shape[-1], x.shape[2])
    x_hat = empty_like_x(x, list(x.shape))
    if not METHODS[method].one_step_gradient:
        bases = rounds.factorize(x, y0, method, steps, z, tf32)
        mse = launch_forward(Problem.of(x, bases.rounded, z, tf32), x_hat)
        return bases.y, z, x.new_empty(0), x_hat, mse
    last = torch.empty_like(z, dtype=torch.float32)  # before the update that has a gradient
    bases = rounds.factorize(x, y0, method, steps, last, tf32)
    z_scale = torch.empty_like(z)
    problem = Problem.of(x, bases.rounded, z, tf32)
    mse = launch_finish(problem, bases.gram, last, z_scale, x_hat)
    return bases.y, z, z_scale, x_hat, mse


def nmf_backward(
    grad_x_hat: Tensor | None,
    grad_mse: Tensor | None,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    z_scale: Tensor,
    tf32: bool = False,
) -> Tensor:
    grad_x = empty_like_x(x, list(x.shape))
    problem = Problem.of(x, y.to(x.dtype), z, tf32)
    launch_nmf_backward(problem, grad_x_hat, grad_mse, z_scale, grad_x)
    return grad_x
