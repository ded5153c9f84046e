"""L3. Loops in a row: what one solver leaves unsolved goes to the next, from its best point."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from deqkit import linalg, loop
from deqkit.ledger import LoopResult
from deqkit.loop import StepInfo
from deqkit.norms import StateNorm
from deqkit.solution import Status
from deqkit.solvers.base import Solver, Stage
from deqkit.state import Blocks, Evaluator
from deqkit.termination import Termination, outlook_for, patience_for, roughly


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
    first, *others = _worthwhile(solver.stages(), f, termination)
    rules = _rules(termination, first, max_steps, 1 if others else None)
    limits = None
    if rules.outlook is not None:
        limits = torch.full((f.layout.num_samples,), max_steps, device=f.layout.device)
    with _precision(f, first):
        result = loop.run(
            f, x0, first.solver, rules, max_steps=max_steps, norm=norm, limits=limits, trace=trace, keep=keep,
            callback=callback, record=record,
        )  # fmt: skip
    before = first
    for i, stage in enumerate(others, start=1):
        left = max_steps - result.num_steps
        anew = before.autocast is not None  # that was another f, of which nothing counts
        going_on = left >= 0 if anew else (result.status != Status.CONVERGED) & (left > 0)
        if not bool(going_on.any()):
            break
        steps, done = int(left[going_on].max()), int(result.num_steps.max())
        # What failed before is hard, and takes longer to judge.
        rules = _rules(termination, stage, steps, 2 if i < len(others) else None)
        later = loop.run(
            f, result.x, stage.solver, rules, max_steps=steps, norm=norm, active=going_on, limits=left, trace=trace,
            keep=_later_steps(keep, result.num_steps[going_on], anew), callback=_counting_on(callback, done),
        )  # fmt: skip
        result, before = _merge(result, later, going_on, keep, anew), stage
    return result


def _worthwhile(stages: tuple[Stage, ...], f: Evaluator, termination: Termination) -> list[Stage]:
    """None in a precision lower than f can be given, and the first alone where there is no failure to see."""
    if termination.fixed_steps:
        return [stage for stage in stages if stage.autocast is None][:1]
    return [stage for stage in stages if stage.autocast is None or f.can_be_lowered]


def _rules(termination: Termination, stage: Stage, max_steps: int, outlooks: int | None) -> Termination:
    """When a stage is done; ``outlooks`` scales the time after which its pace is judged, where others are waiting."""
    blind_steps = stage.solver.blind_steps
    if stage.autocast is not None:
        return roughly(termination, torch.finfo(stage.autocast).eps, blind_steps)
    outlook = None if outlooks is None else outlooks * outlook_for(max_steps, blind_steps)
    return replace(termination, patience=patience_for(max_steps, blind_steps), outlook=outlook)


def _precision(f: Evaluator, stage: Stage) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if stage.autocast is None else f.lowered_to(stage.autocast)


def _later_steps(keep: Collection[int], num_steps: Tensor, anew: bool) -> set[int]:
    """The steps of the next stage at which any of its samples comes to one of ``keep``; ``anew``: see `_merge`."""
    return {k - ended for ended in set(num_steps.tolist()) for k in keep if k >= ended + (not anew)}


def _counting_on(callback: Callable[[StepInfo], None] | None, done: int) -> Callable[[StepInfo], None] | None:
    return None if callback is None else lambda info: callback(replace(info, step=done + info.step))


def _merge(first: LoopResult, later: LoopResult, went_on: Tensor, keep: Collection[int], anew: bool) -> LoopResult:
    """The records of two stages, the later one for the samples that went on.

    With ``anew`` the step between them is told by the point that the later one starts from, and else by the last one of
    the first.
    """
    return LoopResult(
        x=linalg.where(went_on, later.x, first.x),
        status=torch.where(went_on, later.status, first.status),
        residual=torch.where(went_on, later.residual, first.residual),
        relative_residual=torch.where(went_on, later.relative_residual, first.relative_residual),
        num_steps=torch.where(went_on, first.num_steps + later.num_steps, first.num_steps),
        trace=_merge_traces(first, later, went_on, anew),
        kept=_merge_kept(first, later, went_on, keep, anew),
        parts=None if first.parts is None or later.parts is None else torch.where(went_on, later.parts, first.parts),
    )


def _merge_traces(first: LoopResult, later: LoopResult, went_on: Tensor, anew: bool) -> Tensor | None:
    """Every sample's measurements in a row, however long it waited for the others between the stages."""
    if first.trace is None or later.trace is None:
        return None
    num_steps = torch.where(went_on, first.num_steps + later.num_steps, first.num_steps)
    row = torch.arange(int(num_steps.max()) + 1, device=went_on.device).unsqueeze(1)
    earlier = first.trace.gather(0, row.clamp(max=len(first.trace) - 1).expand(-1, len(went_on)))
    after = row - first.num_steps
    further = later.trace.gather(0, after.clamp(0, len(later.trace) - 1))
    further = torch.where(went_on & (after <= later.num_steps), further, torch.nan)
    return torch.where(after >= (not anew), further, earlier)


def _merge_kept(
    first: LoopResult, later: LoopResult, went_on: Tensor, keep: Collection[int], anew: bool
) -> dict[int, Blocks]:
    """The points of the steps ``keep``, each sample's counted from its own start."""
    kept: dict[int, Blocks] = {}
    for k in keep:
        x = linalg.where(went_on, later.x, first.x)  # for those that ended before
        for step, point in later.kept.items():
            x = linalg.where(went_on & (first.num_steps + step == k) & (step > 0 or anew), point, x)
        if k in first.kept:
            x = linalg.where(first.num_steps >= k + anew, first.kept[k], x)
        kept[k] = x
    return kept
