"""The data of one run as a `LightningDataModule`."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from adapters.detection.data.annotations import DataError, merge_categories
from adapters.detection.data.coco import CocoDetection
from adapters.detection.data.image_files import find_bad_images, is_too_thin, verify_images
from adapters.detection.data.order import BatchOrder, epoch_order, seed_of
from adapters.detection.data.splits import Split, read_splits, read_test_split

Batch = tuple[list[Tensor], list[dict[str, Any]]]

BAD_DATA = ("error", "skip")


class CocoDataModule(L.LightningDataModule):
    """Train and validation split of a folder in the layout of COCO or of Pascal VOC.

    The order of the training images and their augmentation depend on the seed and the epoch only, so that a resumed run
    sees the same batches as an uninterrupted one, however many processes load them. That needs
    ``Trainer(reload_dataloaders_every_n_epochs=1)`` and, with several ranks, ``use_distributed_sampler=False``: every
    rank has its own share here. A run that is resumed inside an epoch with another number of images per step repeats
    or leaves out some images of that epoch, and says so.

    Args:
        root: The folder, see `adapters.detection.data.splits.read_splits`.
        batch_size: Images per batch and process.
        num_workers: Processes that load images; 0 loads them in the main process.
        seed: Seed of the order of the images.
        flip_probability: Probability of the horizontal flip that augments the training images.
        group_by_aspect: Batches of upright or of wide images only, which need less padding.
        train_split: Name of the split for training. Default: "train2017"; VOC: "train" or "trainval".
        val_split: Name of the split for validation. Default: "val2017"; VOC: "val" or "test".
        test_split: Name of the split for ``test``, such as "test-dev2017"; it needs no annotations. Default: that of
            the validation.
        limit_train_images: Use the first images only (None: all).
        limit_val_images: The same for the validation.
        verify: Whether `setup` decodes every image once, to find bad ones before the training. Of several processes on
            a machine the first does so; to skip bad images all do, for all must know them.
        bad_data: "error": an image that is missing, unreadable, not of the size in its annotation or too thin to be
            resized, whose entry has no size or whose xml cannot be read, or an annotation of an unknown category, is a
            `DataError`. "skip": it is left out and counted. (Boxes without area are left out and counted in any case:
            COCO has some.)
        progress: Whether to show a progress bar while doing so.

    Attributes:
        train_dataset: The training images, after `setup`.
        val_dataset: The validation images, after `setup`.
        single_split: The name of the split when one has to serve for both, else None.
        skipped: What was wrong with every image that was left out, a line each.

    Raises:
        ValueError: A number is out of range or a name is not known.
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
        group_by_aspect: bool = False,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        limit_train_images: int | None = None,
        limit_val_images: int | None = None,
        verify: bool = True,
        bad_data: str = "error",
        progress: bool = True,
    ) -> None:
        super().__init__()
        limits = {"limit_train_images": limit_train_images, "limit_val_images": limit_val_images}
        for name, value in {"batch_size": batch_size, **limits}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"flip_probability must be between 0 and 1, got {flip_probability}")
        if bad_data not in BAD_DATA:
            raise ValueError(f"unknown bad_data {bad_data!r}: choose one of {list(BAD_DATA)}")
        self.root = Path(root)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.flip_probability = flip_probability
        self.group_by_aspect = group_by_aspect
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.limit_train_images = limit_train_images
        self.limit_val_images = limit_val_images
        self.verify = verify
        self.bad_data = bad_data
        self.progress = progress
        self.single_split: str | None = None
        self.skipped: list[str] = []
        self._is_set_up = False
        self._images_per_step: int | None = None  # of the run that is resumed

    @property
    def num_classes(self) -> int:
        """Number of labels, the background included; sets the data up."""
        self.setup()
        return self.train_dataset.num_classes

    def describe(self) -> dict[str, Any]:
        """What a checkpoint should remember of the data: plain values only."""
        self.setup()
        return {
            "root": str(self.root.resolve()),
            "categories": dict(self.train_dataset.categories),
            "batch_size": self.batch_size,
            "limit_val_images": self.limit_val_images,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the seed: how many images a step takes."""
        return {"images_per_step": self._images_of_a_step()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up how many images a step took in the run that is resumed."""
        self._images_per_step = state_dict["images_per_step"]

    def _images_of_a_step(self) -> int:
        return self.batch_size * (self.trainer.world_size if self.trainer else 1)

    def report(self) -> str:
        """What was found in the data, in a few lines."""
        self.setup()
        lines = [
            f"{name}: {len(dataset)} images, {len(dataset.categories)} classes, {dataset.box_report}"
            for name, dataset in (("train", self.train_dataset), ("val", self.val_dataset))
        ]
        if self.single_split:
            lines.append(f"only the split {self.single_split} is there: it serves for training and for validation")
        if self.skipped:
            lines.append(f"left out: {len(self.skipped)} images that cannot be used; the first: {self.skipped[0]}")
        return "\n".join(lines)

    def setup(self, stage: str | None = None) -> None:
        """Reads the annotation files and, with ``verify``, checks the images.

        Raises:
            DataError: Something is missing or unusable; the message names the file.
        """
        if self._is_set_up:
            return
        skip = self.bad_data == "skip"
        train, val = read_splits(self.root, self.train_split, self.val_split, skip_bad=skip)
        self.single_split = train.name if train.name == val.name else None
        for split in (train,) if self.single_split else (train, val):
            self._leave_out(split.name, split.annotations.skipped)
        categories = merge_categories(train.annotations, val.annotations)
        train, val = self._usable(_head(train, self.limit_train_images), _head(val, self.limit_val_images))
        flip = v2.RandomHorizontalFlip(self.flip_probability)
        self.train_dataset = CocoDetection(train.annotations, train.folder, categories=categories, transforms=flip)
        self.val_dataset = CocoDetection(val.annotations, val.folder, categories=categories)
        self._check_boxes()
        self._is_set_up = True

    def _check_boxes(self) -> None:
        truth = self.val_dataset.ground_truth()["annotations"]
        usable = {
            "train on": (self.train_dataset, self.train_dataset.box_report.used > 0),
            "evaluate on": (self.val_dataset, any(not e["iscrowd"] and min(e["bbox"][2:]) > 0 for e in truth)),
        }
        for what, (dataset, is_usable) in usable.items():
            if not is_usable:
                path = dataset.annotations.path
                raise DataError(f"annotation file {path} has no usable box for the images: nothing to {what}")

    def refuse_thin_images(self, longest: int) -> None:
        """Nothing would be left of the shorter side of an image so long and thin: the training would end at its turn.

        Under ``bad_data="skip"`` such images are left out of the data sets and counted.

        Args:
            longest: Limit of the longer side that images are resized to, pixels.

        Raises:
            DataError: There is such an image, or nothing else is there to be used; the message names it.
        """
        self.setup()
        seen: set[Path] = set()  # one split may serve for all
        for name in ("train_dataset", "val_dataset", "test_dataset"):
            dataset: CocoDetection | None = self.__dict__.get(name)  # the test set where it was asked for
            thin = {} if dataset is None else _thin_images(dataset, longest)
            if dataset is None or not thin:
                continue
            faults = [fault for path, fault in thin.values() if path not in seen]
            if self.bad_data == "error" or len(thin) == len(dataset):
                raise DataError(next(fault for _, fault in thin.values()))
            self._leave_out(dataset.folder.name, faults)
            seen |= {path for path, _ in thin.values()}
            setattr(self, name, dataset.without(thin))
        self._check_boxes()

    def _usable(self, train: Split, val: Split) -> tuple[Split, Split]:
        """The splits, their images checked; bad ones raise or are left out."""
        if not self.verify:
            return train, val
        if self.single_split:  # one selection is part of the other
            larger = max(train, val, key=lambda split: len(split.annotations.images))
            bad = self._bad_images(larger)
            return _without(train, bad), _without(val, bad)
        return _without(train, self._bad_images(train)), _without(val, self._bad_images(val))

    def _bad_images(self, split: Split) -> dict[Any, str]:
        if self.bad_data == "error":
            if not _is_first_of_node():
                return {}
            verify_images(split.annotations, split.folder, progress=self.progress)
            return {}
        bad = find_bad_images(split.annotations, split.folder, progress=self.progress)
        if len(bad) == len(split.annotations.images):
            raise DataError(f"no image of the split {split.name} can be used; the first: {next(iter(bad.values()))}")
        self._leave_out(split.name, list(bad.values()))
        return bad

    def _leave_out(self, split: str, faults: Sequence[str]) -> None:
        if faults:
            self.skipped += faults
            warnings.warn(f"{split}: {len(faults)} images are left out; the first: {faults[0]}", stacklevel=3)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of the current epoch; a last, incomplete batch is left out if there are others."""
        trainer = self.trainer
        epoch, rank, world_size = (
            (trainer.current_epoch, trainer.global_rank, trainer.world_size) if trainer else (0, 0, 1)
        )
        seed = self.train_dataset.seed = seed_of(self.seed, epoch)
        images = self.train_dataset.annotations.images
        groups = [int(image["height"] > image["width"]) for image in images] if self.group_by_aspect else None
        try:
            order = epoch_order(len(images), self.batch_size, seed, rank=rank, world_size=world_size, groups=groups)
        except ValueError as error:
            raise DataError(str(error)) from None
        return DataLoader(
            self.train_dataset,
            batch_size=self.batch_size,
            sampler=BatchOrder(order, start=self._batches_seen(len(order)) * self.batch_size),
            num_workers=self.num_workers,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(seed),  # leaves the global one alone
            pin_memory=torch.cuda.is_available(),
        )

    def _batches_seen(self, num_images: int) -> int:
        """How many batches of the epoch a resumed run has done; Lightning goes on counting, but not loading, there."""
        trainer = self.trainer
        if trainer is None or not trainer.fit_loop.restarting:
            return 0
        batches = max(1, num_images // self.batch_size)
        limit = trainer.limit_train_batches
        if limit is not None:
            batches = min(batches, limit if isinstance(limit, int) else max(1, math.floor(batches * limit)))
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        before, now = self._images_per_step, self._images_of_a_step()
        if before not in (None, now) and progress.processed % max(1, len(self.train_dataset) // before):
            warnings.warn(
                f"the checkpoint was written inside an epoch, in batches of {before} images over all processes; in "
                f"batches of {now} the rest of this epoch repeats or leaves out some images, later ones do not",
                stacklevel=2,
            )
        return progress.processed % batches

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation images in the order of the file; of a rank's share, where there are several."""
        return self._in_order(self.val_dataset)

    def test_dataloader(self) -> DataLoader:
        """The same of ``test_split``."""
        return self._in_order(self.test_dataset)

    @cached_property  # asked for by who evaluates and by who loads: the images are decoded once
    def test_dataset(self) -> CocoDetection:
        """The images of ``test_split``, or those of the validation."""
        self.setup()
        if self.test_split is None:
            return self.val_dataset
        split = read_test_split(self.root, self.test_split, skip_bad=self.bad_data == "skip")
        self._leave_out(split.name, split.annotations.skipped)
        categories = self.train_dataset.categories
        for entry in (entry for entries in split.annotations.annotations.values() for entry in entries):
            if entry["category_id"] not in categories:
                unknown = f"category {entry['category_id']!r}, which the training does not have"
                raise DataError(f"annotation file {split.annotations.path} has objects of {unknown}")
        if self.verify:
            split = _without(split, self._bad_images(split))
        return CocoDetection(split.annotations, split.folder, categories=categories)

    def _in_order(self, dataset: CocoDetection) -> DataLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        share = range(rank, len(dataset), world_size)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=share or range(1),  # Lightning stops a rank that has none; the evaluation counts an image once
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )


def _is_first_of_node() -> bool:
    """Whether this process is the first of a distributed training on its machine, by the launcher's variables."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0


def _head(split: Split, count: int | None) -> Split:
    return Split(split.name, split.annotations.head(count), split.folder)


def _without(split: Split, bad: dict[Any, str]) -> Split:
    return Split(split.name, split.annotations.without(bad), split.folder) if bad else split


def _thin_images(dataset: CocoDetection, longest: int) -> dict[Any, tuple[Path, str]]:
    """Images that are too thin, by id: where they are, and what is wrong with them in a line."""
    return {
        image["id"]: (
            path := dataset.folder / image["file_name"],
            f"image {path} of {image['width']}x{image['height']} is too thin: its longer side becomes {longest}, its "
            "shorter one nothing",
        )
        for image in dataset.annotations.images
        if is_too_thin(image["width"], image["height"], longest)
    }


def collate(items: list[tuple[Tensor, dict[str, Any]]]) -> Batch:
    """Images of different sizes cannot be stacked: torchvision's detectors take lists."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)
