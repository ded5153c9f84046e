"""``python -m adapters.detection fit|validate|test``: training and evaluation from config files, by LightningCLI.

A config file is YAML with the arguments of `DetectionModule` (``model``), `CocoDataModule` (``data``) and Lightning's
`Trainer` (``trainer``), and those below; what it leaves out comes from ``recipes/defaults.yaml``, the paper's schedule.
Every value can be overridden on the command line, as ``--data.batch_size 4``. The number of classes is read from the
data, the length of the schedule is ``trainer.max_steps``, one ``seed_everything`` seeds data and training.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from adapters.detection.data import CocoDataModule, DataError
from adapters.detection.evaluation import BACKENDS, CocoEvaluation
from adapters.detection.files import written_whole
from adapters.detection.training.checkpoints import check_weights, read_checkpoint
from adapters.detection.training.module import DetectionModule
from adapters.detection.training.run_folder import SaveLastStep, best_checkpoint, last_checkpoint, make_loggers
from adapters.detection.training.solver_figures import SolverFigures
from adapters.detection.training.step_timer import StepTimer

__all__ = ["PACKAGE", "DEFAULTS", "DetectionCLI", "find_recipe", "run"]

PACKAGE = Path(__file__).parent.parent
DEFAULTS = PACKAGE / "recipes" / "defaults.yaml"
CONFIG = "config.yaml"
_METHODS = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
    "validate": {"model", "dataloaders", "datamodule"},
    "test": {"model", "dataloaders", "datamodule"},
}


class DetectionCLI(LightningCLI):
    """Training and evaluation of detectors from config files.

    Args:
        args: Command line. Default: that of the process.
    """

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            DetectionModule,
            CocoDataModule,
            args=args,
            save_config_callback=None,  # the config is kept in the folder of the run, see `before_fit`
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # `load_checkpoint` does that
            parser_kwargs={name: {"default_config_files": [str(DEFAULTS)]} for name in _METHODS},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's methods, with the arguments that come from here."""
        return _METHODS

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is neither the model's, nor the data's, nor the trainer's."""
        parser.add_argument("--out", type=str, default="runs/detection", help="Folder of the run.")
        parser.add_argument("--checkpoint_every", type=int, default=1000, help="Optimiser steps between checkpoints.")
        parser.add_argument(
            "--ema",
            type=float | None,
            default=None,
            help="Decay of a moving average of the weights, which is evaluated.",
        )
        parser.add_argument("--backend", type=str, default=BACKENDS[0], help=f"Who computes AP, one of {BACKENDS}.")
        parser.link_arguments("trainer.max_steps", "model.schedule.total_steps")
        parser.link_arguments("seed_everything", "model.schedule.seed")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("data.num_classes", "model.detector.num_classes", apply_on="instantiate")
        parser.link_arguments("out", "trainer.default_root_dir")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the command line; ``--config recipes/...`` is found from any folder."""
        words = sys.argv[1:] if args is None else args
        super().parse_arguments(parser, [find_recipe(word) for word in words] if isinstance(words, list) else words)
        path = self.config[self.config.subcommand].ckpt_path
        if path is not None and Path(path).is_file():
            _said_in_a_line(read_checkpoint, path)  # Lightning reads it as soon as this returns

    @property
    def options(self) -> Any:
        """The config of the subcommand."""
        return self.config[str(self.subcommand)]

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.options.out)

    def before_instantiate_classes(self) -> None:
        """Refuses what cannot be run before anything is read or written."""
        self._find_checkpoint()
        if self.subcommand != "fit":
            if self.options.ckpt_path is None:
                raise DataError(f"{self.subcommand} is for a trained detector: --ckpt_path best, last, or a file")
            self.options.model.weights_backbone = None  # the checkpoint has them: nothing to read or download
            return
        if self.options.trainer.max_steps < 1:
            raise DataError("the schedule counts optimiser steps: give trainer.max_steps, not max_epochs")
        if self.options.checkpoint_every < 1:
            raise DataError(f"checkpoint_every must be at least 1, got {self.options.checkpoint_every}")
        if self.options.ema is not None and not 0 < self.options.ema < 1:
            raise DataError(f"ema must be between 0 and 1, got {self.options.ema}")
        precision = self.options.trainer.precision
        if precision in ("16-true", "bf16-true"):
            raise DataError(
                f"trainer.precision {precision} would round the boxes to whole pixels and worse: take mixed"
            )
        model = self.options.model
        if model.detector.frozen_norm and model.weights_backbone is None and self.options.ckpt_path is None:
            raise DataError(
                "model.weights_backbone is null: norms that start at random must not be frozen, "
                "give --model.detector.frozen_norm false"
            )
        self._refuse_to_mix_runs()

    def _find_checkpoint(self) -> None:
        """Puts a path in place of "last" and "best", those of the folder of the run; Lightning knows its own alone."""
        start = self.options.ckpt_path
        if start in ("last", "best"):
            self.options.ckpt_path = str(self.folder / "checkpoints" / f"{start}.ckpt")
        path = self.options.ckpt_path
        if path not in (None, "hpc") and not Path(path).is_file():
            hint = f"; --out FOLDER says where the run is, now {self.folder}" if start in ("last", "best") else ""
            raise DataError(f"--ckpt_path {start}: no checkpoint at {path}{hint}")
        if path not in (None, "hpc"):
            _said_in_a_line(read_checkpoint, path)

    @rank_zero_only
    def _refuse_to_mix_runs(self) -> None:
        if self.options.ckpt_path is not None or not (self.folder / CONFIG).exists():
            return
        if any((self.folder / "checkpoints").glob("*.ckpt")):
            raise DataError(
                f"{self.folder} already holds a run: --ckpt_path last continues it, --out FOLDER goes elsewhere"
            )
        raise DataError(
            f"{self.folder} already holds a run, which was stopped before its first checkpoint: "
            "remove the folder, or --out FOLDER goes elsewhere"
        )

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer; what cannot be built is said in a line."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(reason) from error
        module: Any = self.model
        self.datamodule.refuse_thin_images(module.config.longest_side)
        path = self.options.ckpt_path
        if path not in (None, "hpc"):
            _said_in_a_line(lambda: check_weights(path, read_checkpoint(path)["state_dict"], module))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer, with the callbacks and loggers of a run in its folder."""
        given = self.config_init[str(self.subcommand)]["trainer"]
        callbacks = given.get("callbacks") or []
        kwargs["callbacks"] = [*(callbacks if isinstance(callbacks, list) else [callbacks]), *self._callbacks()]
        if given.get("logger") is None:
            kwargs["logger"] = make_loggers(self.folder) if self.subcommand == "fit" else False
        return super().instantiate_trainer(**kwargs)

    def _callbacks(self) -> list[Callback]:
        data: Any = self.datamodule
        dataset = data.test_dataset if self.subcommand == "test" else data.val_dataset
        name = f"{data.test_split or 'val'}_detections.json" if self.subcommand == "test" else "detections.json"
        callbacks: list[Callback] = [
            CocoEvaluation(dataset.ground_truth(), dataset.category_of_label, self.folder / name, self.options.backend),
            SolverFigures(),
        ]
        if self.subcommand == "fit":
            trainer = self.options.trainer
            callbacks.append(StepTimer())
            if trainer.logger is not False:
                callbacks.append(LearningRateMonitor("step"))
            if self.options.ema is not None:
                callbacks.append(EMAWeightAveraging(decay=self.options.ema))
            if trainer.enable_checkpointing is not False:
                every = self.options.checkpoint_every
                callbacks += [
                    last_checkpoint(self.folder, every_n_train_steps=every, save_on_train_epoch_end=False),
                    best_checkpoint(self.folder),
                    SaveLastStep(self.folder),  # after the average has taken the step in
                ]
        return callbacks

    @rank_zero_only
    def before_fit(self) -> None:
        """Keeps the config, and says what was found in the data."""
        with written_whole(self.folder / CONFIG) as partial:
            partial.write_text(self._dumped())
        print(self.datamodule.report())

    def _dumped(self) -> str:
        """The config of the subcommand as YAML, which ``--config`` takes: that of the run, wherever it was resumed."""
        options = self.options.clone()
        options.ckpt_path = None
        return self._parser(self.subcommand).dump(options, skip_unset=False)


def _said_in_a_line(function: Callable[..., Any], *args: Any) -> None:
    try:
        function(*args)
    except ValueError as error:
        raise DataError(f"--ckpt_path: {error}") from error


def find_recipe(word: str) -> str:
    """A recipe of this package by its path from here, where there is no such file in the working folder."""
    option, equals, path = word.rpartition("=")
    packaged = PACKAGE / path
    is_recipe = path.startswith("recipes/") and not Path(path).exists() and packaged.exists()
    return f"{option}{equals}{packaged}" if is_recipe else word


def run(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0, or 2 for unusable data or settings, whose one-line message goes to stderr.
    """
    _quiet()
    try:
        DetectionCLI(None if args is None else list(args))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _quiet() -> None:
    """Leave out what Lightning says about its own settings and about what is taken care of here."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory.*exists.*",
        ".*your dataloader is not resumable.*",  # its order is: see CocoDataModule
        ".*LeafSpec.*is deprecated.*",  # Lightning's own use of PyTorch
        "(.*\n)*.*JsonargparseDeprecationWarning",  # Lightning's own use of jsonargparse
        "(.*\n)*.*``instantiate_classes`` was deprecated",
        ".*args parameter is intended to run from within Python.*",
    ):
        warnings.filterwarnings("ignore", message)
