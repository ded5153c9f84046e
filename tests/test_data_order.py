"""The order of the training images: a function of seed and epoch, shared out over ranks, grouped by shape."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adapters.detection.data import CocoDataModule, DataError, SyntheticSettings, generate_dataset
from adapters.detection.data.order import BatchOrder, epoch_order, seed_of


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**40), st.booleans())
def test_ranks_share_the_images_out(num_images, batch_size, world_size, seed, grouped):
    groups = [i % 3 == 0 for i in range(num_images)] if grouped else None
    if num_images < batch_size * world_size and world_size > 1:
        with pytest.raises(ValueError, match="too few"):
            epoch_order(num_images, batch_size, seed, rank=0, world_size=world_size, groups=groups)
        return
    shares = [
        epoch_order(num_images, batch_size, seed, rank=rank, world_size=world_size, groups=groups)
        for rank in range(world_size)
    ]
    seen = [index for share in shares for index in share]
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(num_images))
    assert len({len(share) for share in shares}) == 1
    left_out = num_images - len(seen)
    assert left_out < batch_size * world_size
    assert num_images >= batch_size * world_size or left_out == 0


def test_batches_are_of_one_group_but_for_the_rest():
    groups = [int(i % 3 == 0) for i in range(64)]
    order = epoch_order(64, 4, 0, groups=groups)
    batches = [order[i : i + 4] for i in range(0, 64, 4)]
    mixed = [batch for batch in batches if len({groups[i] for i in batch}) > 1]
    assert len(mixed) <= 1 and sorted(order) == list(range(64))
    assert order != epoch_order(64, 4, 1, groups=groups)
    assert batches != sorted(batches)


def test_seeds_differ():
    seeds = {seed_of(a, b) for a in range(30) for b in range(30)} | {seed_of(123), seed_of(1, 2, 3)}
    assert len(seeds) == 30 * 30 + 2
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_resumed_order_goes_on_where_it_was():
    order = BatchOrder([3, 1, 2, 0], start=2)
    assert len(order) == 4 and list(order) == [2, 0]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order") / "data"
    return generate_dataset(folder, SyntheticSettings(train_images=9, val_images=5, image_size=64), progress=False)


class Seen(L.LightningModule):
    """Records the images of every step."""

    def __init__(self):
        super().__init__()
        self.layer, self.images, self.validated = nn.Linear(1, 1), [], []

    def training_step(self, batch, batch_idx):
        self.images.append([(target["image_id"], image.sum().item()) for image, target in zip(*batch, strict=True)])
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def images_of(root, num_workers):
    data = CocoDataModule(root, batch_size=2, num_workers=num_workers, verify=False, progress=False)
    module = Seen()
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, reload_dataloaders_every_n_epochs=1, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module.images


def test_neither_loading_processes_nor_epochs_repeat_draws(root):
    """Flips come out the same with and without loading processes, and differ from epoch to epoch."""
    alone = images_of(root, 0)
    assert alone == images_of(root, 2)
    assert len(alone) == 8 and alone[:4] != alone[4:]


def test_a_rank_without_validation_images_of_its_own_sees_one_again(tmp_path):
    """Lightning stops a rank that has none, and the others with it; the evaluation counts an image once."""
    settings = SyntheticSettings(train_images=2, val_images=1, image_size=64)
    data = CocoDataModule(generate_dataset(tmp_path / "data", settings, progress=False), batch_size=2, progress=False)
    data.setup()
    data.trainer = SimpleNamespace(global_rank=1, world_size=2, current_epoch=0)
    (_, targets), *rest = data.val_dataloader()
    assert not rest and [target["image_id"] for target in targets] == [data.val_dataset.annotations.images[0]["id"]]
    with pytest.raises(DataError, match="too few for 2 processes"):
        data.train_dataloader()
