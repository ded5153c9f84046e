"""The rules by which deqkit.diagnose advises, one by one, on evidence made by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import deqkit
from deqkit.diagnosis import AdjointTrial, Check, Diagnosis, SolverTrial, Spectrum, advice
from deqkit.diagnosis.doctor import _OF_THE_CALL, _OF_THE_GRADIENT, _OF_THE_VALUE
from deqkit.diagnosis.remedies import remedy
from deqkit.solution import Status
from deqkit.solvers import make_solver

OK, LATE, IDLE, AWAY, BAD = (int(s) for s in Status)
SETTLED = torch.tensor([True, True])


def trial(name: str, *status: int, calls: int = 20, residual: float = 1e-5, **others: Any) -> SolverTrial:
    codes = torch.tensor(status)
    steps, relative = torch.full_like(codes, calls - 1), torch.full(codes.shape, residual)
    return SolverTrial(name, make_solver(name), codes, steps, relative, num_fn_evals=calls, **others)


def adjoint(name: str, cosine: float, error: float, products: int | None = None) -> AdjointTrial:
    return AdjointTrial(name, deqkit.adjoints.make_adjoint(name), cosine, error, products)  # pyright: ignore


def diagnosis(**evidence: Any) -> Diagnosis:
    return Diagnosis("f", "2 samples of 3 numbers, float32, cpu", 2, 1e-4, 50, resolution=1e-7, **evidence)


def spectrum(radius: list[float], norm: list[float] | None = None, **others: Any) -> Spectrum:
    norms = torch.tensor(norm or radius)
    return Spectrum(
        torch.tensor(radius), torch.zeros(len(radius)), norms, settled=others.pop("settled", SETTLED), **others
    )


def said(rule: Callable[[Diagnosis], Iterator[str]], d: Diagnosis) -> str:
    return " | ".join(rule(d))


def test_rules_say_nothing_without_evidence() -> None:
    for rule in advice.RULES:
        assert said(rule, diagnosis()) == "", rule
    assert "too little" in advice.recommend(diagnosis())[0]


def test_every_check_has_a_remedy() -> None:
    for name in (*_OF_THE_CALL, *_OF_THE_VALUE, *_OF_THE_GRADIENT):
        d = diagnosis(checks=(Check(name, "failed", "it is broken."),))
        assert said(advice.broken, d).startswith("it is broken. ") and len(remedy(d.checks[0])) > 10


def test_remedies_fit_the_evidence() -> None:
    def of(name: str, **evidence: Any) -> str:
        return remedy(Check(name, "failed", "", evidence))

    assert "VariationalDropout" in of("deterministic", draws_random_numbers=True) and "masks" not in of("deterministic")
    assert "GroupNorm" in of("independent samples", modules=["f.n (BatchNorm2d)"])
    assert "GroupNorm" not in of("independent samples", modules=["f.m (Mix)"])
    assert "detach()" in of("differentiable", without_gradient=["x0"])
    assert "infinite slopes" in of("differentiable", samples=[0])


def test_broken() -> None:
    d = diagnosis(checks=(Check("derivative", "failed", "it differs"), Check("finite", "passed", "fine")))
    assert "it differs." in said(advice.broken, d) and "holds for autograd's" in said(advice.broken, d)
    assert "fine" not in said(advice.broken, d)


def test_what_helps() -> None:
    ill, cured, still = trial("anderson", OK, LATE), trial("broyden", OK, OK, calls=9), trial("auto", OK, BAD)
    assert "the cause" in said(advice.what_helps, diagnosis(solvers=(ill,), variations=(cured, still)))
    assert "broyden (2 of 2 samples)" in said(advice.what_helps, diagnosis(solvers=(ill,), variations=(cured, still)))
    assert "not the only cause" in said(advice.what_helps, diagnosis(solvers=(ill,), variations=(still,)))
    assert said(advice.what_helps, diagnosis(solvers=(cured,), variations=(cured,))) == ""


def test_fit() -> None:
    good = diagnosis(solvers=(trial("anderson", OK, OK),))
    assert "fit" in said(advice.fit, good)
    assert said(advice.fit, replace(good, checks=(Check("finite", "failed", ""),))) == ""
    assert said(advice.fit, diagnosis(solvers=(trial("anderson", OK, LATE),))) == ""


def test_solvers_that_work() -> None:
    anderson, broyden = trial("anderson", OK, OK, calls=30), trial("broyden", OK, OK, calls=20)
    text = said(advice.solvers_that_work, diagnosis(solvers=(anderson, broyden, trial("auto", OK, LATE, calls=5))))
    assert "solver='broyden' converges on all 2 samples in 20 calls of f, the fewest of 2 solvers" in text
    assert "the default, 'anderson', needs 1.5 times as many calls" in text
    assert "default" not in said(
        advice.solvers_that_work, diagnosis(solvers=(replace(anderson, num_fn_evals=22), broyden))
    )
    text = said(advice.solvers_that_work, diagnosis(solvers=(trial("anderson", OK, AWAY), broyden)))
    assert "the only one that does" in text and "fails on 1 of 2 samples (DIVERGED)" in text
    assert said(advice.solvers_that_work, diagnosis(solvers=(trial("anderson", OK, LATE),))) == ""
    named = replace(broyden, name="Broyden(history=3)")
    assert "solver=deqkit.Broyden(history=3)" in said(advice.solvers_that_work, diagnosis(solvers=(named,)))


def test_solvers_that_fail() -> None:
    def text(*trials: SolverTrial, **evidence: Any) -> str:
        return said(advice.solvers_that_fail, diagnosis(solvers=trials, **evidence))

    stuck = trial("anderson", OK, IDLE, residual=0.3)
    assert "anderson gets furthest, on 1 of 2 samples, and the residual stays at 3.0e-01" in text(stuck)
    assert "Make f contract" in text(stuck) and "loosen rtol" in text(trial("broyden", IDLE, IDLE, residual=5e-4))
    assert "leaves the finite numbers" in text(trial("broyden", BAD, BAD, residual=float("nan")))
    assert "no solver came to an end: boom" in text(SolverTrial("anderson", make_solver("anderson"), exception="boom"))
    assert "raise max_steps to 100" in text(stuck, spectrum=spectrum([0.9, 0.9]))
    assert text(stuck, checks=(Check("deterministic", "failed", ""),)) == ""
    assert text(trial("anderson", OK, OK), stuck) == ""

    falling = (0.9 ** torch.arange(51)).unsqueeze(1).expand(-1, 2)
    late = trial("fixed_point", LATE, LATE, residual=0.9**50, trace=falling)
    steps = int(text(late).split("raise max_steps to about ")[1].split(",")[0])
    assert 0.9 ** (50 + (steps - 50) / 1.5) == pytest.approx(1e-4, rel=0.11)
    assert "The residuals of fixed_point still fall" in text(late, trial("anderson", LATE, IDLE, residual=0.3))
    nearer = replace(late, name="anderson", relative_residual=torch.full((2,), 2e-3))
    assert "anderson gets furthest, on no sample. The residuals of anderson" in text(late, nearer)
    flat = replace(late, trace=torch.full((51, 2), 0.3), relative_residual=torch.full((2,), 0.3))
    assert "still fall" not in text(flat) and "stays at 3.0e-01" in text(flat)


def test_no_number_of_steps_makes_up_for_the_precision() -> None:
    idle = trial("anderson", IDLE, IDLE, residual=4e-3)
    half = replace(diagnosis(solvers=(idle,), spectrum=spectrum([0.5, 0.5])), resolution=8e-3)
    text = said(advice.solvers_that_fail, half)
    assert "gets down to 4.0e-03, about as far as this dtype goes: loosen rtol" in text and "max_steps" not in text


def test_raised() -> None:
    broken = SolverTrial("broyden", make_solver("broyden"), exception="ValueError: no")
    assert said(advice.raised, diagnosis(solvers=(trial("anderson", OK, OK), broken))) == (
        "broyden ended in an error: ValueError: no"
    )
    assert said(advice.raised, diagnosis(solvers=(broken,))) == ""  # of which another rule speaks


def test_precision() -> None:
    half = replace(diagnosis(solvers=(trial("anderson", OK, LATE),)), resolution=1e-3)
    assert "rtol=0.0001 is as fine" in said(advice.precision, half)
    assert said(advice.precision, replace(half, resolution=1e-7)) == ""
    assert said(advice.precision, replace(half, solvers=(trial("anderson", OK, OK),))) == ""


def test_plain_iteration() -> None:
    def text(*args: Any, solvers: tuple[SolverTrial, ...] = (), **others: Any) -> str:
        return said(advice.plain_iteration, diagnosis(spectrum=spectrum(*args, **others), solvers=solvers))

    text_of_two = text([0.2, 0.5])
    assert text_of_two.startswith(
        "spectral radius 0.5 in the worst of 2 samples: near there f contracts; plain iteration needs"
    )
    assert text_of_two.endswith("about 14 steps for rtol=0.0001")
    assert "contracts, but slowly" in text([0.2, 0.98])
    one = text([0.5, 1.9], settled=torch.tensor([True, False]))  # the other has no fixed point
    assert one.startswith("spectral radius 0.5: near there f contracts")
    ended = (trial("broyden", OK, OK), trial("fixed_point", IDLE, OK))
    assert "f contracts there, but plain iteration from x0 ends as STAGNATED" in text([0.2, 0.5], solvers=ended)
    other = torch.tensor([False, True])  # the one that stagnates has no fixed point
    assert "plain iteration needs" in text([0.2, 0.5], solvers=ended, settled=other)
    coupled = spectrum([0.5], settled=torch.tensor(True), one_system=True)
    assert "STAGNATED" in said(advice.plain_iteration, diagnosis(spectrum=coupled, solvers=ended))
    expanding = text([0.2, 1.3], solvers=(trial("anderson", OK, OK), trial("fixed_point", OK, AWAY)))
    assert "radius 1.30 in the worst of 2 samples, at or above 1 in 1: plain iteration is driven away" in expanding
    assert "anderson converges all the same" in expanding
    assert "converge all the same" not in text([1.3, 1.3])
    unsure = replace(spectrum([0.9, 0.9]), radius_error=torch.tensor([0.2, 0.0]))
    assert "give or take 0.2: too uncertain" in said(advice.plain_iteration, diagnosis(spectrum=unsure))
    assert "no fixed point" in text([0.2, 1.3], settled=~SETTLED)
    assert text([float("nan"), float("nan")]) == ""


def test_singular() -> None:
    def text(*values: complex, settled: torch.Tensor = SETTLED) -> str:
        found = spectrum([0.5, 0.5], eigenvalues=torch.tensor(values, dtype=torch.complex128), settled=settled)
        return said(advice.singular, diagnosis(spectrum=found))

    assert "eigenvalue 0.980, close to 1" in text(0.98, -0.5) and "50 times the residual" in text(0.98)
    assert "1.000+0.020i" in text(1 + 0.02j, 1 - 0.02j) and "of any size" in text(1.0)
    assert text(-1.0, 1j, 0.9) == "" and text(0.98, settled=~SETTLED) == ""


def test_transient() -> None:
    assert "norm is 8.0 at a radius of 0.50" in said(
        advice.transient, diagnosis(spectrum=spectrum([0.5, 0.2], [8.0, 1.0]))
    )
    for radius, norm in (([0.5, 0.5], [0.9, 0.9]), ([0.5, 0.5], [1.2, 1.2]), ([1.5, 1.5], [8.0, 8.0])):
        assert said(advice.transient, diagnosis(spectrum=spectrum(radius, norm))) == ""


def test_several_fixed_points() -> None:
    near, far = (trial("anderson", OK, OK, error=torch.tensor([1e-4, e])) for e in (1e-4, 0.8))
    other = replace(trial("broyden", OK, OK), error=torch.tensor([0.9, 0.9]))
    assert said(advice.several_fixed_points, diagnosis(solvers=(near,))) == ""
    assert "anderson (as do broyden) converges 0.8 away" in said(
        advice.several_fixed_points, diagnosis(solvers=(far, other))
    )
    failed = replace(far, status=torch.tensor([OK, LATE]))  # which is far for another reason
    assert said(advice.several_fixed_points, diagnosis(solvers=(failed,))) == ""


def test_adjoints() -> None:
    d = diagnosis(
        adjoints=(adjoint("implicit", 1.0, 1e-4, 15), adjoint("jfb", 0.4, 0.9), adjoint("neumann", 0.98, 0.1))
    )
    assert (
        said(advice.exact_adjoint, d)
        == "adjoint='implicit' gives the gradient to 1.0e-04 for 15 vector-Jacobian products"
    )
    assert said(advice.cheap_adjoint, d) == (
        "cheaper adjoints that will do, by their cosine to the exact gradient: neumann 0.980 | "
        "adjoints that lead astray here, by their cosine to the exact gradient: jfb 0.400"
    )
    off = diagnosis(
        adjoints=(adjoint("implicit", 0.7, 0.8, 50), adjoint("phantom", 0.8, 0.5), adjoint("unrolled", 0.1, 3.0))
    )
    assert "does not converge" in said(advice.exact_adjoint, off) and "max_steps=200" in said(advice.exact_adjoint, off)
    assert said(advice.cheap_adjoint, off) == ""  # neither good nor bad, and what unrolls is not cheaper
    nan = diagnosis(
        adjoints=(adjoint("implicit", float("nan"), float("nan")), adjoint("jfb", float("nan"), float("nan")))
    )
    assert "does not converge" in said(advice.exact_adjoint, nan) and "astray" in said(advice.cheap_adjoint, nan)


@pytest.mark.parametrize(("gain", "seed"), [(0.7, 0), (0.95, 1), (0.95, 2), (1.3, 3), (0.7, 4), (1.3, 5)])
def test_the_number_of_steps_that_is_advised_suffices(gain: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 24, generator=generator)
    weight = (gain * weight / torch.linalg.eigvals(weight).abs().max()).requires_grad_()
    b, x0 = 0.5 * torch.randn(4, 24, generator=generator), torch.zeros(4, 24)
    f: Any = lambda x, b: torch.tanh(x @ weight.mT + b)  # noqa: E731
    d = deqkit.diagnose(f, x0, args=(b,), max_steps=8, adjoints=[])
    advised = re.search(
        r"The residuals of (\w+) still fall: raise max_steps to about (\d+)", "\n".join(d.recommendations)
    )
    advised = advised or re.search(r"(\w+) gets furthest.* raise max_steps to (\d+)", "\n".join(d.recommendations))
    assert advised is not None
    sol = deqkit.solve(f, x0, args=(b,), solver=advised[1], max_steps=int(advised[2]), on_failure="ignore")
    assert bool(sol.converged.all()), advised[0]
