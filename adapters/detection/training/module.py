"""A detector in training, as a Lightning module.

A checkpoint holds everything that is needed to build the detector again (`load_checkpoint`), as plain numbers, strings
and deqkit's own settings, so that it loads with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import deqkit
from adapters.detection.data.module import Batch
from adapters.detection.data.order import seed_of
from adapters.detection.training.config import DetectorConfig
from adapters.detection.training.schedule import Schedule, make_optimizer

__all__ = ["SETTINGS", "DetectionModule"]

SETTINGS = "detection"
"""Where a checkpoint keeps what the detector is built from."""

# Solvers and adjoints among the settings of a neck are frozen settings themselves; Lightning's resume reads them, too.
torch.serialization.add_safe_globals(
    [cls for cls in vars(deqkit).values() if isinstance(cls, type) and issubclass(cls, (deqkit.Solver, deqkit.Adjoint))]
)


class DetectionModule(L.LightningModule):
    """A torchvision detector in training.

    Args:
        detector: What determines its shape.
        schedule: Optimiser and learning rate.
        weights_backbone: See `DetectorConfig.build`; not remembered, the checkpoint has the weights.
        data: What a checkpoint should remember of the data, plain values only. Default: what the data module of the
            training says of itself.

    Attributes:
        model: The detector.
        skipped_steps: How many steps were left out because the loss or the gradient was not finite.
    """

    def __init__(
        self,
        detector: DetectorConfig,
        schedule: Schedule,
        weights_backbone: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.schedule, self.data = detector, schedule, dict(data or {})
        self.model: Any = detector.build(weights_backbone)
        self.skipped_steps = 0
        self._kept_statistics: list[Tensor] = []

    @property
    def neck(self) -> nn.Module:
        """The feature pyramid network."""
        return self.model.backbone.fpn

    def setup(self, stage: str) -> None:
        """Asks the data what is to be remembered of them."""
        describe = getattr(getattr(self.trainer, "datamodule", None), "describe", None)
        if not self.data and describe is not None:
            self.data = describe()

    def on_train_start(self) -> None:
        """Trains by the schedule of today: a resumed optimiser has the settings and the next rate of the last one."""
        scheduler: Any = self.lr_schedulers()
        today: Any = make_optimizer(self.model, self.schedule)["optimizer"]
        for group, new in zip(scheduler.optimizer.param_groups, today.param_groups, strict=True):
            group.update({name: value for name, value in new.items() if name != "params"})
            group["lr"] = group["initial_lr"] * self.schedule.factor(scheduler.last_epoch)
        scheduler.base_lrs = [group["initial_lr"] for group in today.param_groups]
        self._kept_statistics = [statistic.clone() for statistic in self._statistics()]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Gives every step random numbers of its own."""
        torch.manual_seed(seed_of(self.schedule.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the detector's losses."""
        images, targets = batch
        losses: dict[str, Tensor] = self.model(images, [trained_on(target) for target in targets])
        loss = torch.stack(list(losses.values())).sum()
        named = {"train/loss": loss} | {f"train/{name}": value for name, value in losses.items()}
        self.log_dict({k: v.detach() for k, v in named.items()}, batch_size=len(images))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(images))
        # An infinite loss may have finite gradients. Times NaN it has none, on this rank and, once the gradients are
        # averaged, on all others: they agree on skipping the step, where a rank that returned None would hang them.
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skips a step whose loss or gradient is not finite; a failed adjoint solve can be the cause of the latter."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if gradients and not torch.isfinite(nn.utils.get_total_norm(gradients)):
            self.skipped_steps += 1
            optimizer.zero_grad(set_to_none=True)  # the optimiser leaves parameters without a gradient alone
            _copy(self._kept_statistics, self._statistics())  # what overflowed may be in there, for good
        else:
            _copy(self._statistics(), self._kept_statistics)
        self.log("train/skipped_steps", float(self.skipped_steps), batch_size=1)

    def _statistics(self) -> list[Tensor]:
        """The running statistics of the batch norms that are not frozen."""
        names = ("running_mean", "running_var", "num_batches_tracked")
        live = [module for module in self.model.modules() if hasattr(module, "num_batches_tracked")]
        found = [getattr(module, name) for module in live for name in names]
        return [statistic for statistic in found if statistic is not None]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what the detector is built from, and the count of skipped steps."""
        checkpoint[SETTINGS] = {
            "detector": dict(vars(self.config)),
            "schedule": asdict(self.schedule),
            "data": self.data,
        }
        checkpoint["skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the count of skipped steps."""
        self.skipped_steps = checkpoint.get("skipped_steps", 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Tensor]]:
        """The detections of the batch."""
        return self.model(batch[0])

    def test_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Tensor]]:
        """The detections of the batch."""
        return self.model(batch[0])

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Tensor]]:
        """The detections of the batch."""
        return self.model(batch[0])

    def configure_optimizers(self) -> Any:
        """The optimiser, with one learning rate per step."""
        return make_optimizer(self.model, self.schedule)


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    for new, old in zip(source, target, strict=True):
        old.copy_(new)


def trained_on(target: Mapping[str, Any]) -> dict[str, Tensor]:
    """The part of a target that torchvision's detectors know."""
    return {name: target[name] for name in ("boxes", "labels")}
