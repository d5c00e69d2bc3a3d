"""The two recipes: sizes, padding, alignment of image and mask, normalization."""

import pytest
import torch
from torchvision import tv_tensors

from mfnet.data import denormalize
from mfnet.data.transforms import (
    Rescale,
    eval_transform,
    train_transform,
)
from mfnet.normalization import IMAGENET, Normalization


def _pair(height, width, margin=12):
    """A white rectangle of class 1 on black of class 0; the margin is wide for odd rescalings."""
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[margin:-margin, margin:-margin] = 1
    image = (mask * 255).expand(3, -1, -1).contiguous()
    return tv_tensors.Image(image), tv_tensors.Mask(mask)


@pytest.mark.parametrize("recipe", ["paper", "modern"])
@pytest.mark.parametrize("size", [(61, 83), (90, 47)])
@pytest.mark.parametrize("crop", [(65, 65), (33, 49), (127, 129)])
@pytest.mark.parametrize("resize", [None, (71, 57)])
def test_train_sizes_and_types(recipe, size, crop, resize):
    transform = train_transform(recipe, crop, resize)
    for _ in range(5):
        image, mask = transform(*_pair(*size))
        assert image.shape == (3, *crop)
        assert mask.shape == crop
        assert (image.dtype, mask.dtype) == (torch.float32, torch.int64)
        assert type(image) is type(mask) is torch.Tensor
        assert set(mask.unique().tolist()) <= {0, 1, 255}


@pytest.mark.parametrize("size", [(61, 83), (90, 47), (65, 65), (500, 375)])
@pytest.mark.parametrize("crop", [(65, 65), (33, 49), (513, 513)])
def test_paper_evaluates_on_a_center_crop_without_padding(size, crop):
    image, mask = eval_transform("paper", crop)(*_pair(*size))
    assert image.shape == (3, *crop)
    assert mask.shape == crop
    assert (mask != 255).all()
    assert mask[crop[0] // 2, crop[1] // 2] == 1


def test_modern_evaluates_on_the_whole_image():
    image, mask = _pair(61, 83)
    for resize, expected in ((None, (61, 83)), ((31, 42), (31, 42))):
        out, labels = eval_transform("modern", (33, 33), resize)(image, mask)
        assert out.shape == (3, *expected)
        assert labels.shape == expected
    assert torch.equal(eval_transform("modern", (33, 33))(image, mask)[1], mask.long())


@pytest.mark.parametrize("recipe", ["paper", "modern"])
def test_image_and_mask_stay_aligned(recipe):
    transform = train_transform(recipe, (129, 129))
    for seed in range(10):
        torch.manual_seed(seed)
        image, mask = transform(*_pair(161, 183, margin=40))
        brightness = denormalize(image).float().mean(0)
        white, black = brightness[mask == 1], brightness[mask == 0]
        # Interpolation mixes the two within a pixel of their border.
        assert white.median() > black.median() + 100
        assert (white > 128).float().mean() > 0.95
        assert (black < 128).float().mean() > 0.9


def _shift(image, mask):
    """By how many pixels the border of the white part lies further left in the image."""
    row, labels = image[:, image.shape[1] // 2].mean(0), mask[mask.shape[0] // 2]
    white = ((row - row.min()) / (row.max() - row.min())).sum()
    return (white - (labels == 1).sum()).item()


_EDGES = {
    "modern, training": (train_transform("modern", (65, 81)), (200, 243)),
    "modern, training, resized": (train_transform("modern", (65, 81), (180, 217)), (120, 243)),
    "paper, training": (train_transform("paper", (65, 81)), (200, 243)),
}


@pytest.mark.parametrize("case", _EDGES)
def test_labels_lie_on_their_pixels_in_training(case):
    transform, (height, width) = _EDGES[case]
    right = torch.zeros(height, width, dtype=torch.uint8)
    right[:, round(0.382 * width) :] = 1
    image = tv_tensors.Image((right * 255).expand(3, -1, -1).contiguous())
    shifts = []
    for seed in range(400):
        torch.manual_seed(seed)
        out, mask = transform(image, tv_tensors.Mask(right))
        # Both parts well in the crop, white on the right: every shift has the same sign.
        if mask[32, :4].eq(0).all() and mask[32, -4:].eq(1).all() and mask[32].ne(255).all():
            shifts.append(_shift(out, mask))
    assert len(shifts) > 60
    # Of one sample up to half a pixel: there are no labels between the pixels.
    assert abs(sum(shifts) / len(shifts)) < 0.08


@pytest.mark.parametrize("resize", [(120, 160), (31, 45), (97, 107), (360, 479)])
def test_resized_labels_are_those_at_the_pixels_centers(resize):
    # Odd sizes: no center of a new pixel lies on the border of two old ones.
    board = torch.arange(201)[:, None].add(torch.arange(243)).remainder(2).to(torch.uint8)
    image = tv_tensors.Image(board.mul(255).expand(3, -1, -1).contiguous())
    for transform in (
        eval_transform("modern", (33, 33), resize),
        Rescale(cover=resize),
    ):
        mask = transform(image, tv_tensors.Mask(board))[1]
        rows, columns = (
            torch.arange(new).mul(2).add(1).mul(old) // (2 * new)
            for new, old in zip(mask.shape, board.shape, strict=True)
        )
        assert torch.equal(mask.to(torch.uint8), board[rows][:, columns])


@pytest.mark.parametrize("recipe", ["paper", "modern"])
def test_padding_is_ignored_and_of_the_mean_color(recipe):
    transform = train_transform(recipe, (97, 97))
    padded = 0
    for seed in range(10):
        torch.manual_seed(seed)
        image, mask = transform(*_pair(40, 40))
        # Blur mixes colors across 3 pixels.
        inside = (mask != 255).float()[None, None]
        outside = torch.nn.functional.max_pool2d(inside, 7, 1, 3)[0, 0] == 0
        padded += outside.any().item()
        if recipe == "paper" and outside.any():
            assert image[:, outside].abs().max() < 0.02
    assert padded > 0


def test_every_other_image_of_the_papers_recipe_is_blurred():
    board = torch.arange(65)[:, None].add(torch.arange(65)).remainder(2).to(torch.uint8)
    image = tv_tensors.Image(board.mul(255).expand(3, -1, -1).contiguous())
    transform = train_transform("paper", (65, 65))
    transform.transforms = transform.transforms[2:]  # behind flip and rescaling
    torch.manual_seed(0)
    contrasts = [transform(image, tv_tensors.Mask(board))[0].std() for _ in range(100)]
    sharp = sum(contrast > 0.99 * max(contrasts) for contrast in contrasts)
    assert 40 < sharp < 75  # a few of the others are blurred by next to nothing
    assert min(contrasts) < 0.1 * max(contrasts)


def test_flip_happens_in_about_half_the_samples():
    transform = train_transform("modern", (33, 33))
    left = tv_tensors.Mask(torch.zeros(33, 33, dtype=torch.uint8))
    left[:, :16] = 1
    image = tv_tensors.Image(torch.zeros(3, 33, 33, dtype=torch.uint8))
    torch.manual_seed(0)
    flipped = 0
    for _ in range(100):
        _, mask = transform(image, left)
        columns = torch.arange(33).expand(33, 33)
        flipped += columns[mask == 1].float().mean() > columns[mask == 0].float().mean()
    assert 30 < flipped < 70


def test_scales_cover_the_range():
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.zeros(3, 100, 60, dtype=torch.uint8))
    heights = [Rescale((0.5, 2.0))(image).shape[-2] for _ in range(200)]
    assert 50 <= min(heights) < 60
    assert 190 < max(heights) <= 200
    covered = [Rescale((0.5, 2.0), cover=(30, 30))(image).shape[-1] for _ in range(200)]
    assert 15 <= min(covered) < 18
    assert 57 < max(covered) <= 60


@pytest.mark.parametrize("normalization", [IMAGENET, Normalization((0.5,) * 3, (0.25,) * 3)])
def test_normalization_and_its_inverse(normalization):
    image = tv_tensors.Image(torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8))
    out = eval_transform("modern", (40, 50), normalization=normalization)(image)
    mean, std = (torch.tensor(values)[:, None, None] for values in normalization)
    torch.testing.assert_close(out, (image / 255 - mean) / std)
    undone = denormalize(out, normalization)
    assert torch.equal(undone, image.as_subclass(torch.Tensor))
    assert torch.equal(denormalize(out[None], normalization)[0], undone)


def test_training_pads_with_the_mean_of_its_own_normalization():
    transform = train_transform(
        "paper", (97, 97), normalization=Normalization((0.5,) * 3, (1,) * 3)
    )
    torch.manual_seed(1)
    image, mask = transform(*_pair(40, 40))
    assert mask[0, 0] == 255
    assert image[:, 0, 0].abs().max() < 0.01
