"""Tensors beyond whose end nobody may read or write."""

from __future__ import annotations

import ctypes
import mmap

import torch


def guarded(tensor: torch.Tensor, align: int = 1) -> torch.Tensor:
    """A copy of `tensor`, strides included, that ends right before memory nobody may access.

    With `align` its address is a multiple of that, and up to align - 1 bytes lie in between;
    without, the address is a multiple of 16 where the size in bytes is. Around the elements, in
    the gaps between their strides too, all bytes are 0xff: NaN.
    """
    page = mmap.PAGESIZE
    spans = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((extent - 1) * stride for extent, stride in spans)
    size = -(-elements * tensor.element_size() // align) * align
    length = -(-size // page) * page
    memory = mmap.mmap(-1, length + page)
    memory.write(b"\xff" * length)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    no_access = 0
    status = ctypes.CDLL(None).mprotect(
        ctypes.c_void_p(start + length), ctypes.c_size_t(page), no_access
    )
    assert status == 0
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=elements, offset=length - size)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
