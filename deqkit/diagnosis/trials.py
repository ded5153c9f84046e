"""L6. Every solver and every adjoint, tried on f. One that fails is an entry in the table like the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deqkit import linalg
from deqkit.adjoints import Adjoint, UnrolledAdjoint
from deqkit.api import solve
from deqkit.diagnosis.checks import in_words
from deqkit.diagnosis.gradient_checks import saved_bytes
from deqkit.diagnosis.records import AdjointTrial, SolverTrial, Spectrum, full_name, ranked
from deqkit.diagnosis.subject import Subject
from deqkit.errors import ConvergenceError
from deqkit.gradient_error import ExactGradient
from deqkit.solution import Solution
from deqkit.solvers import Solver
from deqkit.spectral import eigenvalues, spectral_norm, spectral_radius
from deqkit.state import Blocks, StateLayout

_FINEST = 10  # units of the resolution, to which the fixed point is solved in the end
_EXACT = 10  # times max_steps: limit of products for the exact gradient, and for the eigenvalues
_NONE = "no solver converges"
_UNFIT = "no solver that it builds on converges"
_ADJOINT_RTOL = 1e-4  # where the solves have only an absolute tolerance
_DENSE = 64  # numbers in a sample, up to which all of its eigenvalues are had for a product each
_NUM_EIGENVALUES, _ROUGHLY = 12, 1e-2  # of larger ones, and the relative accuracy that a picture asks for
_SPECTRAL = 4  # times max_steps: limit of the products for the radius, and for the norm
_MEMORY = 2**31  # bytes that an unrolled solve may be expected to keep


@dataclass(frozen=True)
class Settings:
    """How the solves are to be run; see `deqkit.solve`."""

    rtol: float
    atol: float
    max_steps: int
    norm: Any

    def solve(
        self, subject: Subject, x0: Any, *, f: Callable[..., Any] | None = None, batch_dims: int | None = None,
        **others: Any,
    ) -> Solution:  # fmt: skip
        """Solve for the fixed point of the subject, or of ``f``, and keep quiet about how it went."""
        settings = {"rtol": self.rtol, "atol": self.atol, "max_steps": self.max_steps, "norm": self.norm} | others
        dims = subject.batch_dims if batch_dims is None else batch_dims
        if dims != subject.batch_dims and callable(self.norm):
            settings["norm"] = None  # a norm of one system, which the caller's is not
        return solve(f or subject.call, x0, args=subject.args, batch_dims=dims, on_failure="ignore", **settings)


@dataclass(frozen=True)
class FixedPointFound:
    """The best point that the solvers found, made as good as the best of them can make it.

    Attributes:
        x: the point, of x0's structure.
        settled: which samples converged there, bool (batch).
        batch_dims: 0 if f couples the samples, so that they are one system.
        ranked: the trials that came to an end, best first.
    """

    x: Any
    settled: Tensor
    batch_dims: int
    ranked: tuple[SolverTrial, ...]

    @property
    def num_steps(self) -> int:
        """The most steps that the best solver took."""
        steps = self.ranked[0].num_steps
        return 0 if steps is None else int(steps.max())


def try_solver(
    subject: Subject, solver: Solver, settings: Settings, *, variation: str = "", **changes: Any
) -> tuple[SolverTrial, Any]:
    """One solve from x0, and the point where it ended; None where it raised an error.

    Args:
        subject: f and x0.
        solver: to be tried.
        settings: how to solve.
        variation: what ``changes`` to `Settings.solve` amount to, in words.
        changes: see there.
    """
    name = full_name(solver) + (f", {variation}" if variation else "")
    before, started = subject.num_calls, subject.clock()
    try:
        with torch.no_grad():
            sol = settings.solve(subject, subject.x0, solver=solver, trace=True, **changes)
    except Exception as error:
        spent = {"num_fn_evals": subject.num_calls - before, "seconds": subject.clock() - started}
        return SolverTrial(name, solver, exception=in_words(error), **spent), None
    seconds = subject.clock() - started
    assert sol.trace is not None
    trial = SolverTrial(
        name, solver, sol.status.cpu(), sol.num_steps.cpu(), sol.relative_residual.cpu(), trace=sol.trace.cpu(),
        num_fn_evals=sol.num_fn_evals, seconds=seconds,
    )  # fmt: skip
    return trial, sol.value


def try_variations(subject: Subject, solver: Solver, settings: Settings, ails: set[str]) -> list[SolverTrial]:
    """The same solve without what ails f, to see whether that is the cause.

    Args:
        subject: f and x0.
        solver: to be tried.
        settings: how to solve.
        ails: names of the checks that failed.
    """
    tried = []
    if "deterministic" in ails:
        same = {"variation": "same random numbers at every call", "f": subject.call_with_same_draws}
        tried.append(try_solver(subject, solver, settings, **same)[0])
    if "independent samples" in ails:
        tried.append(try_solver(subject, solver, settings, variation="batch_dims=0", batch_dims=0)[0])
    training = [module for module in subject.modules.values() if module.training]
    if ails & {"deterministic", "independent samples", "stateless"} and training:
        for module in training:
            module.training = False
        tried.append(try_solver(subject, solver, settings, variation="modules in eval mode")[0])
        for module in training:
            module.training = True
    return tried


def settle(
    subject: Subject, tried: list[tuple[SolverTrial, Any]], settings: Settings, *, coupled: bool
) -> FixedPointFound | None:
    """The fixed point of the best solver, and, for samples on which it failed, of the next best; then solved on."""
    values = {id(trial): subject.layout.pack(value) for trial, value in tried if value is not None}
    order = [trial for trial in ranked([trial for trial, _ in tried]) if id(trial) in values]
    if not order:
        return None
    x, found = values[id(order[0])], order[0].converged.reshape(-1)
    for trial in order[1:]:
        better = (trial.converged.reshape(-1) & ~found).to(subject.device)
        x, found = linalg.where(better, values[id(trial)], x), found | trial.converged.reshape(-1)
    dims = 0 if coupled else subject.batch_dims
    finest = _FINEST * subject.resolution
    with torch.no_grad():
        sol = settings.solve(
            subject, subject.layout.unpack(x), batch_dims=dims, solver=order[0].solver, rtol=finest, atol=0.0
        )  # fmt: skip
    settled = sol.relative_residual <= max(settings.rtol, finest)
    return FixedPointFound(sol.value, settled, dims, tuple(order))


def with_errors(subject: Subject, tried: list[tuple[SolverTrial, Any]], found: FixedPointFound) -> list[SolverTrial]:
    """The trials, with the distance of where they ended to the fixed point that was found."""
    reference = subject.layout.pack(found.x)
    settled = found.settled.expand(subject.layout.batch_shape).reshape(-1)
    trials = []
    for trial, value in tried:
        if value is not None:
            off = _distance(subject.layout.pack(value), reference).masked_fill(~settled, torch.nan)
            trial = replace(trial, error=subject.layout.per_sample(off).cpu())
        trials.append(trial)
    return trials


def _distance(x: Blocks, reference: Blocks) -> Tensor:
    """|x - reference| / |reference|, (B,)."""
    size = linalg.norm(reference)
    difference = linalg.norm(tuple(torch.sub(a, b) for a, b in zip(x, reference, strict=True)))
    return difference / torch.where(size > 0, size, 1.0)


def take_spectrum(subject: Subject, found: FixedPointFound, settings: Settings) -> Spectrum:
    """Radius, norm and eigenvalues of df/dx at the point that was found."""
    limit, most, notes = max(_SPECTRAL * settings.max_steps, 32), _EXACT * settings.max_steps, []
    point: dict[str, Any] = {"args": subject.args, "batch_dims": found.batch_dims}
    radius = norm = values = None
    worst = 0
    try:
        radius = spectral_radius(subject.call, found.x, max_products=limit, return_error=True, **point)
        flat = radius.value.reshape(-1).nan_to_num(nan=-1.0)
        if bool(found.settled.any()):
            flat = flat.masked_fill(~found.settled.reshape(-1), -1.0)
        worst = int(flat.argmax())
    except Exception as error:
        notes.append(f"no spectral radius: {in_words(error)}")
    try:
        norm = spectral_norm(subject.call, found.x, max_products=limit, return_error=True, **point)
    except Exception as error:
        notes.append(f"no spectral norm: {in_words(error)}")
    size = sum(b.shape[1] for b in StateLayout(found.x, found.batch_dims).pack(found.x))
    try:
        values = eigenvalues(
            subject.call, found.x, num=size if size <= _DENSE else _NUM_EIGENVALUES, sample=worst, rtol=_ROUGHLY,
            max_products=most, **point,
        )  # fmt: skip
        if len(values) < min(size, _NUM_EIGENVALUES):
            notes.append(f"only {len(values)} of {_NUM_EIGENVALUES} eigenvalues are known after {most} products")
    except Exception as error:
        notes.append(f"no eigenvalues: {in_words(error)}")
    return Spectrum(
        radius=None if radius is None else radius.value.cpu(),
        radius_error=None if radius is None else radius.error.cpu(),
        norm=None if norm is None else norm.value.cpu(),
        eigenvalues=values,
        worst=worst,
        settled=found.settled.cpu(),
        one_system=found.batch_dims == 0 and subject.batch_dims > 0,
        note="; ".join(notes),
    )


def try_adjoints(
    subject: Subject, adjoints: list[Adjoint], found: FixedPointFound, settings: Settings
) -> tuple[list[AdjointTrial], str]:
    """Every adjoint's gradient beside the exact one; and what kept that from being had, else ""."""
    layout = StateLayout(found.x, found.batch_dims)
    settled = found.settled.reshape(-1)
    # Towards samples that have no fixed point there is no gradient: they get no share of the cotangent.
    drawn = layout.pack(subject.layout.unpack(subject.draw()))
    cotangent = layout.unpack(linalg.where(settled, drawn, tuple(torch.zeros_like(b) for b in drawn)))
    limit = _EXACT * max(settings.max_steps, 1)
    try:
        exact = ExactGradient(
            subject.call, found.x, args=subject.args, cotangent=cotangent, batch_dims=found.batch_dims, max_steps=limit
        )  # fmt: skip
    except ConvergenceError:
        why = "" if bool(found.settled.all()) else "; samples without a fixed point may be the cause"
        return [], f"no adjoints: the exact gradient cannot be had from GMRES in {limit} products{why}"
    except ValueError as error:
        return [], f"no adjoints: {error}"
    except Exception as error:
        return [], f"no exact gradient to compare with: {in_words(error)}"
    return [_try_adjoint(subject, adjoint, exact, found, settings) for adjoint in adjoints], ""


def _try_adjoint(
    subject: Subject, adjoint: Adjoint, exact: ExactGradient, found: FixedPointFound, settings: Settings
) -> AdjointTrial:
    """At the fixed point, or, for an adjoint that is bound to the steps of a solver, through a solve."""
    name = full_name(adjoint)
    if isinstance(adjoint, UnrolledAdjoint) and not adjoint.checkpoint:
        kept = saved_bytes(subject) * (found.num_steps + 1)
        if kept > _MEMORY:
            return AdjointTrial(name, adjoint, exception=f"not tried: it would keep about {kept / 2**30:.1f} GiB")
    if adjoint.unrolls or adjoint.needs is not None:
        return _through_a_solve(subject, adjoint, exact, found, settings)
    started = subject.clock()
    try:
        error = exact.compare(adjoint, rtol=settings.rtol or _ADJOINT_RTOL, max_steps=settings.max_steps)
    except Exception as at_the_point:
        trial = _through_a_solve(subject, adjoint, exact, found, settings)
        return (
            trial
            if trial.cosine is not None or trial.exception != _NONE
            else replace(trial, exception=in_words(at_the_point))
        )
    seconds = subject.clock() - started
    return AdjointTrial(name, adjoint, error.cosine, error.relative_error, error.num_products, seconds)


def _through_a_solve(
    subject: Subject, adjoint: Adjoint, exact: ExactGradient, found: FixedPointFound, settings: Settings
) -> AdjointTrial:
    """With the best of the solvers that the adjoint takes."""
    problem = ""
    for trial in found.ranked:
        if not trial.num_converged:
            break
        if adjoint.needs is not None and trial.solver.record is not adjoint.needs:
            problem = problem or _UNFIT
            continue
        try:
            sol = settings.solve(
                subject, subject.x0, batch_dims=found.batch_dims, solver=trial.solver, adjoint=adjoint
            )  # fmt: skip
            started, stats = subject.clock(), sol.adjoint_stats
            error = exact.compare_value(adjoint, sol.value, lambda s=stats: s.num_fn_evals if s.solver else None)
        except Exception as failed:
            problem = in_words(failed) if problem in ("", _UNFIT) else problem
            continue
        seconds = subject.clock() - started
        return AdjointTrial(
            full_name(adjoint), adjoint, error.cosine, error.relative_error, error.num_products, seconds, trial.name
        )  # fmt: skip
    return AdjointTrial(full_name(adjoint), adjoint, exception=problem or _NONE)
