"""A module as an ONNX file in onnxruntime, as a saved and loaded program, as a traced one."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.onnx._internal.exporter._registration import ONNXRegistry

# torch writes this table anew in each export, which takes a second.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
FREE = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


def with_awkward_norms(module: nn.Module) -> nn.Module:
    """In evaluation, frozen, with biases, scales and statistics that are neither 0 nor 1."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dim() == 1:
                tensor.uniform_(0.1, 1)
    return module.eval().requires_grad_(False)


def in_onnxruntime(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """What torch.onnx.export makes of it with x as its example, every size but C dynamic."""
    program = torch.onnx.export(module, (x,), dynamic_shapes=(FREE,), verbose=False)
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (given,), (result, *_) = session.get_inputs(), session.get_outputs()
    for axis in FREE:  # declared so, not only by chance right
        assert isinstance(given.shape[axis], str)
        assert isinstance(result.shape[axis], str)
    return lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


def saved_and_loaded(module: nn.Module, x: Tensor, strict: bool) -> Callable[[Tensor], Tensor]:
    """torch.export's program after a round through its file."""
    program = torch.export.export(module, (x,), dynamic_shapes=(FREE,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def traced(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """torch.jit.trace's program after a round through its file."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, x), file)
    file.seek(0)
    return torch.jit.load(file)
