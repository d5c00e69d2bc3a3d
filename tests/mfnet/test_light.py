"""MFNet Light: projections, the order of its operations, and the rank of its logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mfnet import create_model
from mfnet.flops import count_flops
from mfnet.light import FactorizedDecoder, Projection, PyramidContext


@pytest.mark.parametrize(
    ("backbone", "size", "classes", "parameters", "gflops"),
    [
        ("tf_efficientnet_lite0", (240, 320), 11, 3_392_531, 1.39),
        ("resnet50", (512, 512), 21, 24_801_629, 47.59),
    ],
)
def test_what_it_costs(
    backbone: str, size: tuple[int, int], classes: int, parameters: int, gflops: float
) -> None:
    with torch.device("meta"):
        model = create_model("mfnet_light", classes, backbone)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert count_flops(model, size) / 1e9 == pytest.approx(gflops, abs=0.006)


def test_a_projection_is_two_convolutions() -> None:
    projection = Projection(5, 8).double()
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    weights = (projection.inner, projection.outer)
    expected = x
    for weight in weights:
        expected = F.conv2d(expected, weight[:, :, None, None])
    torch.testing.assert_close(projection(x), expected)


def test_projecting_first_is_projecting_last() -> None:
    """Of features of stride 16 on those of stride 8: the sum is that of a convolution of both,
    concatenated at stride 8."""
    context = PyramidContext((5, 6), 8).double()
    fine = torch.randn(2, 5, 12, 10, dtype=torch.float64)
    coarse = torch.randn(2, 6, 6, 5, dtype=torch.float64)
    upsampled = F.interpolate(coarse, size=(12, 10), mode="bilinear", align_corners=False)
    weight = torch.cat([lateral.outer @ lateral.inner for lateral in context.laterals], dim=1)
    expected = F.conv2d(torch.cat((fine, upsampled), dim=1), weight[:, :, None, None])
    torch.testing.assert_close(context((fine, coarse)), expected)


def test_context_is_of_rank_k_and_at_the_finer_resolution() -> None:
    torch.manual_seed(0)
    decoder = FactorizedDecoder(16, 5, num_classes=7, rank=3).double().eval()
    summed = torch.randn(1, 16, 6, 5, dtype=torch.float64)
    low = torch.randn(1, 5, 12, 10, dtype=torch.float64)
    guide = decoder.guide(summed, low)
    context = decoder.logits(decoder.coarse(summed), guide) - decoder.linear(guide)
    assert context.shape == (1, 7, 12, 10)
    assert torch.linalg.matrix_rank(context.flatten(2)[0]) == 3
    torch.testing.assert_close(decoder(summed, low), decoder.linear(guide) + context)


def test_a_pixel_sees_the_whole_image_through_the_bases_alone() -> None:
    """Rows below the receptive field of a corner move its logits, unless P is 0."""
    torch.manual_seed(0)
    decoder = FactorizedDecoder(16, 5, num_classes=7, rank=3).eval()
    summed, low = torch.randn(1, 16, 12, 4), torch.randn(1, 5, 24, 8)
    other = summed.clone()
    other[..., 6:, :] += 1

    def corner(s: torch.Tensor) -> torch.Tensor:
        return decoder(s, low)[..., 0, 0]

    assert (corner(summed) - corner(other)).abs().max() > 1e-4
    nn.init.zeros_(decoder.columns[1].weight)
    torch.testing.assert_close(corner(summed), corner(other))


def test_builds_without_memory() -> None:
    with FakeTensorMode():
        model = create_model("mfnet_light", backbone="resnet18", rank=8, width=32).eval()
        with torch.no_grad():
            assert model(torch.empty(2, 3, 65, 97)).shape == (2, 21, 65, 97)
