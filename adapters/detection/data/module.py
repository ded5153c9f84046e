"""The data of one run as a `LightningDataModule`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from adapters.detection.data.coco import (
    CocoDetection,
    DataError,
    find_splits,
    merge_categories,
    read_annotations,
    verify_images,
)

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class CocoDataModule(L.LightningDataModule):
    """Train and validation split of a folder in the COCO-2017 layout.

    The order of the training images depends on the seed and the epoch only, so that a resumed run sees the same
    batches as an uninterrupted one. That needs ``Trainer(reload_dataloaders_every_n_epochs=1)``.

    Args:
        root: The folder.
        batch_size: Images per batch.
        num_workers: Processes that load images; 0 loads them in the main process.
        seed: Seed of the order of the images.
        flip_probability: Probability of the horizontal flip that augments the training images.
        limit_train_images: Use the first images only (None: all).
        limit_val_images: The same for the validation.
        verify: Whether `setup` decodes every image once, to find bad ones before the training.
        progress: Whether to show a progress bar while doing so.

    Attributes:
        train_dataset: The training images, after `setup`.
        val_dataset: The validation images, after `setup`.
        single_split: The name of the split when one has to serve for both, else None.

    Raises:
        ValueError: A number is out of range.
    """

    train_dataset: CocoDetection
    val_dataset: CocoDetection

    def __init__(
        self,
        root: str | Path,
        *,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
        flip_probability: float = 0.5,
        limit_train_images: int | None = None,
        limit_val_images: int | None = None,
        verify: bool = True,
        progress: bool = True,
    ) -> None:
        super().__init__()
        limits = {"limit_train_images": limit_train_images, "limit_val_images": limit_val_images}
        for name, value in {"batch_size": batch_size, **limits}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.root = Path(root)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.flip_probability = flip_probability
        self.limit_train_images = limit_train_images
        self.limit_val_images = limit_val_images
        self.verify = verify
        self.progress = progress
        self.single_split: str | None = None
        self._is_set_up = False

    def setup(self, stage: str | None = None) -> None:
        """Reads the annotation files and, with ``verify``, checks the images.

        Raises:
            DataError: Something is missing or unusable; the message names the file.
        """
        if self._is_set_up:
            return
        train_split, val_split = find_splits(self.root)
        train = read_annotations(self._annotation_file(train_split))
        if train_split == val_split:
            self.single_split, val = train_split, train
        else:
            val = read_annotations(self._annotation_file(val_split))
        categories = merge_categories(train, val)
        train, val = train.head(self.limit_train_images), val.head(self.limit_val_images)
        if self.verify:
            checks = [(train, train_split), (val, val_split)]
            if self.single_split:  # one selection is part of the other
                checks = [max(checks, key=lambda check: len(check[0].images))]
            for annotations, split in checks:
                verify_images(annotations, self.root / split, progress=self.progress)
        flip = v2.RandomHorizontalFlip(self.flip_probability)
        self.train_dataset = CocoDetection(train, self.root / train_split, categories=categories, transforms=flip)
        self.val_dataset = CocoDetection(val, self.root / val_split, categories=categories)
        if self.train_dataset.box_report.used == 0:
            raise DataError(f"annotation file {train.path} has no usable box for the images: nothing to train on")
        truth = self.val_dataset.ground_truth()["annotations"]
        if not any(not entry["iscrowd"] and min(entry["bbox"][2:]) > 0 for entry in truth):
            raise DataError(f"annotation file {val.path} has no usable box for the images: nothing to evaluate on")
        self._is_set_up = True

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of the current epoch; a last, incomplete batch is left out if there are others."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        seed = hash((self.seed, epoch)) % 2**63
        # Neither the order nor the workers' seeds may depend on how often Lightning asks for an iterator, which it
        # does once more in a run that was not resumed: hence a list in place of a sampler that draws when asked.
        order = torch.randperm(len(self.train_dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        return DataLoader(
            self.train_dataset,
            batch_size=self.batch_size,
            sampler=order,
            drop_last=len(self.train_dataset) >= self.batch_size,  # BatchNorm dislikes a batch of one
            num_workers=self.num_workers,
            collate_fn=collate,
            worker_init_fn=partial(_seed_worker, seed),
            generator=torch.Generator().manual_seed(seed),  # leaves the global one, which augmentation uses, alone
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation images in the order of the file."""
        return DataLoader(
            self.val_dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )

    def _annotation_file(self, split: str) -> Path:
        return self.root / "annotations" / f"instances_{split}.json"


def _seed_worker(seed: int, worker: int) -> None:
    """Seeds a loading process; a function of this module, because it is sent there."""
    torch.manual_seed((seed + worker + 1) % 2**63)


def collate(items: list[tuple[Tensor, dict[str, Any]]]) -> Batch:
    """Images of different sizes cannot be stacked: torchvision's detectors take lists."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)
