"""L6. From evidence to advice: one function per rule, each a sentence or two that name the numbers they rest on.

A rule sees the whole `Diagnosis` and says nothing where its evidence is missing. What is broken comes first, then what
the solvers and the spectrum say, then the adjoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deqkit.diagnosis.records import AdjointTrial, Diagnosis, SolverTrial, ranked
from deqkit.diagnosis.remedies import remedy
from deqkit.plots import fitted_rates
from deqkit.solution import Status

_ALIKE, _ASTRAY = 0.95, 0.7  # cosine from which on an approximate gradient will do, and below which it will not
_SLOW = 0.95  # radius above which a plain iteration crawls
_STRETCH = 3.0  # times the radius, above which the norm tells of a transient
_SINGULAR = 0.05  # distance of an eigenvalue from 1
_APART = 0.05  # relative distance between two points that are not the same fixed point
_WASTEFUL, _FEW = 1.3, 3  # times the calls of the best solver, and that many more besides
_FALLS = 0.999  # factor per step, below which a residual still falls
_MARGIN = 1.5  # times the steps that a rate makes one expect
_FINEST = 10  # units of the resolution, below which a residual cannot be told from rounding
_PATIENT = 20  # times max_steps, up to which more steps are recommended
_MOST = 0.5  # of the samples, that must converge besides for a change to have helped
_WRONG = 0.1  # relative error of a gradient that should be exact


def recommend(d: Diagnosis) -> tuple[str, ...]:
    """What to do, the most urgent first."""
    said = [sentence for rule in RULES for sentence in rule(d)]
    return tuple(said) or ("nothing to recommend: too little could be found out",)


def broken(d: Diagnosis) -> Iterator[str]:
    """A failed check: what it means and what to change."""
    for check in d.failed:
        yield f"{check.finding.rstrip('.')}. {remedy(check)}"
    if any(check.name == "derivative" for check in d.failed):
        yield "what is said of the Jacobian and of gradients below holds for autograd's derivative, not for f's"


def what_helps(d: Diagnosis) -> Iterator[str]:
    """Whether the solve goes well once what ails f is taken away."""
    before = max((_share(t) for t in d.solvers), default=0.0)
    helped = [t for t in d.variations if t.all_converged or _share(t) > before + _MOST]
    named = "; ".join(f"{t.name} ({t.num_converged} of {_count(t.converged.numel(), 'sample')})" for t in helped)
    if named and before < 1:
        yield f"this is the cause, for without it the solve converges: {named}"
    elif d.variations and not named:
        yield "it is not the only cause: the solve does not converge without it, either"


def fit(d: Diagnosis) -> Iterator[str]:
    """Nothing is wrong."""
    if d.healthy:
        yield "f is fit for solve: no check failed"


def solvers_that_work(d: Diagnosis) -> Iterator[str]:
    """Which solver to take, if any converges on every sample."""
    best = d.best
    if best is None or not best.all_converged:
        return
    others = [t for t in d.solvers if t.all_converged and t is not best]
    of = "the only one that does" if not others else f"the fewest of {len(others) + 1} solvers that do"
    samples = f" on all {d.num_samples} samples" if d.num_samples > 1 else ""
    name = f"deqkit.{best.name}" if "(" in best.name else repr(best.name)
    yield f"solver={name} converges{samples} in {_count(best.num_fn_evals, 'call')} of f, {of}"
    default = next((t for t in d.solvers if t.name == "anderson"), None)
    if default is None or default is best or default.status is None:
        return
    if not default.all_converged:
        missed = d.num_samples - default.num_converged
        yield f"the default, 'anderson', fails on {missed} of {_count(d.num_samples, 'sample')} ({_ends(default)})"
    elif default.num_fn_evals > _WASTEFUL * best.num_fn_evals + _FEW:
        yield f"the default, 'anderson', needs {default.num_fn_evals / best.num_fn_evals:.1f} times as many calls"


def solvers_that_fail(d: Diagnosis) -> Iterator[str]:
    """What to do when no solver converges on every sample."""
    ended = [t for t in d.solvers if t.status is not None]
    if not d.solvers or any(t.all_converged for t in ended):
        return
    if not ended:
        yield f"no solver came to an end: {d.solvers[0].exception}"
        return
    if any(check.name in ("finite", "deterministic", "independent samples") for check in d.failed):
        return  # which is the cause, and has been named
    best = ranked(ended)[0]
    share = f"{best.num_converged} of {d.num_samples} samples" if best.num_converged else "no sample"
    head = f"no solver converges on all samples in {d.max_steps} steps; {best.name} gets furthest, on {share}"
    settled = d.spectrum.settled if d.spectrum is not None else None
    low, needed = min(t.left[0] for t in ended), _steps_needed(d, ended)
    if d.rtol < _FINEST * d.resolution and low < _FINEST * d.resolution:
        yield f"{head}. The residual gets down to {low:.1e}, about as far as this dtype goes: loosen rtol"
    elif settled is not None and bool(settled.all()):
        yield f"{head}. All settle when it goes on: raise max_steps to {2 * d.max_steps}"
    elif needed is not None:
        name, steps = needed
        yield f"{head}. The residuals of {name} still fall: raise max_steps to about {steps}, or make f contract"
    elif all(_has(t, Status.NONFINITE) for t in ended):
        yield f"{head}. f leaves the finite numbers on the way: bound it (tanh, a norm cap), or try damping"
    elif low < 10 * d.rtol:
        yield f"{head}. The residual gets down to {low:.1e}: loosen rtol, or raise max_steps"
    else:
        contract = "Make f contract: smaller weights, a norm cap, a Jacobian penalty"
        yield f"{head}, and the residual stays at {low:.1e}. {contract}"


def raised(d: Diagnosis) -> Iterator[str]:
    """Solvers that ended in an error, though f could be called on x0."""
    failed = [t for t in d.solvers if t.exception]
    if failed and len(failed) < len(d.solvers):
        yield f"{', '.join(t.name for t in failed)} ended in an error: {failed[0].exception}"


def precision(d: Diagnosis) -> Iterator[str]:
    """A tolerance that rounding keeps some solvers from."""
    if 0 < d.rtol < 4 * d.resolution and not all(t.all_converged for t in d.solvers):
        yield f"rtol={d.rtol:g} is as fine as f can be computed in this dtype ({d.resolution:.1e}), or finer: loosen it"


def plain_iteration(d: Diagnosis) -> Iterator[str]:
    """What the spectral radius says of x <- f(x)."""
    s = d.spectrum
    radii, errors = (None, None) if s is None else (s.of_interest(s.radius), s.of_interest(s.radius_error))
    if s is None or radii is None:
        return
    worst, above = float(radii.max()), int((radii >= 1).sum())
    off = 0.0 if errors is None else float(errors.max())
    which = "" if len(radii) == 1 else f" in the worst of {len(radii)} samples"
    if s.settled is None or not bool(s.settled.any()):
        yield f"spectral radius {worst:.2f}{which} at the best point found, which is no fixed point: take it as a hint"
    elif off >= abs(worst - 1):
        yield f"spectral radius {worst:.2g}{which}, give or take {off:.1g}: too uncertain to tell of plain iteration"
    elif worst >= 1:
        count = f", at or above 1 in {above}" if len(radii) > 1 else ""
        yield f"spectral radius {worst:.2f}{which}{count}: plain iteration is driven away from there. {_way_out(d)}"
    else:
        steps = max(1, math.ceil(math.log(d.rtol or 1e-4) / math.log(max(worst, 1e-6))))
        astray = _plain_iteration_astray(d)
        if astray:
            yield f"spectral radius {worst:.2g}{which}: f contracts there, but plain iteration from x0 ends as {astray}"
            return
        how = "contracts, but slowly" if worst > _SLOW else "contracts"
        needs = f"plain iteration needs about {_count(steps, 'step')} for rtol={d.rtol:g}"
        yield f"spectral radius {worst:.2g}{which}: near there f {how}; {needs}"


def singular(d: Diagnosis) -> Iterator[str]:
    """An eigenvalue near 1: a small residual does not mean a small error."""
    s = d.spectrum
    if s is None or s.eigenvalues is None or s.settled is None or not bool(s.settled.any()):
        return
    values = s.eigenvalues[torch.isfinite(s.eigenvalues.abs())]
    gaps = (1 - values).abs()
    if len(gaps) and float(gaps.min()) < _SINGULAR:
        near = complex(values[gaps.argmin()])
        shown = f"{near.real:.3f}" + (f"{near.imag:+.3f}i" if abs(near.imag) > 1e-3 else "")
        times = f"{1 / float(gaps.min()):.0f} times the residual" if float(gaps.min()) > 1e-4 else "of any size"
        yield (
            f"df/dx has an eigenvalue {shown}, close to 1: errors in x and in the gradient may be {times} in this "
            f"direction; ask for a smaller rtol"
        )


def transient(d: Diagnosis) -> Iterator[str]:
    """A norm far above the radius: the residual may grow before it falls."""
    s = d.spectrum
    radii, norms = (None, None) if s is None else (s.of_interest(s.radius), s.of_interest(s.norm))
    if radii is None or norms is None:
        return
    radius, norm = float(radii.max()), float(norms.max())
    if norm > 1 > radius and norm > _STRETCH * radius:
        yield (
            f"the Jacobian's norm is {norm:.1f} at a radius of {radius:.2f}: errors may grow {norm:.1f}-fold in a step "
            f"before they fall; give f a good starting point, or penalise the Jacobian"
        )


def several_fixed_points(d: Diagnosis) -> Iterator[str]:
    """Solvers that converge to different points."""
    far: dict[str, Tensor] = {}
    for t in d.solvers:
        if t.error is not None and t.status is not None:
            off = t.error.reshape(-1)[t.converged.reshape(-1)]
            if bool((off > max(_APART, 100 * d.rtol)).any()):
                far[t.name] = off
    if far:
        name, off = next(iter(far.items()))
        also = f" (as do {', '.join(list(far)[1:])})" if len(far) > 1 else ""
        yield (
            f"{name}{also} converges {float(off.nan_to_num(nan=-1.0).max()):.1g} away (relative) from the point that "
            f"others find: f has several fixed points, or nearly so. Which one you get depends on solver and x0"
        )


def exact_adjoint(d: Diagnosis) -> Iterator[str]:
    """What the exact gradient costs, and whether it is exact."""
    trial = next((t for t in d.adjoints if t.name == "implicit"), None)
    if trial is None or trial.relative_error is None:
        return
    cost = "" if trial.num_products is None else f" for {_count(trial.num_products, 'vector-Jacobian product')}"
    if trial.relative_error < _WRONG:
        yield f"adjoint='implicit' gives the gradient to {trial.relative_error:.1e}{cost}"
    else:
        yield (
            f"the implicit adjoint does not converge: its gradient is off by {trial.relative_error:.1e}{cost}. Give it "
            f"more steps or another solver: deqkit.ImplicitAdjoint(solver='gmres', max_steps={4 * d.max_steps})"
        )


def cheap_adjoint(d: Diagnosis) -> Iterator[str]:
    """Whether an approximate adjoint will do."""
    known = [t for t in d.adjoints if t.cosine is not None and not t.adjoint.unrolls and t.name != "implicit"]
    good = _with_cosines([t for t in known if t.cosine is not None and t.cosine >= _ALIKE])
    if good:
        yield f"cheaper adjoints that will do, by their cosine to the exact gradient: {good}"
    astray = _with_cosines([t for t in known if t.cosine is not None and not t.cosine >= _ASTRAY])
    if astray:
        yield f"adjoints that lead astray here, by their cosine to the exact gradient: {astray}"


RULES: tuple[Callable[[Diagnosis], Iterator[str]], ...] = (
    broken,
    what_helps,
    fit,
    solvers_that_work,
    solvers_that_fail,
    raised,
    precision,
    plain_iteration,
    singular,
    transient,
    several_fixed_points,
    exact_adjoint,
    cheap_adjoint,
)


def _plain_iteration_astray(d: Diagnosis) -> str:
    """How plain iteration ended on samples that have a fixed point, where neither steps nor precision were short."""
    trial = next((t for t in d.solvers if t.name == "fixed_point"), None)
    settled = d.spectrum.settled if d.spectrum is not None else None
    if trial is None or trial.status is None or settled is None or d.rtol < _FINEST * d.resolution:
        return ""
    status = trial.status.reshape(-1)[settled.expand(trial.status.shape).reshape(-1)]
    seen = (Status.STAGNATED, Status.DIVERGED, Status.NONFINITE)
    return ", ".join(code.name for code in seen if bool((status == code).any()))


def _way_out(d: Diagnosis) -> str:
    """What to do about a radius above 1."""
    names = [t.name for t in d.solvers if t.all_converged and t.name != "fixed_point"]
    help_ = f"{', '.join(names)} converge{'s' if len(names) == 1 else ''} all the same. " if names else ""
    return f"{help_}A Jacobian penalty or a norm cap on the weights would bring the radius down"


def _steps_needed(d: Diagnosis, trials: list[SolverTrial]) -> tuple[str, int] | None:
    """The furthest of the solvers whose residuals still fall, and how many steps it would take at that rate.

    A rate is fitted to few steps and may become worse, so that some more are granted.
    """
    for t in ranked(trials):
        if t.trace is None or t.relative_residual is None or _ends(t) != Status.MAX_STEPS.name:
            continue
        late = ~t.converged.reshape(-1)
        rates = fitted_rates(t.trace.reshape(len(t.trace), -1)[:, late])
        if bool((rates < _FALLS).all()):
            left = (t.relative_residual.reshape(-1)[late].double() / d.rtol).log() / -rates.log()
            steps = d.max_steps + math.ceil(_MARGIN * float(left.max()))
            if steps <= _PATIENT * d.max_steps:
                return t.name, steps
    return None


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _share(trial: SolverTrial) -> float:
    """Of the samples, that converged."""
    return trial.num_converged / max(1, trial.converged.numel())


def _has(trial: SolverTrial, status: Status) -> bool:
    return trial.status is not None and bool((trial.status == status).any())


def _ends(trial: SolverTrial) -> str:
    """How the samples ended that did not converge."""
    return ", ".join(code.name for code in Status if code != Status.CONVERGED and _has(trial, code))


def _with_cosines(trials: list[AdjointTrial]) -> str:
    return ", ".join(f"{t.name} {t.cosine:.3f}" for t in trials)
