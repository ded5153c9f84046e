"""Optimiser and learning rate of a training, and which parameters get which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adapters.detection.necks import ImplicitFPN
from adapters.detection.weight_decay import exempt_from_decay

__all__ = ["Schedule", "make_optimizer"]

OPTIMIZERS = ("adamw", "sgd")
DECAYS = ("cosine", "multistep")


@dataclass(frozen=True)
class Schedule:
    """Optimiser and learning rate: a linear warm-up, then a cosine to zero or a fall at milestones.

    Attributes:
        total_steps: Optimiser steps of the whole training.
        lr: Learning rate after the warm-up.
        warmup_steps: Steps of the warm-up.
        weight_decay: Decay of weights; norms and biases are exempt.
        transform_lr: Learning rate of an implicit neck's G, relative to the others'. Adam moves a weight by about its
            learning rate per step whatever the gradient's size, and G, whose weights start at N(0, 0.01), would lose
            its contraction within a few dozen steps of 1e-3. SGD has no such need.
        seed: Seed of all random draws of the training; every step starts from the seed and its own number, so that a
            resumed run continues as an uninterrupted one would.
        optimizer: "adamw" or "sgd".
        momentum: Momentum of SGD.
        warmup_factor: Relative learning rate that the warm-up starts from.
        decay: "cosine", or "multistep": times ``gamma`` at every milestone.
        milestones: Steps of the falls, rising.
        gamma: Factor of a fall.

    Raises:
        ValueError: A number is out of range or a name is not known.
    """

    total_steps: int
    lr: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.02
    transform_lr: float = 0.1
    seed: int = 0
    optimizer: str = "adamw"
    momentum: float = 0.9
    warmup_factor: float = 0.0
    decay: str = "cosine"
    milestones: Sequence[int] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        for name, choices in (("optimizer", OPTIMIZERS), ("decay", DECAYS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {list(choices)}")
        least = {name: 0 for name in ("lr", "warmup_steps", "weight_decay", "transform_lr", "warmup_factor", "gamma")}
        for name, bound in ({"total_steps": 1} | least).items():
            if not bound <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {bound} and finite, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 0 for m in self.milestones):
            raise ValueError(f"milestones must rise from 0 on, got {list(self.milestones)}")
        if self.decay == "multistep" and not self.milestones:
            raise ValueError("decay='multistep' needs milestones")
        if self.decay != "multistep" and self.milestones:
            raise ValueError(f"milestones are for decay='multistep', not {self.decay!r}")

    def factor(self, step: int) -> float:
        """Learning rate of a step relative to `lr`."""
        warmup = 1.0
        if step < self.warmup_steps:
            warmup = self.warmup_factor + (1 - self.warmup_factor) * (step + 1) / self.warmup_steps
        if self.decay == "multistep":
            return warmup * self.gamma ** sum(step >= milestone for milestone in self.milestones)
        if step < self.warmup_steps:
            return warmup
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(model: nn.Module, schedule: Schedule) -> dict[str, Any]:
    """Optimiser and learning rate per step, as Lightning wants them.

    Weight decay is left out for biases and norms, and for what a module exempts (`exempt_from_decay`).
    """
    necks = [module for module in model.modules() if isinstance(module, ImplicitFPN)]
    careful = {id(p) for neck in necks for p in neck.transform.parameters()}
    exempt = {id(p) for p in exempt_from_decay(model)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            lr = schedule.lr * (schedule.transform_lr if id(parameter) in careful else 1.0)
            decay = schedule.weight_decay if parameter.dim() > 1 and id(parameter) not in exempt else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    settings = [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
    if schedule.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(settings, lr=schedule.lr, momentum=schedule.momentum)
    else:
        optimizer = torch.optim.AdamW(settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
