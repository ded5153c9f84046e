"""Spectral radius, norms and eigenvalues of df/dx against dense Jacobians."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equations import matrix, tanh, tanh_layer
from torch import Tensor
from torch.utils._pytree import tree_leaves

import deqkit
from deqkit.spectral.arnoldi import Arnoldi, find_dominant
from deqkit.spectral.jacobian import Jacobian

TOOLS = {
    "spectral_radius": deqkit.spectral_radius,
    "spectral_norm": deqkit.spectral_norm,
    "frobenius_norm": deqkit.frobenius_norm,
}


def rotations(n: int, radius: float) -> Tensor:
    """Nothing but complex pairs, the largest of the given radius."""
    blocks = []
    for i in range(n // 2):
        angle, size = torch.tensor(0.3 + 0.7 * i, dtype=torch.float64), radius * 0.9**i
        blocks.append(size * torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]]).double())
    q = torch.linalg.qr(matrix(n, 1.0, seed=3))[0]
    return q @ torch.block_diag(*blocks) @ q.T


def non_normal(n: int, radius: float) -> Tensor:
    """Triangular, with a spectral norm far above its spectral radius."""
    upper = torch.triu(matrix(n, 1.0, seed=4), diagonal=1)
    return radius * (torch.diag(torch.linspace(-0.8, 1, n, dtype=torch.float64)) + 2 * upper)


MATRICES: dict[str, Callable[[int], Tensor]] = {
    "general": lambda n: matrix(n, 0.9, seed=0),
    "symmetric": lambda n: matrix(n, 0.9, seed=1, symmetric=True),
    "pairs": lambda n: rotations(n, 0.9),
    "non_normal": lambda n: non_normal(n, 0.9),
    "low_rank": lambda n: matrix(n, 0.9, seed=2) * (torch.arange(n) < 2),
    "identity": lambda n: 0.7 * torch.eye(n, dtype=torch.float64),
    "negative": lambda n: -matrix(n, 0.9, seed=1, symmetric=True).abs(),
}


def batch_of(a: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """A linear f whose sample i has the Jacobian (1 + i/2) a, a point, and those Jacobians."""
    factors = torch.tensor([1.0, 1.5, 2.0], dtype=a.dtype)
    jacobians = factors[:, None, None] * a
    x = torch.randn(3, len(a), dtype=a.dtype, generator=torch.Generator().manual_seed(0))
    return lambda x: torch.einsum("bij,bj->bi", jacobians.to(x.dtype), x), x, jacobians.double()


def true_radius(jacobians: Tensor) -> Tensor:
    return torch.linalg.eigvals(jacobians).abs().amax(-1)


def true_norm(jacobians: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(jacobians, 2)


def true_frobenius(jacobians: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(jacobians)


# The spectral radius


@pytest.mark.parametrize("n", [6, 30, 120])
@pytest.mark.parametrize("kind", MATRICES)
def test_radius_against_dense_eigenvalues(kind: str, n: int) -> None:
    """Of small states in full, of larger ones by a subspace that is restarted; the estimate says how well."""
    f, x, jacobians = batch_of(MATRICES[kind](n))
    radius, error, num_products = deqkit.spectral_radius(f, x, rtol=1e-5, max_products=400, return_error=True)
    missed = (radius - true_radius(jacobians)).abs()
    assert (missed <= 1e-5 * radius + 1e-12).all() and (missed <= error + 1e-12).all()
    assert (error <= 1.1e-5 * radius).all() and 2 <= num_products <= (n if n <= 32 else 400)


def test_radius_with_a_history_that_is_restarted_often() -> None:
    for history in (3, 4, 5, 7):  # odd ones and small ones, where pairs are cut
        f, x, jacobians = batch_of(rotations(40, 0.9))
        radius = deqkit.spectral_radius(f, x, rtol=1e-4, max_products=4000, history=history)
        torch.testing.assert_close(radius, true_radius(jacobians), rtol=1e-4, atol=0)


def test_an_estimate_that_is_not_known_says_so() -> None:
    """All eigenvalues of a cyclic shift have modulus 1, 200 of them: 30 products cannot tell."""
    shift = torch.roll(torch.eye(200, dtype=torch.float64), 1, 0)
    f, x, _ = batch_of(shift)
    with pytest.warns(deqkit.ConvergenceWarning, match=r"spectral_radius: not known to rtol=0.001 for 3 of 3 samples"):
        deqkit.spectral_radius(f, x, max_products=30)
    radius, error, num_products = deqkit.spectral_radius(f, x, max_products=30, return_error=True)
    assert num_products == 30 and (error > 1e-2 * radius).all()
    assert ((radius - torch.tensor([1.0, 1.5, 2.0])).abs() <= error).all()


def test_what_is_said_to_be_known_is_known() -> None:
    """Over 150 maps with crowded spectra: now and then one eigenvalue settles before a larger one has shown."""
    generator = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(150, 64, 64, dtype=torch.float64, generator=generator))[0]
    a = q * torch.rand(150, 1, 64, dtype=torch.float64, generator=generator)
    f, x = lambda x: torch.einsum("bij,bj->bi", a, x), torch.zeros(150, 64, dtype=torch.float64)
    for tool, true in ((deqkit.spectral_radius, true_radius), (deqkit.spectral_norm, true_norm)):
        value, error, _ = tool(f, x, rtol=1e-3, max_products=400, return_error=True)
        off = (value - true(a)).abs()
        assert (error <= 1.1e-3 * value).all() and (off <= 1.1e-3 * value).all()
        assert (off <= error + 1e-12).double().mean() > 0.98  # of first order, and no bound


def test_samples_that_take_different_times_do_not_wait_for_nor_disturb_each_other() -> None:
    slow = matrix(60, 0.9, seed=0)
    fast = torch.diag(torch.linspace(0.01, 0.1, 60, dtype=torch.float64))
    fast[0, 0] = 0.9
    both = torch.stack([slow, fast])
    x = torch.zeros(2, 60, dtype=torch.float64)
    together = deqkit.spectral_radius(lambda x: torch.einsum("bij,bj->bi", both, x), x, return_error=True)
    for i, a in enumerate((slow, fast)):
        alone = deqkit.spectral_radius(lambda x, a=a: x @ a.T, x[i : i + 1], return_error=True)
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-10, atol=0)
        torch.testing.assert_close(alone.error[0], together.error[i], rtol=1e-4, atol=1e-12)
        assert (alone.num_products < together.num_products) == (i == 1)


@pytest.mark.parametrize("upper", [0, 8])
def test_arnoldi_relation_holds_through_restarts(upper: float) -> None:
    """A V = V H + v c^T with V orthonormal, after any number of products; what is lost to a bad basis is known."""
    decaying = torch.diag(10.0 ** -torch.arange(0, 30, 0.5, dtype=torch.float64))  # where orthogonality is soon lost
    a = torch.stack([matrix(60, 1.0, seed=0), rotations(60, 1.0), decaying])
    a = a + upper * torch.triu(matrix(60, 1.0, seed=4), diagonal=1)
    product = lambda u: (torch.einsum("bij,bj->bi", a, u[0]),)  # noqa: E731
    start = (torch.randn(1, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)
    lost = torch.zeros(3, dtype=torch.float64)
    for num_steps in (1, 7, 16, 20, 47, 100):
        arnoldi = Arnoldi(product, start, 3, history=16, resolution=1e-16)
        find_dominant(arnoldi, rtol=0.0, max_steps=num_steps)
        n = arnoldi.num_columns
        nothing = (torch.zeros(3, 60, dtype=torch.float64),)
        columns = [arnoldi.basis.subtract_combination(nothing, -unit.expand(3, n))[0] for unit in torch.eye(n).double()]
        v = torch.stack(columns, dim=2)
        right = v @ arnoldi.matrix[:, :n, :n] + arnoldi.next[0].unsqueeze(2) * arnoldi.coupling[:, :n].unsqueeze(1)
        off = torch.linalg.matrix_norm(a @ v - right)
        assert (off <= 1.01 * arnoldi.lost + 1e-13 * (1 + upper)).all()
        gram = v.mT @ v
        kept = gram.diagonal(dim1=1, dim2=2).round()  # a vector that would cut a pair is a zero in its place
        torch.testing.assert_close(gram, torch.diag_embed(kept), rtol=0, atol=1e-13)
        assert (kept.sum(1) >= n - 1).all() or num_steps > 30
        lost = torch.maximum(lost, arnoldi.lost)
    assert (lost < 1e-9).all() if upper == 0 else (lost > 1e-13).any()


# Spectral and Frobenius norm


@pytest.mark.parametrize("n", [6, 30, 120])
@pytest.mark.parametrize("kind", MATRICES)
def test_norm_against_dense_singular_values(kind: str, n: int) -> None:
    f, x, jacobians = batch_of(MATRICES[kind](n))
    norm, error, _ = deqkit.spectral_norm(f, x, rtol=1e-5, max_products=800, return_error=True)
    missed = (norm - true_norm(jacobians)).abs()
    assert (missed <= 1e-5 * norm).all() and (missed <= error + 1e-12).all()
    assert (norm >= true_radius(jacobians) * (1 - 1e-9)).all()


@pytest.mark.parametrize("kind", MATRICES)
def test_frobenius_norm_and_its_standard_error(kind: str) -> None:
    """Of 400 estimates, as many lie within one and two standard errors as should."""
    a = MATRICES[kind](40)
    x = torch.zeros(400, 40, dtype=torch.float64)
    norm, error, num_products = deqkit.frobenius_norm(lambda x: x @ a.T, x, num_probes=64, return_error=True)
    assert num_products == 64 and norm.unique().numel() > 1 or kind == "identity"
    true = torch.linalg.matrix_norm(a)
    off = (norm - true).abs()
    if kind == "identity":  # signs make it exact
        assert off.max() < 1e-12 and error.max() < 1e-12
        return
    # Binomial with p = 0.683 and 0.954 (a little less for Student's t): five standard deviations.
    assert 0.55 <= (off <= error).double().mean() <= 0.80
    assert 0.88 <= (off <= 2 * error).double().mean()
    # Its square is unbiased: the mean over all probes and samples, against its own standard error.
    squares = norm.square()
    assert (squares.mean() - true.square()).abs() <= 4 * squares.std() / 20


def test_a_single_probe_has_no_standard_error() -> None:
    f, x, _ = batch_of(MATRICES["general"](5))
    value, error, _ = deqkit.frobenius_norm(f, x, num_probes=1, return_error=True)
    assert value.isfinite().all() and error.isnan().all()


# Eigenvalues


@pytest.mark.parametrize("n", [6, 120])
@pytest.mark.parametrize("kind", ["general", "symmetric", "pairs", "non_normal"])
def test_eigenvalues_against_dense_ones(kind: str, n: int) -> None:
    f, x, jacobians = batch_of(MATRICES[kind](n))
    for sample in (0, 2, -1):
        found = deqkit.eigenvalues(f, x, num=6, sample=sample, rtol=1e-10)
        true = torch.linalg.eigvals(jacobians[sample])
        true = true[true.abs().argsort(descending=True)]
        assert found.dtype == torch.complex128 and found.shape == (6,)
        # 1e-10 is asked of the residuals; an eigenvalue of the non-normal matrix has a condition number of thousands.
        torch.testing.assert_close(found.abs(), true.abs()[:6], rtol=1e-6, atol=1e-10)
        distance = (found[:, None] - true[None, :]).abs().amin(dim=1)
        assert distance.max() < 1e-6


def test_eigenvalues_of_one_sample_among_several_batch_dims() -> None:
    a = torch.stack([matrix(4, 0.1 * (i + 1), seed=i) for i in range(6)]).reshape(2, 3, 4, 4)
    f, x = lambda x: torch.einsum("abij,abj->abi", a, x), torch.zeros(2, 3, 4, dtype=torch.float64)
    for sample, radius in ((0, 0.1), (4, 0.5), ((1, 2), 0.6), ((-1, 0), 0.4)):
        found = deqkit.eigenvalues(f, x, sample=sample, batch_dims=2)
        assert found.shape == (4,) and found[0].abs().item() == pytest.approx(radius, rel=1e-9)
    for sample in (6, -7, (2, 0), (0,), ()):
        with pytest.raises(IndexError, match=r"in a batch of shape \(2, 3\)"):
            deqkit.eigenvalues(f, x, sample=sample, batch_dims=2)
    single = deqkit.eigenvalues(lambda x: x @ a[1, 2].T, x[0, 0], sample=(), batch_dims=0)
    assert single[0].abs().item() == pytest.approx(0.6, rel=1e-9)


def test_eigenvalues_that_arpack_does_not_find_are_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")

    def gives_up(*args: Any, **kwargs: Any) -> Any:
        import numpy as np

        raise linalg.ArpackNoConvergence("no", np.array([0.5 + 0j]), np.zeros((100, 1)))

    monkeypatch.setattr(linalg, "eigs", gives_up)
    with pytest.warns(deqkit.ConvergenceWarning, match="only 1 of 3 are known"):
        found = deqkit.eigenvalues(lambda x: 0.5 * x, torch.zeros(1, 100), num=3)
    assert found.tolist() == [0.5]


def test_eigenvalues_take_no_more_products_than_they_may() -> None:
    a = matrix(300, 0.9, seed=5)  # whose eigenvalues fill a disc: the outermost are hard to tell apart
    x = torch.zeros(1, 300, dtype=torch.float64)
    taken: list[int] = []

    def f(x: Tensor) -> Tensor:
        out = x @ a.T
        out.register_hook(lambda gradient: taken.append(1))
        return out

    def products(limit: int | None) -> int:
        taken.clear()
        deqkit.eigenvalues(f, x, num=12, max_products=limit)
        return len(taken)

    free = products(None)
    assert free > 200
    for limit in (60, 150):
        with pytest.warns(deqkit.ConvergenceWarning, match="of 12 are known"):
            assert products(limit) <= limit + 2
    assert products(10 * free) == free
    with pytest.raises(ValueError, match="max_products must be at least 1"):
        products(0)


def test_eigenvalues_name_the_extra_that_they_need() -> None:
    code = (
        "import sys, torch, deqkit\n"
        "sys.modules['scipy.sparse.linalg'] = None\n"
        "deqkit.eigenvalues(lambda x: 0.5 * x, torch.zeros(1, 9))\n"  # small: done without
        "try:\n    deqkit.eigenvalues(lambda x: 0.5 * x, torch.zeros(1, 99))\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'deqkit[diagnostics]'" in done.stdout


# What holds for all of them


def dense(f: Callable[..., Any], x: Any, batch_shape: tuple[int, ...]) -> Tensor:
    """The Jacobians of a batch, (B, D, D), in real numbers, by autograd entry by entry."""
    leaves, spec = torch.utils._pytree.tree_flatten(x)
    reals = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves]
    shapes = [r.shape for r in reals]
    flat = torch.cat([r.double().reshape(*batch_shape, -1) for r in reals], dim=-1)

    def on_flat(v: Tensor) -> Tensor:
        parts = v.split([s[len(batch_shape) :].numel() for s in shapes], dim=-1)
        state = [
            torch.view_as_complex(p.reshape(s)) if leaf.is_complex() else p.reshape(s)
            for p, s, leaf in zip(parts, shapes, leaves, strict=True)
        ]
        out = tree_leaves(f(torch.utils._pytree.tree_unflatten(state, spec)))
        out = [torch.view_as_real(o) if o.is_complex() else o for o in out]
        return torch.cat([o.reshape(*batch_shape, -1) for o in out], dim=-1)

    full: Any = torch.autograd.functional.jacobian(on_flat, flat)
    n, size = flat[..., 0].numel(), flat.shape[-1]
    full = full.reshape(n, size, n, size)
    return torch.stack([full[i, :, i] for i in range(n)])


W = matrix(6, 1.2, seed=5)


def coupled(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pytree with a complex leaf; not holomorphic."""
    a, (c,) = x["a"], x["c"]
    top = torch.tanh(a @ W[:4, :4].to(a.dtype).T + c.real.sum(-1, keepdim=True))
    return {"a": top, "c": (0.6j * c + 0.3 * c.conj() * a[..., :3] + 0.2,)}


def tree_case() -> tuple[Callable[..., Any], Any, tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    c = torch.randn(3, 3, dtype=torch.complex128, generator=generator)
    return coupled, {"a": a, "c": (c,)}, (3,)


def batch_dims_case(batch_dims: int) -> tuple[Callable[..., Any], Any, tuple[int, ...]]:
    shape = (2, 3)[:batch_dims]
    x = torch.randn(*shape, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return lambda x: torch.tanh(x @ W.to(x.dtype).T), x, shape


CASES = {
    "tree": tree_case,
    **{f"batch_dims_{k}": (lambda k=k: batch_dims_case(k)) for k in (0, 1, 2)},
}


@pytest.mark.parametrize("case", CASES)
def test_structures_and_batch_dims(case: str) -> None:
    f, x, shape = CASES[case]()
    jacobians = dense(f, x, shape)
    settings: dict[str, Any] = {"batch_dims": len(shape), "rtol": 1e-8}
    radius, norm = deqkit.spectral_radius(f, x, **settings), deqkit.spectral_norm(f, x, **settings)
    torch.testing.assert_close(radius, true_radius(jacobians).reshape(shape), rtol=1e-7, atol=0)
    torch.testing.assert_close(norm, true_norm(jacobians).reshape(shape), rtol=1e-7, atol=0)
    estimate = deqkit.frobenius_norm(f, x, batch_dims=len(shape), num_probes=500, return_error=True)
    true = true_frobenius(jacobians).reshape(shape)
    assert ((estimate.value - true).abs() <= 4 * estimate.error).all() and (estimate.error < 0.05 * true).all()
    found = deqkit.eigenvalues(f, x, batch_dims=len(shape))
    torch.testing.assert_close(found[0].abs(), radius.flatten()[0], rtol=1e-7, atol=0)


def test_a_holomorphic_f_has_the_spectrum_of_its_complex_jacobian() -> None:
    a = torch.complex(matrix(5, 1.0, seed=0), matrix(5, 1.0, seed=1))
    x = torch.zeros(2, 5, dtype=torch.complex128)
    f = lambda x: x @ a.T  # noqa: E731
    radius = torch.linalg.eigvals(a).abs().max().expand(2)
    torch.testing.assert_close(deqkit.spectral_radius(f, x), radius, rtol=1e-9, atol=0)
    torch.testing.assert_close(deqkit.spectral_norm(f, x), torch.linalg.matrix_norm(a, 2).expand(2), rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", [12, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype, n: int) -> None:
    """As good as the dtype allows, without a warning that nobody could do anything about."""
    f, x, jacobians = batch_of(MATRICES["pairs"](n))
    x = x.to(dtype)
    eps = torch.finfo(dtype).eps
    for tool, true in ((deqkit.spectral_radius, true_radius), (deqkit.spectral_norm, true_norm)):
        estimate = tool(f, x, rtol=1e-4, return_error=True)
        assert estimate.value.dtype == torch.float32
        off = (estimate.value - true(jacobians)).abs()
        assert (off <= max(2e-4, 4 * eps) * true(jacobians)).all() and (off <= estimate.error + 1e-6).all()
        tool(f, x, rtol=0.0, max_products=400)  # which it stops short of, having all that there is
    frobenius, error, _ = deqkit.frobenius_norm(f, x, num_probes=100, return_error=True)
    assert ((frobenius - true_frobenius(jacobians)).abs() <= 4 * error + 4 * eps * frobenius).all()


def test_autocast_reaches_f_and_nothing_else() -> None:
    layer = torch.nn.Linear(12, 12)
    torch.nn.init.orthogonal_(layer.weight, gain=0.9, generator=torch.Generator().manual_seed(0))
    seen = []

    def f(x: Tensor) -> Tensor:
        out = layer(x)
        seen.append(out.dtype)
        return out

    with torch.autocast("cpu", dtype=torch.bfloat16):
        radius = deqkit.spectral_radius(f, torch.zeros(2, 12))
        norm = deqkit.spectral_norm(f, torch.zeros(2, 12))
    assert seen == [torch.bfloat16] * 2 and radius.dtype == norm.dtype == torch.float32
    torch.testing.assert_close(radius, torch.full((2,), 0.9), rtol=2e-2, atol=0)
    torch.testing.assert_close(norm, torch.full((2,), 0.9), rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tool", TOOLS)
def test_tiny_and_huge_jacobians(tool: str, dtype: torch.dtype) -> None:
    """Whose squares the dtype cannot hold."""
    a = matrix(6, 1.0, seed=0).to(dtype)
    x = torch.ones(1, 6, dtype=dtype)
    expected = TOOLS[tool](lambda x: x @ a.T, x)
    for size in (1e-30, 1e30) if dtype == torch.float32 else (2.0**-11, 2.0**10):
        found = TOOLS[tool](lambda x, s=size: s * (x @ a.T), x)
        torch.testing.assert_close(found / size, expected, rtol=max(1e-4, 10 * torch.finfo(dtype).eps), atol=0)


def test_attention_and_transforms_are_refused_with_advice() -> None:
    attention = torch.nn.functional.scaled_dot_product_attention
    x = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    f = lambda x: 0.5 * attention(x, x, x)  # noqa: E731
    with pytest.raises(RuntimeError) as raised:
        deqkit.spectral_norm(f, x)
    assert "fused attention are not (see torch.nn.attention.sdpa_kernel" in raised.value.__notes__[0]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        norm = deqkit.spectral_norm(f, x)
        torch.testing.assert_close(norm, true_norm(dense(f, x.double(), (2,))).float(), rtol=1e-3, atol=0)
    with pytest.raises(NotImplementedError, match="torch.func does not go through"):
        torch.func.vmap(lambda x: deqkit.spectral_radius(f, x))(x[None])


@pytest.mark.parametrize("tool", TOOLS)
def test_a_sample_that_is_not_finite_is_nan_and_alone(tool: str) -> None:
    f, x, _ = batch_of(MATRICES["general"](12))
    spoilt = x.clone()
    spoilt[1] = torch.nan
    for g in (lambda x: f(torch.tanh(x)), lambda x: f(torch.sqrt(x.abs() * (torch.arange(3) != 1).unsqueeze(1)))):
        clean = TOOLS[tool](g, x, return_error=True)
        dirty = TOOLS[tool](g, spoilt, return_error=True)
        keep = torch.tensor([0, 2])
        assert torch.equal(clean.value[keep], dirty.value[keep]) and torch.equal(clean.error[keep], dirty.error[keep])
        assert dirty.value[1].isnan() and dirty.error[1].isnan() and dirty.value[keep].isfinite().all()
        assert TOOLS[tool](g, spoilt)[1].isnan()
    assert deqkit.eigenvalues(lambda x: f(torch.tanh(x)), spoilt, sample=1).isnan().all()


@pytest.mark.parametrize("tool", TOOLS)
def test_no_dependence_is_zero(tool: str) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    for f in (lambda x: torch.ones_like(x), lambda x: x.detach() + 1, lambda x: x * 0 + 1):
        value, error, _ = TOOLS[tool](f, x, return_error=True)
        assert value.tolist() == error.tolist() == [0, 0, 0]
    assert deqkit.eigenvalues(lambda x: torch.ones_like(x), x).tolist() == [0] * 10


@pytest.mark.parametrize("tool", TOOLS)
def test_empty_batches_and_states(tool: str) -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("called for nothing")

    assert TOOLS[tool](never, torch.zeros(0, 5)).shape == (0,)
    assert TOOLS[tool](never, torch.zeros(2, 0, 5), batch_dims=2).shape == (2, 0)
    assert TOOLS[tool](lambda x: x, torch.zeros(2, 0)).tolist() == [0, 0]
    assert deqkit.eigenvalues(lambda x: x, torch.zeros(2, 0)).shape == (0,)


@pytest.mark.parametrize("tool", [*TOOLS, "eigenvalues"])
def test_random_numbers_are_the_callers(tool: str) -> None:
    """The global generator stays where it is; the same question gets the same answer; another seed another one."""
    function = getattr(deqkit, tool)
    f, x, _ = batch_of(MATRICES["general"](100))
    settings = {} if tool in ("frobenius_norm", "eigenvalues") else {"max_products": 20, "return_error": True}
    before = torch.get_rng_state()
    first, second = (function(f, x, **settings) for _ in range(2))
    seeded = [function(f, x, generator=torch.Generator().manual_seed(s), **settings) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in ((first, second), (seeded[0], seeded[1])):
        assert torch.equal(a[0], b[0])
    assert not torch.equal(seeded[0][0], seeded[2][0]) and not torch.equal(first[0], seeded[0][0])


@pytest.mark.parametrize("tool", TOOLS)
def test_f_is_called_once_and_nothing_is_left_behind(tool: str) -> None:
    layer = torch.nn.Linear(5, 5)
    x = torch.randn(2, 5, requires_grad=True)
    calls = []

    def f(x: Tensor, scale: Tensor) -> Tensor:
        calls.append(1)
        return torch.tanh(layer(x)) * scale

    scale = torch.ones(2, 5, requires_grad=True)
    value = TOOLS[tool](f, x, (scale,))
    assert len(calls) == 1 and not value.requires_grad
    assert all(t.grad is None for t in (x, scale, *layer.parameters()))
    with torch.no_grad():
        assert torch.equal(TOOLS[tool](f, x, (scale,)), value)
    with torch.inference_mode():  # as validation loops have it
        assert torch.equal(TOOLS[tool](f, x.clone(), (scale.clone(),)), value)
    layer.eval()
    assert torch.equal(TOOLS[tool](f, x, (scale,)), value)


@pytest.mark.parametrize("tool", [*TOOLS, "jacobian_penalty", "spectral_norm_penalty"])
def test_no_cycle_keeps_the_graph_alive(tool: str) -> None:
    """What the graph holds goes when the result goes, without the garbage collector."""
    w = torch.eye(3, requires_grad=True)
    held = torch.ones(2, 3, requires_grad=True).exp()
    gone = weakref.ref(held)
    gc.collect()
    gc.disable()
    try:
        value = getattr(deqkit, tool)(lambda x, b: torch.tanh(x @ w) * b, torch.zeros(2, 3), (held,))
        del value, held
        assert gone() is None
    finally:
        gc.enable()


def test_a_state_of_one_or_two_numbers() -> None:
    """Which no limit of products and no tolerance can make restart."""
    for n in (1, 2):
        x = torch.ones(2, n, dtype=torch.float64)
        for f, radius in ((lambda x: x.flip(-1) * 0.5 + 0.1 * x, 0.6), (lambda x: torch.zeros_like(x) * x, 0.0)):
            for rtol in (0.0, 1e-3):
                found = deqkit.spectral_radius(f, x, rtol=rtol, max_products=100, return_error=True)
                assert found.num_products <= n and found.value.tolist() == pytest.approx([radius] * 2)
    jordan = lambda x: torch.stack([0.5 * x[:, 0] + 1e6 * x[:, 1], 0.5 * x[:, 1]], dim=1)  # noqa: E731
    value, error, num_products = deqkit.spectral_radius(jordan, torch.ones(1, 2), rtol=0.0, return_error=True)
    assert num_products == 2 and (value - 0.5).abs() <= error


def test_products_with_the_jacobian() -> None:
    f, x, shape = tree_case()
    jacobians = dense(f, x, shape)
    jacobian = Jacobian(f, x, (), 1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        blocks = jacobian.draw(torch.randn, generator, 3)
        vector = torch.cat(blocks, dim=1)
        torch.testing.assert_close(
            torch.cat(jacobian.times(blocks), dim=1), torch.einsum("bij,bj->bi", jacobians, vector)
        )
        torch.testing.assert_close(
            torch.cat(jacobian.transposed(blocks), dim=1), torch.einsum("bji,bj->bi", jacobians, vector)
        )
    assert jacobian.num_products == 4


def test_at_the_solution_of_a_solve() -> None:
    """As one would use it: the radius explains the number of plain steps."""
    eq = tanh(n=20, batch=4, radius=0.95)
    sol = deqkit.solve(eq.f, eq.x0, args=eq.args, solver="fixed_point", rtol=1e-9, max_steps=1000)
    radius = deqkit.spectral_radius(tanh_layer, sol.value, eq.args, rtol=1e-8)
    jacobians = dense(lambda x: tanh_layer(x, *eq.args), eq.solution, (4,))
    torch.testing.assert_close(radius, true_radius(jacobians), rtol=1e-6, atol=0)
    assert (radius < 1).all() and int(sol.num_steps[radius.argmax()]) == int(sol.num_steps.max())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rtol": -1}, ValueError, "rtol must not be negative, got -1"),
        ({"rtol": "tight"}, TypeError, "rtol must be a number"),
        ({"max_products": 1}, ValueError, "max_products must be at least 2, got 1"),
        ({"history": 2}, ValueError, "history must be at least 3, got 2"),
        ({"history": 2.5}, TypeError, "history must be an integer"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator or None, got int"),
        ({"return_error": 1}, TypeError, "return_error must be True or False, got 1"),
        ({"batch_dims": -1}, ValueError, "batch_dims must not be negative"),
        ({"args": torch.zeros(1)}, TypeError, "args must be a tuple"),
        ({"f": 3}, TypeError, "f must be callable, got int"),
        ({"f": lambda x: x[:, :2]}, ValueError, "f must keep the shape of the state"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "must have a floating or complex dtype"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"f": lambda x: 0.5 * x, "x": torch.zeros(2, 3)} | settings
    f, x, args = given.pop("f"), given.pop("x"), given.pop("args", ())
    for tool in (deqkit.spectral_radius, deqkit.spectral_norm):
        with pytest.raises(error, match=message):
            tool(f, x, args, **given)


def test_bad_settings_of_the_others_are_named() -> None:
    f, x = lambda x: 0.5 * x, torch.zeros(2, 3)
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        deqkit.frobenius_norm(f, x, num_probes=0)
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        deqkit.eigenvalues(f, x, num=0)
    with pytest.raises(TypeError, match="sample must be an integer"):
        deqkit.eigenvalues(f, x, sample=1.5)  # pyright: ignore
    with pytest.raises(ValueError, match="rtol must be positive, got 0"):
        deqkit.eigenvalues(f, x, rtol=0)


def test_eigenvalues_of_a_large_state_that_f_does_not_look_at() -> None:
    c = torch.ones(2, 100)
    for f in (lambda x: c + 0 * x, lambda x: c):
        values = deqkit.eigenvalues(f, torch.zeros(2, 100), num=3)
        assert values.dtype == torch.complex128 and values.tolist() == [0, 0, 0]
