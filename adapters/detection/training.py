"""Training of torchvision detectors with Lightning: the module, the figures of its solver, and its checkpoints.

A checkpoint holds everything that is needed to build the detector again (`load_checkpoint`), as plain numbers and
strings, so that it loads with ``weights_only=True``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

import deqkit
from adapters.detection import builders
from adapters.detection.data.module import Batch
from adapters.detection.necks import ImplicitFPN
from adapters.detection.necks.blocks import group_count
from adapters.detection.weight_decay import exempt_from_decay

ARCHITECTURES = ("resnet18", "resnet50")
NECKS = ("ifpn", "fpn")
ANCHOR_SCALES, ANCHOR_RATIOS = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)), (0.5, 1.0, 2.0)  # RetinaNet's
ANCHORS_PER_CELL = len(ANCHOR_SCALES) * len(ANCHOR_RATIOS)


@dataclass(frozen=True)
class DetectorConfig:
    """What determines the shape of a RetinaNet. Plain values only: it is written into checkpoints.

    Attributes:
        num_classes: labels, the background included.
        neck: "ifpn" or "fpn".
        arch: backbone, "resnet18" or "resnet50".
        neck_channels: channels of every pyramid level.
        image_size: length that the shorter side of every image is resized to, pixels.
        max_size: limit of the longer side, pixels; None for 1333/800 of the shorter, as in the paper.
        anchor_size: side of the smallest anchor on P3, pixels; it doubles with every level. None scales RetinaNet's
            32 pixels at a shorter side of 800 to ``image_size``, but not below 18, twice the stride of P3: smaller
            anchors would leave gaps between one another.
        solver: solver of the i-FPN: a name, or None for the neck's own default.
        max_steps: step limit of the i-FPN; None for the neck's own default.
        rtol: relative tolerance of the i-FPN; None for the neck's own default.
        head_norm: group normalisation in the head's towers. Without it a head that starts from random weights hardly
            learns in a short training.
    """

    num_classes: int
    neck: str = "ifpn"
    arch: str = "resnet18"
    neck_channels: int = 256
    image_size: int = 800
    max_size: int | None = None
    anchor_size: float | None = None
    solver: str | None = None
    max_steps: int | None = None
    rtol: float | None = None
    head_norm: bool = True

    def __post_init__(self) -> None:
        for name, choices in (("neck", NECKS), ("arch", ARCHITECTURES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {list(choices)}")
        smallest = {"num_classes": 2, "neck_channels": 1, "image_size": 1, "max_size": 1}
        for name, least in smallest.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.anchor_size is not None and not 0 < self.anchor_size < math.inf:
            raise ValueError(f"anchor_size must be a positive number of pixels, got {self.anchor_size}")

    @property
    def longest_side(self) -> int:
        """Limit of the longer side of an image, pixels."""
        return self.max_size or round(self.image_size * 1333 / 800)

    def build(self, weights_backbone: Any = None) -> RetinaNet:
        """The detector, in training mode.

        Args:
            weights_backbone: see `adapters.detection.retinanet_resnet50_ifpn`; None to train from scratch.
        """
        base = self.anchor_size or max(18.0, 32 * self.image_size / 800)
        sides = tuple(tuple(base * 2**level * scale for scale in ANCHOR_SCALES) for level in range(5))
        kwargs: dict[str, Any] = {
            "num_classes": self.num_classes,
            "weights_backbone": weights_backbone,
            "neck_channels": self.neck_channels,
            "min_size": self.image_size,
            "max_size": self.longest_side,
            "anchor_generator": AnchorGenerator(sides, (ANCHOR_RATIOS,) * 5),  # pyright: ignore[reportArgumentType]
        }
        if self.head_norm:
            norm = partial(nn.GroupNorm, group_count(self.neck_channels))
            kwargs["head"] = RetinaNetHead(self.neck_channels, ANCHORS_PER_CELL, self.num_classes, norm_layer=norm)
        if self.neck == "ifpn":
            # What does not converge is counted in the logs: a warning at every step would bury everything else.
            given = {"solver": self.solver, "max_steps": self.max_steps, "rtol": self.rtol, "on_failure": "ignore"}
            kwargs["neck_settings"] = {key: value for key, value in given.items() if value is not None}
        return getattr(builders, f"retinanet_{self.arch}_{self.neck}")(**kwargs)


@dataclass(frozen=True)
class Schedule:
    """Optimiser and learning rate: AdamW, linear warm-up, then a cosine to zero.

    Attributes:
        total_steps: optimiser steps of the whole training.
        lr: learning rate after the warm-up.
        warmup_steps: steps of the warm-up.
        weight_decay: decay of weights; norms and biases are exempt.
        transform_lr: learning rate of an implicit neck's G, relative to the others'. Adam moves a weight by about its
            learning rate per step whatever the gradient's size, and G, whose weights start at N(0, 0.01), would lose
            its contraction within a few dozen steps of 1e-3.
        seed: seed of the augmentation; every epoch starts from the seed and its own number, so that a resumed run
            continues as an uninterrupted one would.
    """

    total_steps: int
    lr: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.02
    transform_lr: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"total_steps": 1, "lr": 0, "warmup_steps": 0, "weight_decay": 0, "transform_lr": 0}.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {least} and finite, got {getattr(self, name)}")

    def factor(self, step: int) -> float:
        """Learning rate of a step relative to `lr`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class DetectionModule(L.LightningModule):
    """A torchvision detector in training.

    Args:
        detector: the fields of a `DetectorConfig`.
        schedule: the fields of a `Schedule`.
        data: what a checkpoint should remember of the data; plain values only.
        weights_backbone: see `DetectorConfig.build`; not remembered, the checkpoint has the weights.

    Attributes:
        model: the detector.
        skipped_steps: how many steps were left out because the loss or the gradient was not finite.
    """

    def __init__(
        self,
        detector: Mapping[str, Any],
        schedule: Mapping[str, Any],
        data: Mapping[str, Any],
        weights_backbone: Any = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters({"detector": dict(detector), "schedule": dict(schedule), "data": dict(data)})
        self.config, self.schedule = DetectorConfig(**detector), Schedule(**schedule)
        self.model = self.config.build(weights_backbone)
        self.skipped_steps = 0

    @property
    def neck(self) -> nn.Module:
        """The feature pyramid network."""
        return self.model.backbone.fpn  # pyright: ignore[reportReturnType]

    def on_train_epoch_start(self) -> None:
        """Give every epoch random numbers of its own."""
        torch.manual_seed(self.schedule.seed * 100_003 + self.current_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """The sum of the detector's losses; None, which skips the step, where it is not finite."""
        images, targets = batch
        boxes = [{key: target[key] for key in ("boxes", "labels")} for target in targets]
        losses: dict[str, Tensor] = self.model(images, boxes)
        loss = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            self.skipped_steps += 1
            return None
        named = {"train/loss": loss} | {f"train/{name}": value for name, value in losses.items()}
        self.log_dict({k: v.detach() for k, v in named.items()}, batch_size=len(images))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(images))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skips a step whose gradient is not finite: a failed adjoint solve can cause that under a finite loss."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if gradients and not torch.isfinite(nn.utils.get_total_norm(gradients)):
            self.skipped_steps += 1
            optimizer.zero_grad(set_to_none=True)  # the optimiser leaves parameters without a gradient alone

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the count of skipped steps."""
        checkpoint["skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the count of skipped steps."""
        self.skipped_steps = checkpoint.get("skipped_steps", 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Tensor]]:
        """The detections of the batch."""
        return self.model(batch[0])

    def configure_optimizers(self) -> Any:
        """AdamW with one learning rate per step."""
        settings, neck = self.schedule, self.neck
        careful = {id(p) for p in neck.transform.parameters()} if isinstance(neck, ImplicitFPN) else set()
        exempt = {id(p) for p in exempt_from_decay(self.model)}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                lr = settings.lr * (settings.transform_lr if id(parameter) in careful else 1.0)
                decay = settings.weight_decay if parameter.dim() > 1 and id(parameter) not in exempt else 0.0
                groups.setdefault((lr, decay), []).append(parameter)
        groups_of_optimizer = [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
        optimizer = torch.optim.AdamW(groups_of_optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@dataclass
class SolverSummary:
    """How the fixed points of a set of images converged.

    Attributes:
        mean_steps: solver steps, mean over images.
        median_residual: relative residual, median over images.
        worst_residual: the largest.
        converged: share of images whose solve met its tolerance, 0 to 1.
    """

    mean_steps: float
    median_residual: float
    worst_residual: float
    converged: float


class SolverFigures(L.Callback):
    """Logs how the neck's fixed points converge, in training beside the losses; sums up each validation.

    It does nothing for a detector without an implicit neck.

    Attributes:
        validation: the figures of the last validation epoch, None without one.
    """

    def __init__(self) -> None:
        self.validation: SolverSummary | None = None
        self._solutions: list[deqkit.Solution] = []
        self._solved: list[torch.Tensor] = []
        self._before = (0, 0)  # solves, and unsolved ones, of the run that was resumed

    @property
    def unsolved(self) -> float:
        """Share of the training solves that did not meet their tolerance, 0 to 1; those before a resume count."""
        total, unsolved = self._counts()
        return unsolved / total if total else 0.0

    def _counts(self) -> tuple[int, int]:
        total = sum(len(solved) for solved in self._solved)
        solved = int(torch.cat(self._solved).sum()) if self._solved else 0
        return self._before[0] + total, self._before[1] + total - solved

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps: the counts of the training solves."""
        return dict(zip(("solves", "unsolved"), self._counts(), strict=True))

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Takes up the counts of the run that is resumed."""
        self._before, self._solved = (state_dict["solves"], state_dict["unsolved"]), []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Logs the solve of the step, and its adjoint's."""
        solution = _last_solution(pl_module)
        if solution is not None:
            self._solved.append(solution.converged.reshape(-1))  # a batch solved as one system has no batch dim
        if solution is None or trainer.global_step % trainer.log_every_n_steps:  # pyright: ignore[reportAttributeAccessIssue]
            return
        summary = asdict(summarize([solution]))
        figures = {f"solver/{name}": value for name, value in summary.items()}
        stats = solution.adjoint_stats
        if stats.num_steps is not None and stats.converged is not None:
            figures["adjoint/mean_steps"] = stats.num_steps.double().mean().item()
            figures["adjoint/converged"] = stats.converged.double().mean().item()
        pl_module.log_dict(figures, batch_size=1)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the last epoch's solves."""
        self._solutions = []

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Keeps what the solver reports about the batch."""
        solution = _last_solution(pl_module)
        if solution is not None:
            self._solutions.append(_without_value(solution))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sums up and logs."""
        self.validation = summarize(self._solutions) if self._solutions else None
        if self.validation is not None:
            figures = asdict(self.validation)
            pl_module.log_dict({f"val/solver_{name}": value for name, value in figures.items()}, batch_size=1)


def _last_solution(module: L.LightningModule) -> deqkit.Solution | None:
    neck = getattr(module, "neck", None)
    return neck.last_solution if isinstance(neck, ImplicitFPN) else None


def _without_value(solution: deqkit.Solution) -> deqkit.Solution:
    """The report alone: the pyramids of a whole validation set would not fit into memory."""
    report = solution.detach()
    report.value = None
    return report


def summarize(solutions: list[deqkit.Solution]) -> SolverSummary:
    """How a number of solves went, over all their samples."""
    residuals = torch.cat([s.relative_residual.double().cpu().reshape(-1) for s in solutions])
    steps = torch.cat([s.num_steps.double().cpu().reshape(-1) for s in solutions])
    converged = torch.cat([s.converged.double().cpu().reshape(-1) for s in solutions])
    return SolverSummary(steps.mean().item(), median_of(residuals), residuals.max().item(), converged.mean().item())


def median_of(values: Tensor) -> float:
    """The median, for an even count the mean of the middle two; NaNs count as the largest."""
    ordered = values.double().sort().values
    return (0.5 * (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2])).item()


class MovableCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint callback, which also knows its best score again when the run's folder was moved.

    Lightning's own forgets it then, and the first validation after a resume would write over the best checkpoint.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the state of the run that is resumed, with the paths of today."""
        before, now = str(state_dict.get("dirpath") or ""), str(self.dirpath or "")
        if before and now and before != now:

            def moved(value: Any) -> Any:
                if isinstance(value, dict):
                    return {moved(key): moved(entry) for key, entry in value.items()}
                inside = isinstance(value, str) and value.startswith(before)
                return now + value.removeprefix(before) if inside else value

            state_dict = moved(state_dict)
        super().load_state_dict(state_dict)


class StepTimer(L.Callback):
    """Wall time of training steps, data loading excluded.

    Attributes:
        seconds: of every step so far.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    @property
    def median(self) -> float:
        """Median seconds per step; NaN before the first."""
        return median(self.seconds) if self.seconds else math.nan

    def on_train_batch_start(self, *args: Any) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stops it."""
        self.seconds.append(time.perf_counter() - self._start)


def load_checkpoint(path: str | Path) -> DetectionModule:
    """The module of a checkpoint, in eval mode on the CPU.

    Args:
        path: a checkpoint that Lightning wrote for a `DetectionModule`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of a `DetectionModule`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint not found: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        settings, state = content["hyper_parameters"], content["state_dict"]
        module = DetectionModule(settings["detector"], settings["schedule"], settings["data"])
        module.load_state_dict(state)
    except Exception as error:  # whatever a foreign file may bring
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of a DetectionModule: {reason}") from error
    return module.eval()
