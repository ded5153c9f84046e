"""L3. Loops in a row: what one solver leaves unsolved goes to the next, from its best point."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from deqkit import linalg, loop
from deqkit.ledger import LoopResult
from deqkit.loop import StepInfo
from deqkit.norms import StateNorm
from deqkit.solution import Status
from deqkit.solvers.base import Solver
from deqkit.state import Blocks, Evaluator
from deqkit.termination import Termination, outlook_for, patience_for


def run(
    f: Evaluator,
    x0: Blocks,
    solver: Solver,
    termination: Termination,
    *,
    max_steps: int,
    norm: StateNorm,
    trace: bool = False,
    keep: Collection[int] = (),
    callback: Callable[[StepInfo], None] | None = None,
    record: bool = False,
) -> LoopResult:
    """`deqkit.loop.run` for each stage of ``solver`` in turn, until all samples are solved or the steps are used up.

    Every stage evaluates its starting points once more. Steps are counted through; the trace holds those points once.
    The limit is that of every sample: a batch of which some samples end late in one stage, and others in the next, has
    f evaluated more often.

    Args:
        f: see `deqkit.loop.run`, as for the others.
        x0: see there.
        solver: settings of the solver, or of several.
        termination: when a sample is done; the patience of each stage is set here.
        max_steps: limit of the steps of all stages together.
        norm: see there.
        trace: see there.
        keep: see there.
        callback: see there.
        record: see there; of the first stage.
    """
    first, *others = solver.stages()
    if termination.fixed_steps:  # there is no failure to see
        others = []
    patient = replace(termination, patience=patience_for(max_steps, first.blind_steps))
    limits = None
    if others:  # which are waiting
        patient = replace(patient, outlook=outlook_for(max_steps, first.blind_steps))
        limits = torch.full((f.layout.num_samples,), max_steps, device=f.layout.device)
    result = loop.run(
        f, x0, first, patient, max_steps=max_steps, norm=norm, limits=limits, trace=trace, keep=keep, callback=callback,
        record=record,
    )  # fmt: skip
    for i, stage in enumerate(others, start=1):
        left = max_steps - result.num_steps
        failed = (result.status != Status.CONVERGED) & (left > 0)
        if not bool(failed.any()):
            break
        steps, done = int(left[failed].max()), int(result.num_steps.max())
        patient = replace(termination, patience=patience_for(steps, stage.blind_steps))
        if i < len(others):  # another one is waiting; what failed before is hard, and takes longer to judge
            patient = replace(patient, outlook=2 * outlook_for(steps, stage.blind_steps))
        later = loop.run(
            f, result.x, stage, patient, max_steps=steps, norm=norm, active=failed, limits=left, trace=trace,
            keep=_later_steps(keep, result.num_steps[failed]), callback=_counting_on(callback, done),
        )  # fmt: skip
        result = _merge(result, later, failed, keep)
    return result


def _later_steps(keep: Collection[int], num_steps: Tensor) -> set[int]:
    """The steps of the next stage at which any of its samples comes to one of ``keep``."""
    return {k - ended for ended in set(num_steps.tolist()) for k in keep if k > ended}


def _counting_on(callback: Callable[[StepInfo], None] | None, done: int) -> Callable[[StepInfo], None] | None:
    return None if callback is None else lambda info: callback(replace(info, step=done + info.step))


def _merge(first: LoopResult, later: LoopResult, failed: Tensor, keep: Collection[int]) -> LoopResult:
    """The records of two stages, the later one for the samples on which the first had failed."""
    return LoopResult(
        x=linalg.where(failed, later.x, first.x),
        status=torch.where(failed, later.status, first.status),
        residual=torch.where(failed, later.residual, first.residual),
        relative_residual=torch.where(failed, later.relative_residual, first.relative_residual),
        num_steps=torch.where(failed, first.num_steps + later.num_steps, first.num_steps),
        trace=_merge_traces(first, later, failed),
        kept=_merge_kept(first, later, failed, keep),
        parts=None if first.parts is None or later.parts is None else torch.where(failed, later.parts, first.parts),
    )


def _merge_traces(first: LoopResult, later: LoopResult, failed: Tensor) -> Tensor | None:
    """Every sample's measurements in a row, however long it waited for the others between the stages."""
    if first.trace is None or later.trace is None:
        return None
    num_steps = torch.where(failed, first.num_steps + later.num_steps, first.num_steps)
    row = torch.arange(int(num_steps.max()) + 1, device=failed.device).unsqueeze(1)
    earlier = first.trace.gather(0, row.clamp(max=len(first.trace) - 1).expand(-1, len(failed)))
    after = row - first.num_steps
    further = later.trace.gather(0, after.clamp(0, len(later.trace) - 1))
    further = torch.where(failed & (after <= later.num_steps), further, torch.nan)
    return torch.where(after > 0, further, earlier)


def _merge_kept(first: LoopResult, later: LoopResult, failed: Tensor, keep: Collection[int]) -> dict[int, Blocks]:
    """The points of the steps ``keep``, each sample's counted from its own start."""
    kept: dict[int, Blocks] = {}
    for k in keep:
        x = linalg.where(failed, later.x, first.x)  # for those that ended before
        for step, point in later.kept.items():
            x = linalg.where(failed & (first.num_steps + step == k) & (step > 0), point, x)
        if k in first.kept:
            x = linalg.where(first.num_steps >= k, first.kept[k], x)
        kept[k] = x
    return kept
