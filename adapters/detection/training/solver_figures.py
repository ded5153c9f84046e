"""How the fixed points of a detector's neck converge, in training and in validation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed
from torch import Tensor

import deqkit
from adapters.detection.necks import last_solution

__all__ = ["SolverFigures", "SolverSummary", "Solves", "median_of", "summarize"]


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
        self._solves: list[Solves] = []
        self._total = 0
        self._unsolved = torch.zeros((), dtype=torch.int64)  # on the device of the solves, which need not wait for it

    @property
    def unsolved(self) -> float:
        """Share of the training solves that did not meet their tolerance, 0 to 1; those before a resume count."""
        return int(self._unsolved) / self._total if self._total else 0.0

    def count(self, solution: deqkit.Solution) -> None:
        """Counts the solves of a training step."""
        converged = solution.converged
        self._total += converged.numel()
        self._unsolved = self._unsolved.to(converged.device) + (~converged).sum()

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps: the counts of the training solves."""
        return {"solves": self._total, "unsolved": int(self._unsolved)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Takes up the counts of the run that is resumed."""
        self._total, self._unsolved = state_dict["solves"], torch.tensor(state_dict["unsolved"])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Logs the solve of the step, and its adjoint's."""
        solution = _of_neck(pl_module)
        if solution is not None:
            self.count(solution)
        if solution is None or trainer.global_step % trainer.log_every_n_steps:  # pyright: ignore[reportAttributeAccessIssue]
            return
        summary = asdict(summarize([Solves.of(solution)]))
        figures = {f"solver/{name}": value for name, value in summary.items()}
        stats = solution.adjoint_stats
        if stats.num_steps is not None and stats.converged is not None:
            figures["adjoint/mean_steps"] = stats.num_steps.double().mean().item()
            figures["adjoint/converged"] = stats.converged.double().mean().item()
        pl_module.log_dict(figures, batch_size=1)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the last epoch's solves."""
        self._solves = []

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Keeps what the solver reports about the batch."""
        solution = _of_neck(pl_module)
        if solution is not None:
            self._solves.append(Solves.of(solution))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sums up, over all ranks, and logs."""
        shares: list[Any] = [self._solves]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, self._solves)
        solves = [solve for share in shares for solve in share]
        self.validation = summarize(solves) if solves else None
        if self.validation is not None:
            figures = asdict(self.validation)
            pl_module.log_dict({f"val/solver_{name}": value for name, value in figures.items()}, batch_size=1)


def _of_neck(module: Any) -> deqkit.Solution | None:
    return last_solution(module.neck)


@dataclass(frozen=True)
class Solves:
    """The report of a solve alone, on the CPU: the pyramids of a whole validation set would not fit into memory.

    Attributes:
        steps: solver steps per sample.
        residuals: relative residuals.
        converged: which samples met the tolerance.
    """

    steps: Tensor
    residuals: Tensor
    converged: Tensor

    @classmethod
    def of(cls, solution: deqkit.Solution) -> Solves:
        """The report of a solution; a batch that was solved as one system counts as one sample."""
        found = (solution.num_steps, solution.relative_residual, solution.converged)
        return cls(*(values.detach().double().cpu().reshape(-1) for values in found))


def summarize(solves: list[Solves]) -> SolverSummary:
    """How a number of solves went, over all their samples."""
    residuals = torch.cat([solve.residuals for solve in solves])
    steps = torch.cat([solve.steps for solve in solves])
    converged = torch.cat([solve.converged for solve in solves])
    return SolverSummary(steps.mean().item(), median_of(residuals), residuals.max().item(), converged.mean().item())


def median_of(values: Tensor) -> float:
    """The median, for an even count the mean of the middle two; NaNs count as the largest."""
    ordered = values.double().sort().values
    return (0.5 * (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2])).item()
