"""What torch.fx records: one node for a call of ours, whatever Python does inside of it.

Of a leaf module torch.fx asks for no more, but it takes only torch's own modules for leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.fx import Proxy

F = TypeVar("F", bound=Callable[..., Any])


def one_node(function: F) -> F:
    """A function that torch.fx records as one node, whichever of its arguments is traced."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, Proxy):
                return arg.tracer.create_proxy("call_function", call, args, kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def record_module(module: nn.Module, x: Proxy, *args: Any) -> Any:
    """A node `module(x, *args)`.

    Raises:
        TypeError: the module is what is traced, so that no node can call it.
    """
    tracer: Any = x.tracer
    if module is tracer.root:
        name = type(module).__name__
        raise TypeError(f"torch.fx traces {name} inside of a network, as nn.Sequential({name}(..))")
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *args), {})
