"""Counting the FLOPs of convolutions and matrix products, 2 per multiply-add."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def call_flops(call: Callable[[], object]) -> int:
    """FLOPs of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def count_flops(network: nn.Module, size: tuple[int, int], channels: int = 3) -> int:
    """FLOPs of one forward pass of one image of ``size`` (H, W).

    The network runs in evaluation mode on stand-ins of its parameters and buffers on the meta
    device, so nothing is computed, and no buffer and no random state changes.
    """
    stand_ins = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]
    }
    dtypes = [t.dtype for t in stand_ins.values() if t.is_floating_point()]
    dtype = dtypes[0] if dtypes else torch.float32
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            image = torch.empty(1, channels, *size, device="meta", dtype=dtype)
            return call_flops(lambda: torch.func.functional_call(network, stand_ins, (image,)))
    finally:
        for module, training in modes:
            module.training = training
