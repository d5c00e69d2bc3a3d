"""Probabilities of a network on images of any size: windows, scales, flips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from mfnet.normalization import Normalization

Forward = Callable[[Tensor], Tensor]
TILE = 1025  # 16 * 64 + 1, a size that features at stride 16 sample to its last pixel


class Prediction(NamedTuple):
    """Classes uint8 (H, W); where asked for, probabilities float16 (classes, H, W) too."""

    labels: Tensor
    probabilities: Tensor | None = None


@dataclass(frozen=True)
class Inference:
    """How images are shown to a network; by default whole, once.

    Probabilities (softmax) are averaged over scales and flips within a window, then over the
    windows that a pixel lies in, weighted by a ramp that falls to 0 at the windows' borders.

    Args:
        tile: side of the windows that larger images are cut into; ``None``: whole images. At scale
            s the network sees a window of s times that side.
        overlap: share of a window's side, in [0, 1), that its neighbors cover at least.
        scales: of the images, averaged.
        flip: average with the mirrored image, at each scale.

    Raises:
        ValueError: a value out of range.
    """

    tile: int | None = None
    overlap: float = 0.25
    scales: Sequence[float] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.tile is not None and self.tile < 1:
            raise ValueError(f"tile: expected a positive integer or none, got {self.tile}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap: expected a share in [0, 1), got {self.overlap}")
        if not self.scales or not all(0 < s < math.inf for s in self.scales):
            raise ValueError(f"scales: expected positive numbers, got {list(self.scales)}")

    def __str__(self) -> str:
        windows = f"in windows of {self.tile} x {self.tile}, overlap {self.overlap:g}"
        shown = "whole" if self.tile is None else f"{windows}, where larger"
        scales = ", ".join(f"{scale:g}" for scale in self.scales)
        return f"{shown}; at scale {scales}; {'mirrored, too' if self.flip else 'not mirrored'}"

    @property
    def is_plain(self) -> bool:
        """Whether this is no more than the network on whole images."""
        return self.tile is None and tuple(self.scales) == (1.0,) and not self.flip

    def probabilities(self, network: Forward, images: Tensor) -> Tensor:
        """Float32 (B, classes, H, W) of normalized images (B, C, H, W)."""
        return torch.cat(list(self._strips(network, images)), dim=-2)

    def predict(
        self,
        network: Forward,
        image: Tensor,
        normalization: Normalization,
        like: Tensor,
        size: Sequence[int] | None = None,
        probabilities: bool = False,
    ) -> Prediction:
        """The classes of one image, on the CPU; without probabilities asked for, memory is that of
        a row of windows beside the image and the labels.

        Args:
            network: logits (1, classes, h, w) of normalized images (1, C, h, w).
            image: uint8 (C, h, w).
            normalization: what the network wants.
            like: of the device and dtype that the network takes, ``like_images_of``.
            size: (H, W) of the result; default: the image's.
            probabilities: whether to return them too.
        """

        def on_window(window: Tensor) -> Tensor:
            pixels = tv.to_dtype(window.to(like.device), torch.float32, scale=True)
            return network(tv.normalize(pixels, *normalization).to(like.dtype))

        strips: Iterator[Tensor] = (strip[0] for strip in self._strips(on_window, image[None]))
        if size is not None and tuple(size) != tuple(image.shape[-2:]):
            strips = _resized_strips(torch.cat(list(strips), dim=-2), size)
        labels, kept = [], []
        for strip in strips:
            labels.append(strip.argmax(0).to(torch.uint8).cpu())
            if probabilities:
                kept.append(strip.half().cpu())
        return Prediction(
            torch.cat(labels, dim=-2), torch.cat(kept, dim=-2) if probabilities else None
        )

    def _strips(self, network: Forward, images: Tensor) -> Iterator[Tensor]:
        """The probabilities from top to bottom, in strips (B, classes, rows, W)."""
        height, width = images.shape[-2:]
        rows, columns = self._windows(height), self._windows(width)
        if len(rows) == len(columns) == 1:
            yield self._averaged(network, images)
            return
        (fade_y, total_y), (fade_x, total_x) = self._fade(rows), self._fade(columns)
        waiting: Tensor | None = None  # sums of the rows that the next windows reach into as well
        for index, (top, bottom) in enumerate(rows):
            strip: Tensor | None = None
            for left, right in columns:
                window = self._averaged(network, images[..., top:bottom, left:right])
                if strip is None:
                    strip = window.new_zeros(*window.shape[:-1], width)
                weight = (fade_x / total_x[left:right]).to(window)
                strip[..., left:right] += window * weight
            assert strip is not None  # there is a window in every row
            strip *= (fade_y / total_y[top:bottom]).to(strip)[:, None]
            if waiting is not None:
                strip[..., : waiting.shape[-2], :] += waiting
            done = (rows[index + 1][0] if index + 1 < len(rows) else bottom) - top
            waiting = strip[..., done:, :].clone()
            yield strip[..., :done, :]

    def _averaged(self, network: Forward, images: Tensor) -> Tensor:
        """Probabilities (B, classes, H, W) of a window, averaged over scales and flips."""
        size = images.shape[-2:]
        passes = len(self.scales) * (2 if self.flip else 1)
        total: Tensor | None = None
        for scale in self.scales:
            scaled = images
            if scale != 1:
                shape = [max(1, round(scale * side)) for side in size]
                scaled = tv.resize(images, shape, antialias=True)
            for mirrored in (False, True) if self.flip else (False,):
                logits = network(scaled.flip(-1) if mirrored else scaled).float()
                share = (logits.flip(-1) if mirrored else logits).softmax(1)
                if share.shape[-2:] != size:
                    share = F.interpolate(share, size, mode="bilinear")
                share = share.div_(passes)
                total = share if total is None else total.add_(share)
        assert total is not None  # there is at least one scale
        return total

    def _windows(self, length: int) -> list[tuple[int, int]]:
        """Windows of one size, evenly spaced from the first pixel to the last."""
        if self.tile is None or length <= self.tile:
            return [(0, length)]
        step = max(1, self.tile - round(self.overlap * self.tile))
        count = 1 + math.ceil((length - self.tile) / step)
        starts = [round(i * (length - self.tile) / (count - 1)) for i in range(count)]
        return [(start, start + self.tile) for start in starts]

    def _fade(self, windows: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The weights of a window's pixels along one side, and for each pixel their sum."""
        length = windows[0][1] - windows[0][0]
        ramp = max(1, round(self.overlap * length))
        # Of a dtype that is told: with bf16-true the default one is bfloat16.
        position = torch.arange(length, dtype=torch.float32) + 0.5
        fade = torch.minimum(position, length - position).div(ramp).clamp(max=1)
        total = position.new_zeros(windows[-1][1])
        for start, end in windows:
            total[start:end] += fade
        return fade, total


def like_images_of(network: nn.Module) -> Tensor:
    """A tensor of the device and dtype that a network's images are to have, those of its weights;
    on the CPU and float32 where it has none."""
    tensors = chain(network.parameters(), network.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0, dtype=torch.float32))


def _resized_strips(maps: Tensor, size: Sequence[int]) -> Iterator[Tensor]:
    """Maps (classes, h, w) bilinearly at another size, a strip of rows after the other."""
    height, width = size
    wide = F.interpolate(maps[None], (maps.shape[-2], width), mode="bilinear")
    rows = wide.shape[-2]
    for top in range(0, height, 256):
        # Where the rows' centers lie, as in bilinear interpolation without aligned corners.
        lines = torch.arange(top, min(top + 256, height)).to(maps) + 0.5
        place = (lines * rows / height - 0.5).clamp(0, rows - 1)
        above = place.long()
        below = (above + 1).clamp(max=rows - 1)
        share = (place - above)[:, None]
        yield (wide[..., above, :] * (1 - share) + wide[..., below, :] * share)[0]
