"""L1. What a solve returns: the answer and the truth about it.

Shapes: "batch" is the batch shape of x0, () for ``batch_dims=0``.
"""

from __future__ import annotations

import copy
import enum
import warnings
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from deqkit import arrays, levels
from deqkit.errors import ConvergenceError, ConvergenceWarning


class Status(enum.IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 0  #: the tolerance was met by the returned point
    MAX_STEPS = 1  #: the step limit came first
    STAGNATED = 2  #: the residual stopped falling above the tolerance
    DIVERGED = 3  #: the residual grew beyond the scale of the problem
    NONFINITE = 4  #: f or the step produced NaN or infinity


@dataclass(eq=False)
class AdjointStats:
    """How the adjoint solve of the last backward pass went. Empty (None) until then, and for adjoints without a solve.

    Attributes:
        status: integer `Status` codes, batch.
        residual: |J^T u + g - u| of the u that was used, batch.
        relative_residual: that, relative to |J^T u + g|, batch.
        num_steps: steps per sample, batch.
        num_fn_evals: vector-Jacobian products taken.
        solver: name of the backward solver.
        rtol: the relative tolerance of the adjoint solve.
        atol: its absolute tolerance.
    """

    status: Tensor | None = None
    residual: Tensor | None = None
    relative_residual: Tensor | None = None
    num_steps: Tensor | None = None
    num_fn_evals: int = 0
    solver: str = ""
    rtol: float = 0.0
    atol: float = 0.0

    @property
    def converged(self) -> Tensor | None:
        """Which samples' adjoint converged, bool, batch; None before a backward pass."""
        return None if self.status is None else self.status == Status.CONVERGED

    def __str__(self) -> str:
        if self.status is None:
            return "AdjointStats: no adjoint solve yet"
        return _summary("AdjointStats", self, self.solver, f"{self.num_fn_evals} vector-Jacobian products")


@dataclass(eq=False)
class Solution:
    """The result of `deqkit.solve`.

    The graph of `value` holds f. A solution that is kept on an object that f refers to therefore keeps both alive for
    ever, out of the garbage collector's sight: keep `detach()` of it. A deep copy is detached, too.

    Attributes:
        value: the best point visited, of x0's structure, shapes, dtypes and device; differentiable.
        status: integer `Status` codes, batch.
        residual: |f(x) - x| of exactly the point in `value`, undamped, in the solve's norm, batch.
        relative_residual: residual / |f(x)|, batch.
        leaf_residuals: the relative residual of every leaf of `value` by itself, (leaves, batch), under
            ``norm="leaf_max"``; else None.
        num_steps: solver steps each sample took until it ended, batch.
        num_fn_evals: how often f was called, the evaluations that only carry the gradient included.
        trace: relative residuals (evaluations, batch) if asked for, else None. Row 0 belongs to x0. A sample that has
            ended is not measured any more: NaN. By "mixed_precision" the first rows are those of f in low precision.
        states: the points of the steps that were asked for, by step, like `value`; differentiable, with the gradient
            that the adjoint would give them if they were the answer. Where a sample had ended by then: its value.
        aux: the second output of f at `value`, under ``has_aux=True``; differentiable.
        adjoint_stats: filled in by a backward pass through `value`.
        solver: name of the solver.
        rtol: the relative tolerance that was asked for.
        atol: the absolute tolerance that was asked for.
        masks: of variational dropout, as the solve has drawn them: for `deqkit.nn.hold`. Copies do not have them.
    """

    value: Any
    status: Tensor
    residual: Tensor
    relative_residual: Tensor
    num_steps: Tensor
    num_fn_evals: int
    trace: Tensor | None = None
    leaf_residuals: Tensor | None = None
    states: dict[int, Any] = field(default_factory=dict)
    aux: Any = None
    adjoint_stats: AdjointStats = field(default_factory=AdjointStats)
    solver: str = ""
    rtol: float = 0.0
    atol: float = 0.0
    masks: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def converged(self) -> Tensor:
        """Which samples met the tolerance, bool, batch."""
        return self.status == Status.CONVERGED

    def detach(self) -> Solution:
        """The same solution with tensors that hold no autograd graph; `adjoint_stats` stays shared.

        Under a transform of `torch.func` these are ordinary tensors, which may outlive it, with mapped dims first.
        """
        names = ["value", "states", "aux"]
        if levels.active():
            names += ["status", "residual", "relative_residual", "num_steps", "trace", "leaf_residuals"]
        return replace(self, **{name: tree_map(_detached, getattr(self, name)) for name in names})

    def __getstate__(self) -> dict[str, Any]:
        """Without the masks, which belong to the modules that drew them."""
        return self.__dict__ | {"masks": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Solution:
        copied = replace(self.detach(), masks={})  # tensors with a graph refuse to be copied
        memo[id(self)] = copied
        for item in fields(self):
            setattr(copied, item.name, copy.deepcopy(getattr(copied, item.name), memo))
        return copied

    def __str__(self) -> str:
        seen = self.detach()  # under torch.vmap nobody can look at anything else
        tolerance = f"rtol={self.rtol:g}" + (f", atol={self.atol:g}" if self.atol else "")
        lines = [_summary("Solution", seen, f"{self.solver}, {tolerance}", f"f called {self.num_fn_evals} times")]
        failures = failure_counts(seen.status)
        if failures:
            lines.append(f"  not converged: {failures}")
        return "\n".join(lines)

    __repr__ = __str__


def _detached(leaf: Any) -> Any:
    return levels.grounded(leaf) if isinstance(leaf, Tensor) else leaf


def failure_counts(status: Tensor) -> str:
    """For example "2 MAX_STEPS, 1 NONFINITE"; empty when all converged."""
    counts = [(int((status == code).sum()), code) for code in Status if code != Status.CONVERGED]
    return ", ".join(f"{count} {code.name}" for count, code in counts if count)


def _summary(title: str, outcome: Solution | AdjointStats, setting: str, cost: str) -> str:
    """Two lines on how a solve went."""
    status, relative, steps = outcome.status, outcome.relative_residual, outcome.num_steps
    assert status is not None and relative is not None and steps is not None
    head = f"{title}: {int((status == Status.CONVERGED).sum())} of {status.numel()} samples converged ({setting})"
    if status.numel() == 0:
        return head
    low, high = int(steps.min()), int(steps.max())
    span = f"{low}" if low == high else f"{low}-{high}"
    return (
        f"{head}\n  {span} steps, {cost}, "
        f"relative residual median {relative.float().nanmedian():.1e}, worst {_worst(relative):.1e}"
    )


def _worst(relative: Tensor) -> float:
    return float(relative.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


ADVICE = {
    Status.MAX_STEPS: "raise max_steps, loosen rtol, or make f contract faster (Jacobian penalty, smaller weights); if "
    "more steps do not help, check that f is deterministic",
    Status.STAGNATED: "loosen rtol, use a higher dtype, or check that f is deterministic "
    "(dropout and BatchNorm in train mode have no fixed point)",
    Status.DIVERGED: "f expands here: try solver='anderson' or 'broyden', damping, or smaller weights (a norm cap, "
    "a Jacobian penalty)",
    Status.NONFINITE: "f returned NaN or infinity: check its input and its scale, and the samples marked NONFINITE; "
    "where the solver overshot, try damping or solver='fixed_point'",
}


def failure_message(what: str, outcome: Any, failed: Tensor, *, rtol: float, atol: float, resolution: float) -> str:
    """What happened, the likely cause, what to change.

    Args:
        what: "solve" or "adjoint solve".
        outcome: has status, residual, relative_residual and num_steps.
        failed: which samples fell short, bool, batch.
        rtol: the relative tolerance that was asked for.
        atol: the absolute tolerance that was asked for.
        resolution: relative spacing of the state's dtype.
    """
    status = outcome.status
    worst = f"worst relative residual {_worst(outcome.relative_residual[failed]):.2e}"
    asked = f"asked for {rtol:.2e}" if rtol else "in a fixed number of steps"
    if atol:
        absolute = f"residual {_worst(outcome.residual[failed]):.2e}"
        worst = f"{worst}, {absolute}" if rtol else f"worst {absolute}"
        asked = f"asked for rtol={rtol:.2e} or atol={atol:.2e}" if rtol else f"asked for atol={atol:.2e}"
    lines = [
        f"{what}: {int(failed.sum())} of {status.numel()} samples did not converge ({failure_counts(status[failed])}); "
        f"{worst}, {asked}, after {int(outcome.num_steps[failed].max())} steps."
    ]
    if 0 < rtol < 4 * resolution:
        lines.append(f"rtol={rtol:g} is below what the state's dtype can resolve ({resolution:.1e}).")
    seen = [code for code in Status if bool((status[failed] == code).any())]
    lines += [f"{code.name}: {ADVICE[code]}." for code in seen]
    return " ".join(lines)


def report_failure(
    policy: str, what: str, outcome: Any, *, rtol: float, atol: float, resolution: float, stacklevel: int
) -> None:
    """Warn, raise or keep silent about samples that did not converge, as ``policy`` says.

    A solve of a fixed number of steps (rtol = atol = 0) has nothing to reach: only NONFINITE is a failure there.

    Raises:
        ConvergenceError: under "raise".
    """
    if policy == "ignore" or torch.compiler.is_compiling() or arrays.is_capturing(outcome.status.device):
        return
    failed = outcome.status != Status.CONVERGED if rtol or atol else outcome.status == Status.NONFINITE
    if not bool(failed.any()):
        return
    message = failure_message(what, outcome, failed, rtol=rtol, atol=atol, resolution=resolution)
    if policy == "raise":
        raise ConvergenceError(message, outcome)
    warnings.warn(message, ConvergenceWarning, stacklevel=stacklevel + 1)
