"""deqkit.diagnose: what is said of f, healthy and not."""

from __future__ import annotations

from typing import Any

import numpy as np
import patients
import pytest
import torch
from equations import affine, linear, tanh_layer
from patients import advice, failures, few, verdicts
from torch import Tensor, nn

import deqkit
from deqkit.adjoints import ADJOINTS
from deqkit.solvers import SOLVERS

TRIED = {name: solver for name, solver in SOLVERS.items() if name != "mixed_precision"}
WHOLE = (
    "runs",
    "structure",
    "keeps x",
    "finite",
    "deterministic",
    "independent samples",
    "grad mode",
    "differentiable",
)


# ---------------------------------------------------------------------------------------------------------------------
# the four


def test_healthy() -> None:
    f, x0, args = patients.healthy()
    d = deqkit.diagnose(f, x0, args=args)
    assert d.healthy and not d.failed and not d.variations
    assert all(verdicts(d)[name] == "passed" for name in (*WHOLE, "stateless", "trainable", "derivative"))
    assert not d.check("affine").evidence["affine"]

    assert [t.name for t in d.solvers] == [name for name, solver in TRIED.items() if not solver.for_affine]
    assert all(t.all_converged and not t.exception for t in d.solvers if t.name in ("anderson", "broyden", "auto"))
    for t in d.solvers:
        with torch.no_grad():
            alone = deqkit.solve(f, x0, args=args, solver=t.name, on_failure="ignore", trace=True)
        assert t.status is not None and t.num_steps is not None and t.trace is not None and t.error is not None
        assert torch.equal(t.status, alone.status) and torch.equal(t.num_steps, alone.num_steps)
        assert t.num_fn_evals == alone.num_fn_evals and t.seconds > 0
        torch.testing.assert_close(t.trace, alone.trace, equal_nan=True)
        if t.all_converged:
            assert t.error.max() < 1e-3

    with torch.no_grad():
        x = deqkit.solve(f, x0, args=args, rtol=1e-6, solver="broyden").value
    dense = [torch.autograd.functional.jacobian(lambda v, i=i: f(v, args[0][i]), x[i]) for i in range(len(x))]
    assert d.spectrum is not None and d.spectrum.radius is not None and d.spectrum.norm is not None
    radius = torch.stack([torch.linalg.eigvals(j).abs().max() for j in dense])
    torch.testing.assert_close(d.spectrum.radius, radius, rtol=1e-2, atol=0)
    torch.testing.assert_close(
        d.spectrum.norm, torch.stack([torch.linalg.matrix_norm(j, 2) for j in dense]), rtol=1e-2, atol=0
    )
    assert d.spectrum.worst == int(radius.argmax()) and d.spectrum.eigenvalues is not None
    assert len(d.spectrum.eigenvalues) == 12

    assert [t.name for t in d.adjoints] == list(ADJOINTS)
    by_name = {t.name: t for t in d.adjoints}
    assert by_name["implicit"].relative_error is not None and by_name["implicit"].relative_error < 1e-3
    assert by_name["unrolled"].relative_error is not None and by_name["unrolled"].relative_error < 1e-2
    assert by_name["unrolled"].through and not by_name["implicit"].through
    # These build on what one kind of solver records.
    assert by_name["shine"].through in ("anderson", "broyden") and by_name["reversible"].through == "reversible"
    assert by_name["shine"].cosine is not None and by_name["shine"].cosine > 0.5
    assert by_name["reversible"].relative_error is not None and by_name["reversible"].relative_error < 1e-2
    assert by_name["jfb"].cosine is not None and 0.5 < by_name["jfb"].cosine < 0.999
    assert by_name["implicit"].num_products is not None and by_name["implicit"].num_products > 3

    assert "f is fit for solve" in advice(d) and "contracts" in advice(d) and "adjoint='implicit' gives" in advice(d)
    assert d.best is not None and f"solver='{d.best.name}' converges on all 4 samples" in advice(d)


def test_expanding() -> None:
    f, x0, args = patients.expanding()
    d = deqkit.diagnose(f, x0, args=args)
    assert d.healthy and d.spectrum is not None and d.spectrum.radius is not None
    assert d.spectrum.radius.max() > 1.1
    by_name = {t.name: t for t in d.solvers}
    assert not by_name["fixed_point"].all_converged and by_name["anderson"].all_converged
    said = advice(d)
    assert f"spectral radius {d.spectrum.radius.max():.2f} in the worst of 4 samples" in said
    assert "plain iteration is driven away" in said and "anderson, broyden" in said and "Jacobian penalty" in said
    assert "jfb" in said.split("lead astray")[1]


def test_stochastic() -> None:
    f, x0, args = patients.stochastic()
    d = deqkit.diagnose(f, x0, args=args, max_steps=20)
    assert failures(d) == ["deterministic"] and not d.healthy  # and nothing else: the draws are the same elsewhere
    assert verdicts(d)["derivative"] == verdicts(d)["independent samples"] == "passed"
    assert d.check("deterministic").evidence["modules"] == ["f.between (Dropout)"]
    assert "random numbers are drawn in f.between (Dropout)" in advice(d) and "A stochastic f has no" in advice(d)
    assert d.spectrum is None and not d.adjoints and "f is not deterministic" in d.notes[0]
    assert not any(t.all_converged for t in d.solvers)
    assert [t.name for t in d.variations] == [
        "anderson, same random numbers at every call",
        "anderson, modules in eval mode",
    ]
    assert all(t.all_converged for t in d.variations) and "this is the cause" in advice(d)


def test_coupled() -> None:
    f, x0, args = patients.coupled()
    d = deqkit.diagnose(f, x0, args=args, max_steps=20)
    assert failures(d) == ["independent samples", "stateless"]
    found = d.check("independent samples")
    assert found.evidence["modules"] == ["f.between (BatchNorm1d)"] and found.evidence["share"] == 1.0
    assert "running_mean" in d.check("stateless").finding
    assert "GroupNorm" in advice(d) and "batch_dims=0" in advice(d)
    assert d.spectrum is not None and d.spectrum.one_system and d.spectrum.norm is not None
    assert d.spectrum.norm.shape == ()
    assert [t.name for t in d.variations] == ["anderson, batch_dims=0", "anderson, modules in eval mode"]
    assert d.variations[0].converged.shape == () and d.variations[1].converged.shape == (4,)


# ---------------------------------------------------------------------------------------------------------------------
# each check


def test_what_f_raises_is_a_finding() -> None:
    def f(x: Tensor) -> Tensor:
        raise KeyError("missing weight")

    d = few(f, torch.zeros(2, 3))
    assert failures(d) == ["runs"] and "KeyError" in d.check("runs").finding and "missing weight" in advice(d)
    assert not d.solvers and not d.adjoints and d.spectrum is None and not d.healthy
    assert {v for name, v in verdicts(d).items() if name != "runs"} == {"skipped"}
    assert len(str(d).splitlines()) < 20


def test_an_f_that_needs_gradients() -> None:
    def f(x: Tensor) -> Tensor:
        return x - 0.5 * torch.autograd.grad((x**2).sum(), x)[0]

    assert "under torch.no_grad()" in few(f, torch.ones(2, 3)).check("runs").finding


def test_an_f_that_raises_later_on() -> None:
    class Late:
        calls = 0

        def __call__(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 40:
                raise RuntimeError("no more")
            return 0.5 * x + 1

    d = deqkit.diagnose(Late(), torch.zeros(2, 3))
    assert {t.exception for t in d.solvers} >= {"RuntimeError: no more"}
    assert "no more" in advice(d) and "no more" in d.notes[0] and "no more" in str(d)


@pytest.mark.parametrize(
    "f, says",
    [
        (lambda x: x[:, :2], "must keep the shape"),
        (lambda x: x.double(), "must keep the dtype"),
        (lambda x: {"x": x}, "must be a tensor, got dict"),
        (lambda x: 3.0, "must be a tensor"),
    ],
)
def test_structure(f: Any, says: str) -> None:
    d = few(f, torch.ones(2, 3))
    assert failures(d) == ["structure"] and says in d.check("structure").finding and says in advice(d)
    assert verdicts(d)["runs"] == "passed" and not d.solvers and "f cannot be solved" in d.notes[0]


def test_changes_in_place() -> None:
    x0 = torch.ones(2, 3)
    d = few(lambda x: x.mul_(0.5), x0)
    assert failures(d) == ["keeps x"] and torch.equal(x0, torch.ones(2, 3))
    hidden = few(lambda x: torch.from_numpy(np.multiply(x.numpy(), 0.5, out=x.numpy())).clone(), x0)
    assert failures(hidden) == ["keeps x"]  # of which autograd's version counter knows nothing
    b = torch.ones(2, 3)
    d = few(lambda x, b: 0.5 * x + b.add_(1), x0, args=(b,))
    assert failures(d) == ["keeps x"] and "args" in d.check("keeps x").finding and torch.equal(b, torch.ones(2, 3))


def test_a_sample_that_is_not_finite() -> None:
    f, x0, args = patients.healthy()
    poison = torch.ones(4, 1)
    poison[2] = torch.nan
    d = deqkit.diagnose(lambda x, b: f(x, b) * poison, x0, args=args)
    assert failures(d) == ["finite"] and d.check("finite").evidence["samples"] == [2]
    assert "sample 2 of 4" in advice(d) and not d.healthy
    best = d.best
    assert best is not None and best.num_converged == 3 and best.status is not None
    assert best.status[2] == deqkit.Status.NONFINITE
    assert d.spectrum is not None and d.spectrum.radius is not None and d.spectrum.settled is not None
    assert d.spectrum.settled.tolist() == [True, True, False, True] and bool(d.spectrum.radius[3] > 0)
    assert "samples without a fixed point" in d.notes[0]
    assert failures(few(lambda x: x * torch.nan, x0)) == ["finite"]


def test_a_sample_without_a_fixed_point_does_not_keep_the_others_from_their_gradient() -> None:
    slope = torch.tensor([[0.5], [1.0], [0.2]], requires_grad=True)
    d = few(lambda x: slope * x + 1, torch.zeros(3, 2))
    assert d.spectrum is not None and d.spectrum.settled is not None
    assert d.spectrum.settled.tolist() == [True, False, True]
    assert d.adjoints and d.adjoints[0].cosine is not None and 0.5 < d.adjoints[0].cosine < 1


def test_a_counter_makes_f_another_function_at_each_call() -> None:
    calls: list[int] = []

    def f(x: Tensor) -> Tensor:
        calls.append(1)
        return 0.5 * x + len(calls)

    d = few(f, torch.ones(2, 3))
    found = d.check("deterministic")
    assert found.verdict == "failed" and not found.evidence["draws_random_numbers"]
    assert "look for state that it keeps" in advice(d)


def test_random_numbers_without_effect() -> None:
    def f(x: Tensor) -> Tensor:
        return 0.5 * x + 0 * torch.rand_like(x)

    d = few(f, torch.ones(2, 3))
    assert verdicts(d)["deterministic"] == "noted" and d.healthy


def test_a_gradient_that_is_random() -> None:
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 0.5 * x

        @staticmethod
        def backward(ctx: Any, *g: Any) -> Any:
            return 0.5 * g[0] * torch.rand_like(g[0])

    d = few(lambda x: Noisy.apply(x) + 1, torch.ones(2, 3))
    assert verdicts(d)["deterministic"] == "passed" and "differentiable" in failures(d)
    assert "two gradients" in d.check("differentiable").finding


@pytest.mark.parametrize(
    "f",
    [
        lambda x: 0.5 * x + 0.1 * x.mean(dim=0, keepdim=True),
        lambda x: 0.2 * x.cumsum(dim=0) + 1,
        lambda x: 0.2 * x.flip(0).cumsum(dim=0).flip(0) + 1,  # of which moving the first sample tells nothing
        lambda x: 0.5 * x.roll(1, dims=0) + 1,
    ],
)
def test_samples_that_meet(f: Any) -> None:
    d = few(f, torch.ones(5, 3))
    assert "independent samples" in failures(d) and d.check("independent samples").evidence["moved"] > 1e-3


def test_where_samples_meet() -> None:
    """In the innermost module of which it is true: attention over the batch, where batch_first was forgotten."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    d = few(layer, patients.draw(3, 5, 8, seed=0), max_steps=3)
    assert d.check("independent samples").evidence["modules"] == ["f.self_attn (MultiheadAttention)"]
    right = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    assert not few(right, patients.draw(3, 5, 8, seed=0), max_steps=3).failed


def test_the_presence_of_a_sample() -> None:
    """Of which no change of a value tells; tensors in args lose the sample, too, but those closed over cannot."""
    found = few(lambda x, b: 0.5 * x + b / x.shape[0], torch.ones(4, 3), args=(torch.ones(4, 3),))
    assert found.check("independent samples").evidence["left_out"] > 0.01
    square = torch.eye(4) * 0.5
    d = few(lambda x, a: x @ a + 1, torch.ones(4, 4), args=(square,))  # which is no batch, although it looks like one
    assert not d.failed and d.check("independent samples").evidence["left_out"] is not None
    inputs = torch.ones(4, 3)
    closed = few(lambda x: 0.5 * x + inputs, torch.ones(4, 3)).check("independent samples")
    assert closed.verdict == "passed" and closed.evidence["left_out"] is None


def test_another_value_with_gradients() -> None:
    d = few(lambda x: 0.5 * x + (2.0 if torch.is_grad_enabled() else 1.0), torch.ones(2, 3))
    assert "grad mode" in failures(d) and "compute the same either way" in advice(d)


def test_detached() -> None:
    f, x0, args = patients.healthy()
    d = deqkit.diagnose(lambda x, b: f(x, b).detach(), x0, args=args)
    assert failures(d) == ["differentiable"] and "detach()" in advice(d)
    assert d.spectrum is None and not d.adjoints and any(t.all_converged for t in d.solvers)
    d = few(lambda x, b: f(x.detach(), b), x0, args=args)
    assert failures(d) == ["differentiable"] and "does not lead to x" in d.check("differentiable").finding


def test_partly_detached() -> None:
    f, x0, args = patients.healthy()
    d = few(lambda x, b: 0.5 * f(x, b) + 0.3 * x.detach(), x0, args=args)
    assert failures(d) == ["derivative"] and d.check("derivative").evidence["error"] > 0.05
    assert "holds for autograd's derivative" in advice(d)


def test_an_infinite_slope() -> None:
    d = few(lambda x: 0.5 * x + (x - x).abs().sqrt(), torch.ones(2, 3))
    assert "differentiable" in failures(d) and "infinite slopes" in advice(d)
    scale = nn.Parameter(torch.zeros(3))
    d = few(lambda x: 0.5 * x + scale.abs().sqrt(), torch.ones(2, 3))
    assert failures(d) == ["trainable"] and d.check("trainable").evidence["not_finite"]


def test_constant_f_is_no_failure() -> None:
    b = torch.ones(3, requires_grad=True)
    d = few(lambda x: b.expand(2, 3) * 2, torch.ones(2, 3))
    assert d.healthy and verdicts(d)["differentiable"] == "noted"


def test_nothing_to_train() -> None:
    d = few(lambda x: torch.cos(x), torch.zeros(2, 3))
    assert verdicts(d)["trainable"] == "noted" and d.healthy and not d.adjoints and d.spectrum is not None


def test_parameters_that_no_gradient_reaches() -> None:
    f, x0, args = patients.healthy()
    f.spare = nn.Linear(2, 2)  # pyright: ignore
    d = few(f, x0, args=args)
    assert d.check("trainable").evidence["not_reached"] == ["f.spare.weight", "f.spare.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_affine(dtype: torch.dtype) -> None:
    eq = linear(8, 3, radius=0.8)
    args = tuple(t.to(dtype).requires_grad_() for t in eq.args)
    d = deqkit.diagnose(affine, eq.x0.to(dtype), args=args, adjoints=["jfb"])
    assert d.check("affine").evidence["affine"] and [t.name for t in d.solvers] == list(TRIED)
    assert not few(tanh_layer, eq.x0.to(dtype), args=args).check("affine").evidence["affine"]
    odd = few(lambda x: torch.tanh(x), torch.zeros(2, 3, dtype=dtype))  # whose second difference vanishes at 0
    assert not odd.check("affine").evidence["affine"]
    bounded = few(lambda x: nn.functional.hardtanh(x, -4, 4), torch.zeros(2, 30, dtype=dtype))  # straight for a while
    assert not bounded.check("affine").evidence["affine"]


def test_solvers_for_linear_equations_say_so() -> None:
    for solver in SOLVERS.values():
        assert solver.for_affine == ("for an f that is affine in x" in (solver.__doc__ or "")), solver


def test_an_adjoint_without_a_solver_that_it_builds_on() -> None:
    f, x0, args = patients.expanding()
    d = deqkit.diagnose(f, x0, args=args, solvers=["anderson"], adjoints=["shine", "reversible"])
    assert d.adjoints[0].through == "anderson" and d.adjoints[0].relative_error is not None
    assert d.adjoints[1].exception == "no solver that it builds on converges"


def test_gmres_where_it_is_asked_for() -> None:
    f, x0, args = patients.healthy()
    d = deqkit.diagnose(
        f, x0, args=args, solvers=["gmres", deqkit.Anderson(history=2)], adjoints=[deqkit.NeumannAdjoint(3)]
    )
    assert [t.name for t in d.solvers] == ["gmres", "Anderson(history=2)"]
    assert [t.name for t in d.adjoints] == ["NeumannAdjoint(num_terms=3)"]
