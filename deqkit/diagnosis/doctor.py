"""L6. `diagnose`: why a fixed point does or does not converge, in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deqkit import held
from deqkit.adjoints import ADJOINTS, Adjoint, make_adjoint
from deqkit.diagnosis import checks, gradient_checks, trials
from deqkit.diagnosis.advice import recommend
from deqkit.diagnosis.modules import modules_of
from deqkit.diagnosis.records import AdjointTrial, Check, Diagnosis
from deqkit.diagnosis.subject import Subject
from deqkit.diagnosis.untouched import untouched
from deqkit.norms import make_norm
from deqkit.solvers import SOLVERS, MixedPrecision, Solver, make_solver
from deqkit.solvers.base import as_int
from deqkit.state import StateLayout
from deqkit.termination import Termination

# In this order; each needs what those before it have found to be so.
_OF_THE_CALL = {"runs": checks.runs, "structure": checks.structure, "keeps x": checks.input_kept}
_OF_THE_VALUE = {
    "finite": checks.finite,
    "deterministic": checks.deterministic,
    "independent samples": checks.independent,
    "stateless": checks.stateless,
    "grad mode": checks.grad_mode,
    "affine": checks.affine,
}
_OF_THE_GRADIENT = {
    "differentiable": gradient_checks.differentiable,
    "trainable": gradient_checks.trainable,
    "derivative": gradient_checks.derivative,
}


def diagnose(
    f: Callable[..., Any],
    x0: Any,
    *,
    args: tuple[Any, ...] = (),
    solvers: Iterable[str | Solver] | None = None,
    adjoints: Iterable[str | Adjoint] | None = None,
    rtol: float = 1e-4,
    atol: float = 0.0,
    max_steps: int = 50,
    norm: str | Callable[[Any], Tensor] | None = None,
    batch_dims: int = 1,
) -> Diagnosis:
    """Find out why ``x = f(x, *args)`` does or does not converge, and what to do about it.

    Checks that f is a function (deterministic, without side effects), keeps the state's structure, treats samples
    apart and can be differentiated; tries every solver from x0; takes the spectrum of df/dx at the fixed point that was
    found; compares the gradient of every adjoint with the exact one there; and says what follows. ``print()`` shows it.

    What f raises is reported and not passed on. Everything is left as it was: random generators; parameters, buffers,
    modes and attributes of the modules behind f (of which copies are kept meanwhile); args, gradients, warnings.
    (Modules are found where f is one, closes over it, refers to it by a global name or is given it in args.) Generators
    and warnings belong to the process: examine one f at a time.

    It calls f about 30 times for the checks, at most ``max_steps + 3`` times per solver, as often once more for the
    fixed point, and once or twice per adjoint. It takes at most ``10 * max_steps`` products with the Jacobian for each
    of the exact gradient, the eigenvalues, the spectral radius and the norm. A smaller ``max_steps`` bounds all of
    that. Memory is that of the hungriest solver: for large states choose ``solvers`` with a short history. An unrolled
    solve that would keep more than 2 GiB is left out.

    Args:
        f: see `deqkit.solve`, as are the others.
        x0: see there.
        args: see there.
        solvers: names or solver objects to try; None tries all there are ("gmres" and "bicgstab", which
            are for an affine f, only if f is one) but "mixed_precision", which converges where its solver does.
        adjoints: names or adjoint objects to try; None tries all there are.
        rtol: see there.
        atol: see there.
        max_steps: limit of solver steps, and, in proportion, of all other work.
        norm: see there.
        batch_dims: see there.

    Returns:
        A `Diagnosis`.

    Raises:
        TypeError: x0 or a setting has the wrong type.
        ValueError: a setting is unknown or out of range, or x0 has no sample.
    """
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}")
    if not isinstance(args, tuple):
        raise TypeError(
            f"args must be a tuple of further arguments of f, got {type(args).__name__}; for one: args=(b,)"
        )
    batch_dims, max_steps = _at_least("batch_dims", batch_dims, 0), _at_least("max_steps", max_steps, 1)
    if Termination(rtol, atol).fixed_steps:
        raise ValueError("rtol and atol must not both be 0: there would be nothing to converge to")
    known = {name: solver for name, solver in SOLVERS.items() if solver is not MixedPrecision}
    chosen = [make_solver(s) for s in _listed("solvers", solvers, known)]
    wanted = [make_adjoint(a) for a in _listed("adjoints", adjoints, ADJOINTS)]
    layout = StateLayout(x0, batch_dims)
    make_norm(norm, layout)
    if layout.num_samples == 0:
        raise ValueError(f"x0 has no sample to examine: its batch shape is {tuple(layout.batch_shape)}")

    started = time.perf_counter()
    settings = trials.Settings(float(rtol), float(atol), max_steps, norm)
    with torch.inference_mode(False), torch.enable_grad(), untouched(modules_of(f, args), args, layout.device):
        subject = Subject(f, x0, args, batch_dims)
        # One mask of variational dropout for all that is compared.
        with held.Entered(held.Scope(True, None, held.opened().masks)):
            found = _examine(subject, settings, chosen, wanted, asked_for=solvers is not None)
    diagnosis = Diagnosis(
        subject=_name(f),
        state=_describe(layout),
        num_samples=layout.num_samples,
        rtol=settings.rtol,
        resolution=subject.resolution,
        max_steps=max_steps,
        num_fn_evals=subject.num_calls,
        num_products=subject.num_products,
        seconds=time.perf_counter() - started,
        **found,
    )
    return replace(diagnosis, recommendations=recommend(diagnosis))


def _examine(
    subject: Subject, settings: trials.Settings, solvers: list[Solver], adjoints: list[Adjoint], *, asked_for: bool
) -> dict[str, Any]:
    """The findings, as they go into a `Diagnosis`."""
    done = _check(subject)
    verdicts = {check.name: check.verdict for check in done}
    if "failed" in [verdicts[name] for name in _OF_THE_CALL]:
        return {"checks": done, "notes": ("f cannot be solved as it is: no solver and no adjoint was tried",)}
    is_affine = next((c.evidence.get("affine", False) for c in done if c.name == "affine"), False)
    fit = [s for s in solvers if asked_for or is_affine or not s.for_affine]
    tried = [trials.try_solver(subject, solver, settings) for solver in fit]
    ails = {name for name, verdict in verdicts.items() if verdict == "failed"}
    varied = trials.try_variations(subject, make_solver("anderson"), settings, ails)
    found: dict[str, Any] = {
        "checks": done, "solvers": tuple(trial for trial, _ in tried), "variations": tuple(varied)
    }  # fmt: skip
    missing = [name for name in ("deterministic", "differentiable") if verdicts[name] in ("failed", "skipped")]
    if missing:
        return found | {"notes": (f"no spectrum and no adjoints: f is not {missing[0]}",)}
    try:
        point = trials.settle(subject, tried, settings, coupled="independent samples" in ails)
    except Exception as error:
        return found | {"notes": (f"no spectrum and no adjoints: {checks.in_words(error)}",)}
    if point is None:
        return found | {"notes": ("no spectrum and no adjoints: no solver came to an end",)}
    found["solvers"] = tuple(trials.with_errors(subject, tried, point))
    found["spectrum"] = trials.take_spectrum(subject, point, settings)
    compared, note = _compare(subject, adjoints, point, settings, verdicts["trainable"])
    return found | {"adjoints": tuple(compared), "notes": (note,) if note else ()}


def _check(subject: Subject) -> tuple[Check, ...]:
    """All checks, as far as they can be made."""
    done: dict[str, Check] = {}
    for group in (_OF_THE_CALL, _OF_THE_VALUE, _OF_THE_GRADIENT):
        for name, check in group.items():
            broken = [k for k in (*_OF_THE_CALL, "differentiable") if k in done and done[k].verdict == "failed"]
            if broken:
                done[name] = Check(name, "skipped", f"see {broken[0]!r}")
            elif name == "derivative" and _changes_by_itself(done["deterministic"]):
                done[name] = Check(name, "skipped", "see 'deterministic'")
            else:
                done[name] = checks.guarded(name, check, subject)
    return tuple(done.values())


def _changes_by_itself(check: Check) -> bool:
    """Whether f differs from call to call even with the same random numbers, so that no difference tells anything."""
    return check.verdict == "failed" and not check.evidence.get("draws_random_numbers")


def _compare(
    subject: Subject,
    adjoints: list[Adjoint],
    point: trials.FixedPointFound,
    settings: trials.Settings,
    trainable: str,
) -> tuple[list[AdjointTrial], str]:
    if trainable != "passed":
        return [], "no adjoints: see 'trainable'"
    if not bool(point.settled.any()):
        return [], "no adjoints: there is no fixed point to differentiate"
    return trials.try_adjoints(subject, adjoints, point, settings)


def _at_least(name: str, value: Any, minimum: int) -> int:
    value = as_int(name, value)
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def _listed(name: str, given: Any, registry: dict[str, Any]) -> list[Any]:
    """What the user wants tried: everything, or some of it."""
    if given is None:
        return list(registry)
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(
            f"{name} must be a list of names or objects, such as ({next(iter(registry))!r},), got {given!r}"
        )
    return list(given)


def _name(f: Any) -> str:
    name = getattr(f, "__qualname__", None) or type(f).__name__
    return name.rsplit("<locals>.", 1)[-1].replace("<lambda>", "a lambda")


def _describe(layout: StateLayout) -> str:
    """For example "4 samples of 16 numbers, float32, cpu"."""
    numbers = sum(leaf.shape[layout.batch_dims :].numel() for leaf in layout.leaves)
    dtypes = dict.fromkeys(str(leaf.dtype).removeprefix("torch.") for leaf in layout.leaves)
    samples = (
        f"{layout.num_samples} sample{'s' if layout.num_samples > 1 else ''}" if layout.batch_dims else "one system"
    )
    leaves = f" in {len(layout.leaves)} tensors" if len(layout.leaves) > 1 else ""
    return f"{samples} of {numbers:,} numbers{leaves}, {'/'.join(dtypes)}, {layout.device}"
