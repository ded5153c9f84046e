"""L6. Sums over many solves, kept on the device until somebody asks.

A solve is entered by reference. Every `_PENDING` solves the references are folded into a few sums with operations that
the host does not wait for; only `Tally.read` does. Memory is bounded whatever the number of solves.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from deqkit.solution import ADVICE, AdjointStats, Solution, Status

_PENDING = 64  # solves
_PENDING_SAMPLES = 2**16  # beyond which even fewer solves are folded
_MEDIAN_SAMPLES = 2**16  # of the latest samples, over which the median is taken


class _Outcome(NamedTuple):
    status: Tensor
    relative_residual: Tensor
    num_steps: Tensor
    fixed_steps: bool

    @property
    def kind(self) -> tuple[torch.Size, torch.device, torch.dtype, bool]:
        """What outcomes must share to be stacked."""
        residual = self.relative_residual
        return residual.shape, residual.device, residual.dtype, self.fixed_steps


@dataclass(frozen=True)
class Totals:
    """How a number of solves went, on the host.

    Attributes:
        solves: how many.
        calls: of f, or vector-Jacobian products in an adjoint solve.
        failed_solves: solves with at least one sample that failed.
        counts: samples by `Status` code. In a solve of a fixed number of steps, which has nothing to reach, all that
            stay finite count as converged.
        steps: of all samples together.
        most_steps: of any sample.
        median: of the relative residuals, over the latest samples.
        worst: the largest relative residual; infinite where one was not a number.
    """

    solves: int = 0
    calls: int = 0
    failed_solves: int = 0
    counts: tuple[int, ...] = (0,) * len(Status)
    steps: int = 0
    most_steps: int = 0
    median: float = 0.0
    worst: float = 0.0

    def __add__(self, later: Totals) -> Totals:
        """Both together, with the median of the later ones."""
        return Totals(
            self.solves + later.solves,
            self.calls + later.calls,
            self.failed_solves + later.failed_solves,
            tuple(a + b for a, b in zip(self.counts, later.counts, strict=True)),
            self.steps + later.steps,
            max(self.most_steps, later.most_steps),
            later.median if later.samples else self.median,
            max(self.worst, later.worst),
        )

    @property
    def samples(self) -> int:
        """Samples of all solves together."""
        return sum(self.counts)

    @property
    def failed(self) -> int:
        """Samples that failed."""
        return self.samples - self.counts[Status.CONVERGED]

    def figures(self) -> dict[str, float]:
        """Names and values for a logger; none without a sample."""
        if not self.samples:
            return {}
        named = {
            "solves": self.solves,
            "failed_solves": self.failed_solves,
            "calls_mean": self.calls / self.solves,
            "steps_mean": self.steps / self.samples,
            "steps_max": self.most_steps,
            "relative_residual_median": self.median,
            "relative_residual_worst": self.worst,
            "failed": self.failed / self.samples,
        }
        by_status = {f"failed_{code.name.lower()}": self.counts[code] / self.samples for code in Status if code}
        return {name: float(value) for name, value in (named | by_status).items()}

    def failures(self) -> str:
        """For example "12 of 340 solves had samples that did not converge (15 of 2720: 14 MAX_STEPS, 1 NONFINITE)"."""
        kinds = ", ".join(f"{self.counts[code]} {code.name}" for code in self.seen_failures())
        return (
            f"{self.failed_solves} of {self.solves} solves had samples that did not converge "
            f"({self.failed} of {self.samples}: {kinds}); worst relative residual {self.worst:.2e}"
        )

    def advice(self) -> str:
        """What to do about the failures seen."""
        return " ".join(f"{code.name}: {ADVICE[code]}." for code in self.seen_failures())

    def seen_failures(self) -> list[Status]:
        """The kinds of failure that occurred."""
        return [code for code in Status if code != Status.CONVERGED and self.counts[code]]


class Tally:
    """Collects how solves go; `read` tells."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._solves, self._calls = 0, 0
        self._pending: list[_Outcome] = []
        self._pending_samples = 0
        self._sums: Tensor | None = None  # failed solves, steps, then samples by status
        self._most_steps, self._worst = torch.zeros(()), torch.zeros(())
        self._residuals: deque[Tensor] = deque()  # of the latest samples
        self._num_residuals = 0

    def add(self, outcome: Solution | AdjointStats) -> None:
        """Enter a solve. Its tensors must not be changed in place afterwards."""
        status, relative, steps = outcome.status, outcome.relative_residual, outcome.num_steps
        assert status is not None and relative is not None and steps is not None
        self._solves += 1
        self._calls += outcome.num_fn_evals
        if not status.numel():
            return
        self._pending.append(_Outcome(status, relative, steps, not (outcome.rtol or outcome.atol)))
        self._pending_samples += status.numel()
        if len(self._pending) >= _PENDING or self._pending_samples >= _PENDING_SAMPLES:
            self._fold()

    def read(self) -> Totals:
        """The sums so far. The host waits for the device."""
        self._fold()
        if self._sums is None:
            return Totals(self._solves, self._calls)
        failed, steps, *counts, most_steps = [*self._sums.tolist(), int(self._most_steps)]
        residuals = torch.cat([r.to(self._worst.device) for r in self._residuals])
        median, worst = torch.stack([residuals.median(), self._worst]).tolist()
        return Totals(self._solves, self._calls, failed, tuple(counts), steps, most_steps, median, worst)

    @torch.no_grad()
    def _fold(self) -> None:
        pending, self._pending, self._pending_samples = self._pending, [], 0
        for (_, _, _, fixed_steps), group in groupby(pending, key=lambda outcome: outcome.kind):
            self._fold_alike(list(group), fixed_steps)

    def _fold_alike(self, outcomes: list[_Outcome], fixed_steps: bool) -> None:
        # (solves, samples), all three
        status = torch.stack([o.status for o in outcomes]).reshape(len(outcomes), -1)
        steps = torch.stack([o.num_steps for o in outcomes]).reshape(len(outcomes), -1)
        relative = torch.stack([o.relative_residual for o in outcomes]).reshape(len(outcomes), -1)
        relative = relative.float().nan_to_num(nan=torch.inf, posinf=torch.inf)
        if fixed_steps:
            status = torch.where(status == Status.NONFINITE, status, int(Status.CONVERGED))
        failed = (status != Status.CONVERGED).any(dim=1).sum()
        sums = torch.stack([failed, steps.sum(), *((status == code).sum() for code in Status)])
        most_steps, worst = steps.max(), relative.max()
        if self._sums is None:
            self._sums, self._most_steps, self._worst = sums, most_steps, worst
        else:  # `to`, because a model may move on to another device
            self._sums = self._sums.to(sums.device) + sums
            self._most_steps = torch.maximum(self._most_steps.to(steps.device), most_steps)
            self._worst = torch.maximum(self._worst.to(worst.device), worst)
        self._keep_latest(relative.reshape(-1))

    def _keep_latest(self, residuals: Tensor) -> None:
        if residuals.numel() > _MEDIAN_SAMPLES:
            residuals = residuals[-_MEDIAN_SAMPLES:].clone()
        self._residuals.append(residuals)
        self._num_residuals += residuals.numel()
        while self._num_residuals - self._residuals[0].numel() >= _MEDIAN_SAMPLES:
            self._num_residuals -= self._residuals.popleft().numel()
