"""What a training leaves in its folder: checkpoints, logs and its settings."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from adapters.detection.training.checkpoints import MovableCheckpoint

__all__ = ["SaveLastStep", "best_checkpoint", "last_checkpoint", "make_loggers"]


def make_loggers(folder: Path) -> list[Logger]:
    """A CSV file and TensorBoard's, in the folder; a resumed run writes a CSV file of its own beside the first."""
    parts = len(list((folder / "csv").rglob("metrics.csv")))
    part = f"resumed_{parts}" if parts else ""  # the CSV logger would delete what it finds
    return [CSVLogger(folder, name="csv", version=part), TensorBoardLogger(folder, name="tensorboard", version="")]


def last_checkpoint(folder: Path, **when: Any) -> Callback:
    """Keeps the state to go on from, ``checkpoints/last.ckpt``.

    Args:
        folder: Folder of the run.
        **when: Settings of Lightning's `ModelCheckpoint` that say how often.
    """
    return MovableCheckpoint(folder / "checkpoints", filename="last", enable_version_counter=False, **when)


def best_checkpoint(folder: Path) -> Callback:
    """Keeps the state with the highest AP, ``checkpoints/best.ckpt``."""
    return MovableCheckpoint(
        folder / "checkpoints", filename="best", monitor="val/AP", mode="max", save_on_train_epoch_end=False,
        enable_version_counter=False,
    )  # fmt: skip


class SaveLastStep(Checkpoint):
    """Keeps the state after the last step in ``checkpoints/last.ckpt``, whatever the interval of `last_checkpoint`.

    Inside the step, where a checkpoint still knows its place in the epoch: a longer training can go on from there. As a
    `Checkpoint` it comes after the callbacks that end a training early, by ``max_time`` for one.

    Ctrl-C in training lets the step end, keeps its state and then stops; a second one stops at once. In validation, and
    with several processes, which might end at different steps and wait for one another, the first one does.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoints" / "last.ckpt"
        self._saved = -1
        self._validating = self._interrupted = False
        self._process = 0

    def on_fit_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Takes over Ctrl-C, if nobody else has."""
        alone = trainer.world_size == 1 and threading.current_thread() is threading.main_thread()
        if alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._process = os.getpid()
            signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # one that loads images, which the step to come may need
            return
        self._give_back_interrupt()
        if self._validating:
            raise KeyboardInterrupt
        self._interrupted = True
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    def _give_back_interrupt(self) -> None:
        if signal.getsignal(signal.SIGINT) == self._on_interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_fit_end(self, *args: Any) -> None:
        """Gives Ctrl-C back."""
        self._give_back_interrupt()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """The same."""
        self._give_back_interrupt()

    def on_train_batch_start(self, *args: Any) -> None:
        """Stops after the step that was interrupted, once it has been logged."""
        if self._interrupted:
            raise KeyboardInterrupt

    def on_validation_start(self, *args: Any) -> None:
        """The same; notes that no step is under way."""
        self.on_train_batch_start()
        self._validating = True

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Saves, if this was the last one, of all steps or of all epochs, or if the training ends early."""
        last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 == trainer.max_epochs
        last = trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch)
        if last or trainer.should_stop or self._interrupted:
            trainer.save_checkpoint(self.path)
            self._saved = trainer.global_step

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Saves, if the training ends by the outcome of the validation."""
        self._validating = False
        if trainer.should_stop and trainer.state.fn == "fit" and trainer.global_step > self._saved:
            trainer.save_checkpoint(self.path)
