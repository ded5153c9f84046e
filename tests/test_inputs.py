"""What a state may be, and what is refused by name (promise 4)."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten, tree_map

import deqkit

Pair = namedtuple("Pair", "left right")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


def contraction(x: Any) -> Any:
    """x -> x / 2 + 1 on every leaf: the fixed point is 2 everywhere."""
    return tree_map(lambda t: t / 2 + 1, x)


@st.composite
def states(draw: st.DrawFn) -> tuple[Any, int]:
    """A pytree state of random structure, shapes, dtypes and memory layout, and its number of batch dims."""
    batch_dims = draw(st.integers(0, 2))
    batch = tuple(draw(st.integers(1, 3)) for _ in range(batch_dims))

    def leaf() -> torch.Tensor:
        shape = batch + tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).to(
            draw(st.sampled_from(DTYPES))
        )
        layout = draw(st.sampled_from(["plain", "transposed", "expanded", "strided"]))
        if layout == "transposed" and x.dim() >= 2:
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == "expanded" and x.dim() >= 1:
            return x[..., :1].expand(shape)
        if layout == "strided":
            return torch.stack([x, x], dim=-1)[..., 0]
        return x

    kind = draw(st.sampled_from(["tensor", "tuple", "dict", "nested", "namedtuple", "ordered"]))
    if kind == "tensor":
        return leaf(), batch_dims
    if kind == "tuple":
        return (leaf(), leaf()), batch_dims
    if kind == "dict":
        return {"a": leaf(), "b": leaf()}, batch_dims
    if kind == "namedtuple":
        return Pair(leaf(), leaf()), batch_dims
    if kind == "ordered":
        return OrderedDict([("z", leaf()), ("a", leaf())]), batch_dims
    return {"deep": [leaf(), (leaf(),)], "flat": leaf()}, batch_dims


@given(states(), st.sampled_from(["fixed_point", "anderson", "broyden"]))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_any_state(state: tuple[Any, int], solver: str) -> None:
    x0, batch_dims = state
    before = tree_map(torch.clone, x0)
    sol = deqkit.solve(contraction, x0, solver=solver, batch_dims=batch_dims, rtol=2e-2, norm="leaf_max")
    leaves, spec = tree_flatten(sol.value)
    leaves0, spec0 = tree_flatten(x0)
    assert spec == spec0 and sol.converged.all()
    assert sol.status.shape == sol.residual.shape == sol.num_steps.shape == leaves0[0].shape[:batch_dims]
    for x, start, old in zip(leaves, leaves0, tree_flatten(before)[0], strict=True):
        assert x.shape == start.shape and x.dtype == start.dtype and x.device == start.device
        assert torch.equal(start, old)  # x0 is left alone
        torch.testing.assert_close(x, torch.full_like(x, 2.0), rtol=0.1, atol=0.0)


@given(states())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_f_gets_states_of_the_structure_it_was_given(state: tuple[Any, int]) -> None:
    x0, batch_dims = state
    seen: list[Any] = []

    def f(x: Any) -> Any:
        seen.append(x)
        return contraction(x)

    deqkit.solve(f, x0, batch_dims=batch_dims, rtol=2e-2, norm="leaf_max")
    for a, b in zip(tree_flatten(seen[0])[0], tree_flatten(x0)[0], strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_half_precision_residual_belongs_to_the_half_precision_point(solver: str, dtype: torch.dtype) -> None:
    c = torch.linspace(0.1, 0.8, 24).reshape(3, 8).to(dtype)
    sol = deqkit.solve(lambda x: c * torch.cos(x), torch.zeros(3, 8, dtype=dtype), solver=solver, rtol=2e-2)
    true = ((c * torch.cos(sol.value)).float() - sol.value.detach().float()).norm(dim=1)
    torch.testing.assert_close(sol.residual, true)
    assert sol.converged.all()


def test_channels_last_reaches_f_as_it_is() -> None:
    x0 = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    flags: list[bool] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        flags.append(x.is_contiguous(memory_format=torch.channels_last))
        return 0.5 * x + 1

    sol = deqkit.solve(f, x0)
    assert all(flags) and sol.value.is_contiguous(memory_format=torch.channels_last)


def test_a_buffer_that_f_uses_again_is_no_trap() -> None:
    buffer = torch.empty(2, 3)
    with torch.no_grad():
        for solver in ("fixed_point", "anderson", "broyden"):
            sol = deqkit.solve(lambda x: torch.add(x / 2, 1, out=buffer), torch.zeros(2, 3), solver=solver)
            torch.testing.assert_close(sol.value, torch.full((2, 3), 2.0), rtol=1e-3, atol=0)
    constant = torch.ones(2, 3)
    value = deqkit.solve(lambda x: constant, torch.zeros(2, 3)).value
    value.detach().zero_()
    assert (constant == 1).all()  # the answer is no alias of a tensor of the caller's


@pytest.mark.parametrize("batch_dims", [1, 2])
def test_empty_batch(batch_dims: int) -> None:
    x0 = {"a": torch.zeros(0, 3, 2), "b": torch.zeros(0, 3)}
    sol = deqkit.solve(lambda x: 1 / 0, x0, batch_dims=batch_dims, trace=True, on_failure="raise")
    assert sol.num_fn_evals == 0 and sol.value["a"].shape == (0, 3, 2)
    assert sol.converged.shape == x0["a"].shape[:batch_dims] and sol.trace is not None and "0 of 0" in str(sol)


def test_autocast_output_is_cast_back() -> None:
    layer = torch.nn.Linear(8, 8)
    torch.nn.init.orthogonal_(layer.weight, gain=0.5)
    b = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sol = deqkit.solve(lambda x: torch.tanh(layer(x)) + b.to(torch.bfloat16), torch.zeros(4, 8), rtol=1e-2)
    sol.value.sum().backward()
    assert sol.value.dtype == torch.float32 and layer.weight.grad is not None and layer.weight.grad.isfinite().all()


ZERO = torch.zeros(2, 3)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown solver": ({"solver": "newton"}, ValueError, r"unknown solver 'newton'.*anderson.*broyden.*fixed_point"),
    "solver class": ({"solver": deqkit.Anderson}, TypeError, r"call it: Anderson\(\)"),
    "shine without an inverse": (
        {"solver": "fixed_point", "adjoint": "shine"}, ValueError,
        r"adjoint='shine' builds on what solver='fixed_point' does not record.*\['anderson', 'broyden'\]",
    ),
    "shine in stages": ({"solver": "auto", "adjoint": "shine"}, ValueError, "solver='auto' does not record"),
    "reversible adjoint of another solver": (
        {"adjoint": "reversible"}, ValueError, r"solver='anderson' does not record: .*\['reversible'\]"
    ),
    "unknown adjoint": ({"adjoint": "magic"}, ValueError, r"unknown adjoint 'magic'.*implicit.*jfb"),
    "adjoint class": ({"adjoint": deqkit.JFB}, TypeError, r"call it: JFB\(\)"),
    "unknown keyword": ({"tol": 1e-3}, TypeError, "tol"),
    "negative rtol": ({"rtol": -1.0}, ValueError, "rtol"),
    "nan atol": ({"atol": float("nan")}, ValueError, "atol"),
    "text rtol": ({"rtol": "tight"}, TypeError, "rtol"),
    "float steps": ({"max_steps": 5.0}, TypeError, "max_steps"),
    "negative steps": ({"max_steps": -1}, ValueError, "max_steps"),
    "bool steps": ({"max_steps": True}, TypeError, "max_steps"),
    "unknown policy": ({"on_failure": "explode"}, ValueError, r"on_failure 'explode'.*warn.*raise.*ignore"),
    "unknown norm": ({"norm": "l3"}, ValueError, r"norm 'l3'.*l2.*leaf_max"),
    "wrong norm shape": ({"norm": lambda x: x.norm()}, ValueError, "batch shape"),
    "tensor args": ({"args": ZERO}, TypeError, r"args=\(b,\)"),
    "batch_dims": ({"batch_dims": 3}, ValueError, "fewer dims than batch_dims=3"),
    "callback": ({"callback": 3}, TypeError, "callback"),
    "trace": ({"trace": 1}, TypeError, "trace must be True or False"),
    "bool rtol": ({"rtol": True}, TypeError, "rtol"),
    "bool batch_dims": ({"batch_dims": True}, TypeError, "batch_dims"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_settings(case: str) -> None:
    given_settings, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        deqkit.solve(contraction, ZERO, **given_settings)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: deqkit.Anderson(history=0), "Anderson: history must be at least 1"),
        (lambda: deqkit.Anderson(mixing=0.0), "mixing"),
        (lambda: deqkit.Anderson(mixing=1.5), "mixing"),
        (lambda: deqkit.Anderson(ridge=-1.0), "ridge"),
        (lambda: deqkit.Broyden(history=-2), "Broyden: history"),
        (lambda: deqkit.FixedPointIteration(damping=1.0), "damping"),
        (lambda: deqkit.FixedPointIteration(check_every=0), "check_every"),
        (lambda: deqkit.ImplicitAdjoint(solver="cg"), "unknown solver 'cg'"),
        (lambda: deqkit.ImplicitAdjoint(max_steps=-1), "max_steps"),
        (lambda: deqkit.NeumannAdjoint(num_terms=0), "num_terms"),
        (lambda: deqkit.PhantomAdjoint(num_steps=0), "num_steps"),
        (lambda: deqkit.PhantomAdjoint(damping=-0.1), "damping"),
        (lambda: deqkit.ShineAdjoint(refine_steps=-1), "ShineAdjoint: refine_steps"),
        (lambda: deqkit.ShineAdjoint(fallback_ratio=0.0), "fallback_ratio"),
        (lambda: deqkit.ShineAdjoint(solver="cg"), "unknown solver 'cg'"),
        (lambda: deqkit.ReversibleIteration(damping=0.0), r"damping must be in \(0, 1\)"),
        (lambda: deqkit.ReversibleIteration(damping=1.0), "damping"),
        (lambda: deqkit.Broyden(line_search=-1), "Broyden: line_search"),
    ],
)
def test_refused_solver_and_adjoint_settings(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("f", "x0", "error", "words"),
    [
        (3, ZERO, TypeError, "f must be callable"),
        (contraction, torch.zeros(2, dtype=torch.int64), TypeError, r"x0 must have a floating or complex dtype.*int64"),
        (contraction, {"a": ZERO, "b": None}, TypeError, r"x0\['b'\] must be a tensor, got NoneType"),
        (contraction, 1.5, TypeError, "x0 must be a tensor, got float"),
        (contraction, (), ValueError, "x0 holds no tensor"),
        (contraction, (ZERO, torch.zeros(3, 3)), ValueError, r"x0\[0\] has \(2,\), x0\[1\] has \(3,\)"),
        (lambda x: x[:, :2], ZERO, ValueError, r"keep the shape.*\(2, 2\).*\(2, 3\)"),
        (lambda x: x.double(), ZERO, TypeError, r"keep the dtype.*float64.*float32"),
        (lambda x: x.to("meta"), ZERO, ValueError, "keep the device.*meta"),
        (lambda x: (x, x), ZERO, ValueError, "structure of x0: expected a tensor"),
        (lambda x: {"b": x["a"]}, {"a": ZERO}, ValueError, "structure of x0"),
        (lambda x: None, ZERO, TypeError, r"f\(x\) must be a tensor, got NoneType"),
        (lambda x: x.mul_(0.5), ZERO, RuntimeError, "changed its input in place"),
    ],
)
def test_refused_functions_and_states(f: Any, x0: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words), torch.no_grad():
        deqkit.solve(f, x0)


def test_an_exception_in_f_passes_through() -> None:
    class Custom(Exception):
        pass

    def f(x: torch.Tensor) -> torch.Tensor:
        raise Custom("from f")

    with pytest.raises(Custom, match="from f"):
        deqkit.solve(f, ZERO)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_mixed_precision_residual_belongs_to_the_returned_point(solver: str) -> None:
    c = torch.linspace(0.1, 0.8, 6).reshape(2, 3)

    def f(x: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return c * torch.cos(x[0]), 0.3 * x[1] + x[0].double()

    x0 = (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64))
    with torch.no_grad():
        sol = deqkit.solve(f, x0, solver=solver, rtol=1e-6)
    true = torch.cat([a.double() - b.double() for a, b in zip(f(sol.value), sol.value, strict=True)], dim=1).norm(dim=1)
    torch.testing.assert_close(sol.residual, true, rtol=1e-9, atol=0)


def test_keys_of_a_dict_may_come_in_any_order() -> None:
    x0 = {"a": torch.zeros(2, 1), "b": {"c": torch.zeros(2, 3), "d": torch.zeros(2, 3)}}
    sol = deqkit.solve(lambda x: {"b": {k: x["b"][k] / 2 + 1 for k in "dc"}, "a": x["a"] / 2 + 3}, x0)
    torch.testing.assert_close(sol.value["a"], torch.full((2, 1), 6.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(sol.value["b"]["d"], torch.full((2, 3), 2.0), rtol=1e-3, atol=0)
    for wrong in ({"b": ZERO}, {"a": ZERO, "b": (ZERO, ZERO)}, {"b": {"d": ZERO, "c": (ZERO, ZERO)}, "a": ZERO}):
        with pytest.raises(ValueError, match="structure of x0"):
            deqkit.solve(lambda x, wrong=wrong: wrong, x0)


def test_any_number_type_will_do() -> None:
    numbers = {"rtol": np.float32(1e-3), "atol": Fraction(0), "max_steps": np.int64(40), "batch_dims": np.int8(1)}
    solver = deqkit.Anderson(history=np.int64(4), mixing=np.float32(0.5), restart_factor=float("inf"))
    assert deqkit.solve(contraction, ZERO, solver=solver, **numbers).converged.all()
    deqkit.Broyden(restart_factor=float("inf"))


def test_refused_mixing_names_its_interval() -> None:
    for mixing in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"mixing must be in \(0, 1\]"):
            deqkit.Anderson(mixing=mixing)
