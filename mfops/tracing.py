"""What torch.fx records: one node for a call of ours, whatever Python does inside of it.

Of a leaf module torch.fx asks for no more, but it takes only torch's own modules for leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy


def record_function(function: Callable[..., Any], x: Proxy, *args: Any) -> Any:
    """A node `function(x, *args)`."""
    return x.tracer.create_proxy("call_function", function, (x, *args), {})


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
