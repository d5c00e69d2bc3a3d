"""The kernels' parameters, field by field as csrc/cuda has them."""

from __future__ import annotations

import ctypes

BF16 = 2  # of csrc/cuda/common/types.h
POINTER, LONG, INT, BOOL = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int, ctypes.c_bool


class Lines(ctypes.Structure):
    _fields_ = [("data", POINTER), ("batch", LONG), ("line", LONG), ("step", LONG)]


class Problem(ctypes.Structure):
    _fields_ = [
        ("type", INT),
        ("transposed", BOOL),
        ("batch", LONG),
        ("rows", LONG),
        ("cols", LONG),
        ("rank", INT),
        ("x", Lines),
        ("a", Lines),
        ("b", Lines),
        ("a_per_image", BOOL),
        ("b_per_image", BOOL),
    ]


class Work(ctypes.Structure):
    _fields_ = [
        (name, INT)
        for name in ("strips", "tiles", "ranges", "chunks", "interleave", "strips_per_part")
    ]


class Forward(ctypes.Structure):
    _fields_ = [
        ("problem", Problem),
        ("work", Work),
        ("stages", INT),
        ("x_hat", POINTER),
        ("errors", POINTER),
    ]


class FactorGradient(ctypes.Structure):
    _fields_ = [("result", POINTER), ("partials", POINTER)]


class Backward(ctypes.Structure):
    _fields_ = [
        ("problem", Problem),
        ("grad_x_hat", Lines),
        ("grad_x_hat_per_image", BOOL),
        ("grad_mse", POINTER),
        ("two_over_elements", ctypes.c_double),
        ("stages", INT),
        ("row_work", Work),
        ("col_work", Work),
        ("cols_first", BOOL),
        ("first_blocks", ctypes.c_uint),
        ("grad_x_by_rows", POINTER),
        ("grad_x_by_cols", POINTER),
        ("grad_a", FactorGradient),
        ("grad_b", FactorGradient),
    ]


class FactorProblem(ctypes.Structure):
    _fields_ = [
        ("type", INT),
        ("transposed", BOOL),
        ("batch", LONG),
        ("channels", LONG),
        ("pixels", LONG),
        ("rank", INT),
        ("x", Lines),
    ]


class ColumnWork(ctypes.Structure):
    _fields_ = [(name, INT) for name in ("tiles", "ranges", "groups", "chunks")]


class Round(ctypes.Structure):
    _fields_ = [
        ("problem", FactorProblem),
        ("work", ColumnWork),
        ("stages", INT),
        ("bases", POINTER),
        ("division", INT),
        ("squares", POINTER),
        ("slices", INT),
        ("factors", POINTER),
        ("inverse_temperature", ctypes.c_float),
        ("first", BOOL),
        ("gram", POINTER),
        ("z_before", POINTER),
        ("z_after", POINTER),
        ("partials", POINTER),
        ("sums", POINTER),
        ("z", POINTER),
        ("z_scale", POINTER),
        ("x_hat", POINTER),
        ("errors", POINTER),
    ]


class Persistent(ctypes.Structure):
    _fields_ = [
        ("problem", FactorProblem),
        ("span", INT),
        ("steps", INT),
        ("reconstruct", BOOL),
        ("start", Lines),
        ("y", POINTER),
        ("z", POINTER),
        ("z_scale", POINTER),
        ("x_hat", POINTER),
        ("errors", POINTER),
    ]
