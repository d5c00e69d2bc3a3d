"""Loaders and samplers: order, seeds, shards, batches; and the arguments."""

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from made_up import write_image, write_mask
from quiet import quiet_trainer

from mfnet.data import PascalVOC, Synthetic, VOCFolder
from mfnet.data.dataset import TrainSampler, collate, shard_sampler


def test_last_batch_may_be_of_one_image(folder):
    data = VOCFolder(str(folder), crop_size=(33, 45), batch_size=2, num_workers=0)
    data.setup("fit")
    assert [len(images) for images, _ in data.train_dataloader()] == [2, 2, 1]
    images, masks = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 33, 45)
    assert masks.shape == (2, 33, 45)


def test_batches_do_not_depend_on_the_workers(folder):
    epochs = []
    for num_workers in (0, 2):
        data = VOCFolder(str(folder), crop_size=33, batch_size=2, num_workers=num_workers)
        data.setup("fit")
        loader = data.train_dataloader()
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            epochs.append(torch.cat([images for images, _ in loader]))
    torch.testing.assert_close(epochs[0], epochs[2], rtol=0, atol=0)
    torch.testing.assert_close(epochs[1], epochs[3], rtol=0, atol=0)
    assert not torch.equal(epochs[0], epochs[1])


def test_loading_leaves_the_global_random_state_alone(folder):
    data = VOCFolder(str(folder), crop_size=33, num_workers=0)
    data.setup("fit")
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_seed_everything_seeds_the_data(folder, monkeypatch):
    def first_epoch():
        data = VOCFolder(str(folder), crop_size=33, num_workers=0)
        data.setup("fit")
        return torch.cat([images for images, _ in data.train_dataloader()])

    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    one, again = first_epoch(), first_epoch()
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert torch.equal(one, again)
    assert not torch.equal(one, first_epoch())


def test_an_overfitted_epoch_is_in_order(folder):
    data = VOCFolder(str(folder), crop_size=33, num_workers=0)
    data.setup("fit")
    data.trainer = quiet_trainer(overfit_batches=1)
    assert [index for index, _ in data.train_dataloader().sampler] == [0, 1, 2, 3, 4]


def test_n_processes_see_what_one_with_the_n_fold_batch_sees():
    dataset = range(12)
    whole = list(TrainSampler(dataset, 1, 0, seed=7))
    halves = [list(TrainSampler(dataset, 2, rank, seed=7)) for rank in (0, 1)]
    for step in range(3):  # batches of 4, or twice 2
        union = halves[0][2 * step : 2 * step + 2] + halves[1][2 * step : 2 * step + 2]
        assert sorted(union) == sorted(whole[4 * step : 4 * step + 4])
    assert sorted(index for index, _ in whole) == list(dataset)
    assert [index for index, _ in whole] != list(dataset)
    assert len({seed for _, seed in whole}) == 12


def test_a_process_without_a_sample_is_an_error():
    with pytest.raises(ValueError, match="got 3 samples for 4 processes"):
        shard_sampler(range(3), 4, 0)
    assert list(shard_sampler(range(7), 3, 1)) == [1, 4]  # no more, as 2 and 5 are another's


def test_whole_images_of_several_sizes(folder):
    write_image(folder / "JPEGImages" / "y.jpg", size=(35, 61), value=255)
    write_mask(folder / "SegmentationClass" / "y.png", torch.ones(35, 61))
    data = VOCFolder(str(folder), num_workers=0)
    data.setup("validate")
    assert [tuple(m.shape) for _, m in data.val_dataloader()] == [
        (1, 40, 50),
        (1, 35, 61),
        (1, 40, 50),
    ]
    data = VOCFolder(str(folder), eval_batch_size=3, num_workers=0)
    data.setup("validate")
    [(images, masks)] = data.val_dataloader()
    assert images.shape == (3, 3, 40, 61)
    assert masks.shape == (3, 40, 61)
    assert (masks[1, 35:] == 255).all()
    assert (masks[0, :, 50:] == 255).all()
    assert (images[1, :, 35:] == 0).all()
    assert (masks[1, :35] == 1).all()
    assert (images[1, :, :35] > 2).all()


def test_collate_leaves_equal_sizes_as_they_are():
    samples = [(torch.rand(3, 5, 7), torch.zeros(5, 7, dtype=torch.int64)) for _ in range(2)]
    images, masks = collate(samples)
    assert torch.equal(images, torch.stack([image for image, _ in samples]))
    assert masks.shape == (2, 5, 7)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 1),
        ({"recipe": "paper"}, 6),
        ({"resize": (33, 40)}, 6),
        ({"resize": (33, 40), "eval_batch_size": 2}, 2),
    ],
)
def test_default_batch_size_in_validation(folder, arguments, expected):
    assert VOCFolder(str(folder), batch_size=6, **arguments).eval_batch_size == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "old"}, "recipe: expected 'paper' or 'modern', got 'old'"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size: expected at least 1, got 0"),
        ({"num_workers": -1}, "num_workers: expected at least 0, got -1"),
        ({"crop_size": 0}, r"crop_size: expected a positive integer or \(height, width\), got 0"),
        ({"resize": (3, 4, 5)}, r"resize: expected .* got \(3, 4, 5\)"),
    ],
)
def test_bad_arguments_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        VOCFolder(str(folder), **arguments)


@pytest.mark.parametrize("module", [VOCFolder, PascalVOC, Synthetic])
def test_every_flag_has_help(module):
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(module, "data")
    flags = {a.dest: a.help for a in parser._actions if a.dest.startswith("data.")}
    assert "data.batch_size" in flags
    assert "data.predict_images" in flags
    assert all(flags.values()), flags


def test_camvid(camvid):
    data = VOCFolder(
        str(camvid), resize=(180, 240), crop_size=(161, 161), batch_size=2, num_workers=0
    )
    assert data.class_names[:3] == ["sky", "building", "pole"]
    assert data.palette[:2] == [(128, 128, 128), (128, 0, 0)]
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (367, 101)
    images, masks = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 161, 161)
    assert set(masks.unique().tolist()) <= {*range(11), 255}
    images, masks = next(iter(data.val_dataloader()))
    assert images.shape == (2, 3, 180, 240)
    assert masks.shape == (2, 180, 240)
    assert 0.2 < images.std() < 2
