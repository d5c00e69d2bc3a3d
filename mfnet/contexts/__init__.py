"""Context modules: ``(B, C_in, h, w)`` to ``(B, C_out, h, w)``, exchangeable in a network.

To add one, write its file and name its class or function in ``CONTEXTS``: it is called as
``CONTEXTS[name](in_channels, out_channels, **options)``, and its further parameters become
keywords of :func:`mfnet.create_model`. One with an auxiliary loss derives from ``LossContext``.
"""

from collections.abc import Callable

from torch import nn

from mfnet.contexts.aspp import aspp, aspp_separable
from mfnet.contexts.base import LossContext
from mfnet.contexts.double_attention import DoubleAttentionContext
from mfnet.contexts.em import EMContext
from mfnet.contexts.hamburger import HamburgerContext, cd, nmf, vq
from mfnet.contexts.mf import MFContext
from mfnet.contexts.none import none

CONTEXTS: dict[str, Callable[..., nn.Module]] = {
    "mf": MFContext,
    "em": EMContext,
    "nmf": nmf,
    "vq": vq,
    "cd": cd,
    "double_attention": DoubleAttentionContext,
    "aspp": aspp,
    "aspp_separable": aspp_separable,
    "none": none,
}

__all__ = [
    "CONTEXTS",
    "DoubleAttentionContext",
    "EMContext",
    "HamburgerContext",
    "LossContext",
    "MFContext",
    "aspp",
    "aspp_separable",
    "cd",
    "nmf",
    "none",
    "vq",
]
