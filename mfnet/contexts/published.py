"""What units take from published code: where convolutions start, and names of state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def init_convolutions(unit: nn.Module) -> None:
    """Weights from N(0, 2 / (k^2 C_out)), as EMANet's and Hamburger's code starts those of a unit.

    torch's own start is six times smaller in variance: distances between pixels, and with them the
    rounds' responsibilities, would be nearly the same for every base.
    """
    for module in unit.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def rename_keys(state_dict: dict[str, Any], prefix: str, names: Mapping[str, str]) -> bool:
    """In place: a key `prefix + published` (or one that goes on with a dot) gets our name.

    Bases were published with a batch of one, (1, C, K): it is dropped. Returns whether there was
    a published name.
    """
    found = False
    for key in [key for key in state_dict if key.startswith(prefix)]:
        inner = key.removeprefix(prefix)
        for published, ours in names.items():
            if inner != published and not inner.startswith(published + "."):
                continue
            value = state_dict.pop(key)
            if ours == "factorizer.bases" and value.dim() == 3:
                value = value.squeeze(0)
            state_dict[prefix + ours + inner.removeprefix(published)] = value
            found = True
            break
    return found
