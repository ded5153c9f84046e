"""How the fixed points of a detector's neck converge, in training and in validation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

import deqkit
from adapters.detection.necks import ImplicitFPN

__all__ = ["SolverFigures", "SolverSummary", "median_of", "summarize"]


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
