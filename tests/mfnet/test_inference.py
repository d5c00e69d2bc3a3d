"""Windows, scales and flips: the same answer as the whole image's, in bounded memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mfnet.inference import Inference
from mfnet.normalization import Normalization

PLAIN = Normalization((0.0,) * 3, (1.0,) * 3)


def pointwise(images):
    """A network that looks at each pixel alone."""
    return torch.cat((5 * images, -images.sum(1, keepdim=True)), dim=1)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    tile=st.integers(1, 40),
    overlap=st.floats(0, 0.9),
)
def test_windows_are_no_more_than_a_way_to_compute(size, tile, overlap):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    seen = []

    def network(window):
        seen.append(max(window.shape[-2:]))
        return pointwise(window)

    averaged = Inference(tile=tile, overlap=overlap).probabilities(network, images)
    torch.testing.assert_close(averaged, pointwise(images).softmax(1))
    assert max(seen) <= tile


def test_no_seams():
    """A network that contradicts itself from window to window is blended, without a step."""
    calls = []

    def network(window):
        calls.append(None)
        sign = 1 if len(calls) % 2 else -1
        return torch.stack((torch.full_like(window[:, 0], 2.0 * sign), window[:, 0] * 0), dim=1)

    averaged = Inference(tile=40, overlap=0.5).probabilities(network, torch.zeros(1, 3, 40, 100))
    assert len(calls) == 4
    steps = averaged[0, 0, 0].diff().abs()
    assert steps.max() < 1.5 * (averaged.max() - averaged.min()) / 20
    assert steps.max() > 0


def test_a_network_that_sees_its_neighborhood_differs_at_no_window_border():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    images = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        whole = network(images).softmax(1)
        tiled = Inference(tile=32, overlap=0.5).probabilities(network, images)
    # Two pixels at a window's border see zeros where the image goes on: they weigh least.
    assert (tiled - whole).abs().max() < 0.2 * (whole.max() - whole.min())
    assert (tiled - whole).abs().mean() < 0.01


def test_scales_and_flips_are_averaged():
    torch.manual_seed(0)
    network = nn.Conv2d(3, 4, 3, padding=1)
    images = torch.randn(2, 3, 24, 36)
    with torch.no_grad():
        expected = torch.zeros(2, 4, 24, 36)
        for size in ((12, 18), (24, 36), (36, 54)):
            shrunk = size == (12, 18)
            scaled = F.interpolate(images, size, mode="bilinear", antialias=shrunk)
            for turn in (lambda x: x, lambda x: x.flip(-1)):
                share = turn(network(turn(scaled)).softmax(1))
                expected += F.interpolate(share, (24, 36), mode="bilinear") / 6
        averaged = Inference(scales=(0.5, 1, 1.5), flip=True).probabilities(network, images)
    torch.testing.assert_close(averaged, expected)


@pytest.mark.parametrize("tile", [None, 20])
@pytest.mark.parametrize("size", [(30, 50), (45, 77), (600, 31)])
def test_prediction_at_any_size(tile, size):
    image = torch.randint(0, 256, (3, 30, 50), dtype=torch.uint8)
    images = image[None] / 255
    got = Inference(tile=tile).predict(pointwise, image, PLAIN, images, size, probabilities=True)
    probabilities = pointwise(images).softmax(1)
    expected = F.interpolate(probabilities, size, mode="bilinear")[0]
    assert got.labels.dtype == torch.uint8
    assert got.labels.shape == size
    assert got.probabilities.dtype == torch.float16
    torch.testing.assert_close(got.probabilities.float(), expected, rtol=1e-3, atol=1e-3)
    agree = (got.labels == expected.argmax(0)).float().mean()
    assert agree > 0.999  # ties apart
    without = Inference(tile=tile).predict(pointwise, image, PLAIN, images, size)
    assert without.probabilities is None
    assert torch.equal(without.labels, got.labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 0}, "tile: expected a positive integer or none, got 0"),
        ({"overlap": 1.0}, r"overlap: expected a share in \[0, 1\), got 1.0"),
        ({"scales": ()}, r"scales: expected positive numbers, got \[\]"),
        ({"scales": (1.0, 0.0)}, r"scales: expected positive numbers, got \[1.0, 0.0\]"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        Inference(**arguments)
