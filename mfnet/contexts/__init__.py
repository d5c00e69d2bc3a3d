"""Context modules: ``(B, C_in, h, w)`` to ``(B, C_out, h, w)``, exchangeable in a network.

To add one, write its file and name its class or function in ``CONTEXTS``: it is called as
``CONTEXTS[name](in_channels, out_channels, **options)``, and its further parameters become
keywords of ``mfnet.create_model`` (one called ``num_classes`` gets the network's). One with an
auxiliary loss derives from ``LossContext``.
"""

from collections.abc import Callable

from torch import nn

from mfnet.contexts.aspp import aspp, aspp_separable
from mfnet.contexts.base import LossContext
from mfnet.contexts.double_attention import DoubleAttentionContext
from mfnet.contexts.em import EMContext
from mfnet.contexts.encoding import EncodingContext
from mfnet.contexts.hamburger import HamburgerContext, cd, nmf, vq
from mfnet.contexts.mf import MFContext
from mfnet.contexts.none import none
from mfnet.contexts.nonlocal_ import NonLocalContext
from mfnet.contexts.ppm import PPMContext

CONTEXTS: dict[str, Callable[..., nn.Module]] = {
    "mf": MFContext,
    "em": EMContext,
    "nmf": nmf,
    "vq": vq,
    "cd": cd,
    "double_attention": DoubleAttentionContext,
    "aspp": aspp,
    "aspp_separable": aspp_separable,
    "ppm": PPMContext,
    "encoding": EncodingContext,
    "nonlocal": NonLocalContext,
    "none": none,
}

__all__ = [
    "CONTEXTS",
    "DoubleAttentionContext",
    "EMContext",
    "EncodingContext",
    "HamburgerContext",
    "LossContext",
    "MFContext",
    "NonLocalContext",
    "PPMContext",
    "aspp",
    "aspp_separable",
    "cd",
    "nmf",
    "none",
    "vq",
]
