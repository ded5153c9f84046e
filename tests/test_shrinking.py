"""What has ended costs no more: the solver's arithmetic shrinks with the batch, and f does where that is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deqkit
from deqkit import linalg
from deqkit.nn import FixedPoint, VariationalDropout

N, WIDTH = 24, 1024
SOLVERS = [
    deqkit.FixedPointIteration(),
    deqkit.Anderson(),
    deqkit.Anderson(history=3),
    deqkit.Anderson(type=1, mixing=0.8),
    deqkit.Broyden(),
    deqkit.Broyden(variant="bad"),
    deqkit.Broyden(line_search=3),
    deqkit.NewtonKrylov(),
    deqkit.Auto(),
]


def batch(*, hard: float = 0.97) -> tuple[Tensor, dict[str, Tensor]]:
    """Start and arguments of maps whose radii go from 0 to ``hard``: easy samples, and some that take long."""
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(N, WIDTH, generator=generator, dtype=torch.float64)
    scale = torch.cat([torch.full((N - 4,), 0.1), torch.linspace(0.5, hard, 4)]).double().unsqueeze(1)
    return torch.zeros(N, WIDTH, dtype=torch.float64), {"b": b, "scale": scale}


def f(x: Tensor, sample: dict[str, Tensor]) -> Tensor:
    return sample["scale"] * torch.sin(x.roll(1, 1)) + sample["b"]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_each_sample_fares_as_if_it_were_alone(solver: deqkit.Solver) -> None:
    x0, sample = batch()
    settings: dict[str, Any] = {"solver": solver, "rtol": 1e-6, "max_steps": 300, "on_failure": "ignore"}
    sizes: list[int] = []

    def counting(x: Tensor, sample: dict[str, Tensor]) -> Tensor:
        sizes.append(len(x))
        assert len(sample["b"]) == len(x)
        return f(x, sample)

    with torch.no_grad():
        together = deqkit.solve(f, x0, args=(sample,), trace=True, **settings)
        narrowed = deqkit.solve(counting, x0, args=(sample,), sample_args=(0,), trace=True, **settings)
    assert together.converged.all() and together.num_steps.max() > 2 * together.num_steps.min() > 0
    assert narrowed.num_fn_evals == len(sizes) == together.num_fn_evals
    assert sizes[0] == N and sorted(sizes, reverse=True) == sizes and sizes[-1] <= 4
    for i in (0, N - 1):
        alone = deqkit.solve(f, x0[i : i + 1], args=({k: v[i : i + 1] for k, v in sample.items()},), **settings)
        for found in (together, narrowed):
            assert found.num_steps[i] == alone.num_steps[0] and found.status[i] == alone.status[0]
            torch.testing.assert_close(found.value[i], alone.value[0], rtol=1e-12, atol=1e-12)
    for name in ("value", "residual", "num_steps", "status", "trace"):
        torch.testing.assert_close(getattr(narrowed, name), getattr(together, name), equal_nan=True)


@pytest.mark.parametrize("solver", [deqkit.Anderson(), deqkit.Broyden()], ids=str)
def test_the_solver_computes_for_those_still_being_solved(
    solver: deqkit.Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    x0, sample = batch()
    sizes: list[int] = []
    push = linalg.History.push
    monkeypatch.setattr(linalg.History, "push", lambda self, *args: sizes.append(len(args[0][0])) or push(self, *args))
    with torch.no_grad():
        deqkit.solve(f, x0, args=(sample,), solver=solver, rtol=1e-6)
    assert sizes[0] == N and sizes[-1] <= 4


def test_small_states_are_left_together() -> None:
    """To pick samples out at every step would take longer than to compute for all."""
    x0, sample = batch()
    sizes: list[int] = []

    def counting(x: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        sizes.append(len(x))
        return scale * torch.sin(x) + b

    deqkit.solve(counting, x0[:, :3], args=(sample["b"][:, :3], sample["scale"]))
    assert set(sizes) == {N}


def test_gradients_are_those_of_the_whole_batch() -> None:
    x0, sample = batch(hard=0.9)
    found = []
    for sample_args in (None, (0,)):
        given = {k: v.clone().requires_grad_() for k, v in sample.items()}
        sol = deqkit.solve(f, x0, args=(given,), rtol=1e-10, max_steps=200, sample_args=sample_args)
        found.append(torch.autograd.grad(sol.value.square().sum(), list(given.values())))
    torch.testing.assert_close(*found)


def test_structures_and_memory_formats() -> None:
    """A pytree with a channels_last leaf and a half-precision one, an auxiliary output, and what a callback is told."""
    x0 = (torch.zeros(6, 4, 3, 3).to(memory_format=torch.channels_last), torch.zeros(6, 2, dtype=torch.float16))
    scale, shapes = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.9]), set()

    def g(x: tuple[Tensor, Tensor], scale: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        a, b = x
        assert a.is_contiguous(memory_format=torch.channels_last) and b.dtype == torch.float16 and len(a) == len(b)
        shapes.add(len(a))
        return (scale.view(-1, 1, 1, 1) * a.cos() + 1, (scale.unsqueeze(1) * b.float()).half() + 1), a.sum()

    told = []
    settings: dict[str, Any] = {"args": (scale,), "has_aux": True, "keep": (0, 3), "solver": "fixed_point"}
    settings |= {"rtol": 1e-2, "callback": lambda info: told.append(info.value[0].shape)}
    whole, narrowed = (deqkit.solve(g, x0, sample_args=s, **settings) for s in (None, (0,)))
    assert min(shapes) < 3 and set(told) == {torch.Size([6, 4, 3, 3])}
    for name in ("value", "states", "num_steps", "aux"):
        torch.testing.assert_close(getattr(narrowed, name), getattr(whole, name))


def test_samples_that_fail_do_not_disturb_the_others() -> None:
    x0, sample = batch()
    sample["b"][0, 0] = torch.nan
    sample["scale"][1] = 1e6
    sol = deqkit.solve(f, x0, args=(sample,), sample_args=(0,), rtol=1e-6, max_steps=300, on_failure="ignore")
    assert sol.status[0] == deqkit.Status.NONFINITE and not sol.converged[1] and sol.converged[2:].all()
    assert sol.value.isfinite().all()


def test_a_module_hands_it_on() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[int] = []

        def forward(self, x: Tensor, sample: dict[str, Tensor]) -> Tensor:
            self.sizes.append(len(x))
            return f(x, sample)

    x0, sample = batch()
    layer = FixedPoint(Cell(), sample_args=(0,))
    with torch.no_grad():
        layer(x0, sample)
    assert layer.module.sizes[0] == N and layer.module.sizes[-1] <= 4  # pyright: ignore


@pytest.mark.parametrize("num_samples", [1, N])
def test_masks_are_refused(num_samples: int) -> None:
    """Whether or not there are samples to let go: a setting that fails for some batches alone would be found late."""
    x0, sample = batch()
    x0, sample = x0[:num_samples], {k: v[:num_samples] for k, v in sample.items()}
    drop = VariationalDropout(0.2)
    with pytest.raises(NotImplementedError, match="VariationalDropout"):
        deqkit.solve(lambda x, s: f(drop(x), s), x0, args=(sample,), sample_args=(0,))


def test_a_callback_is_told_how_samples_ended_that_were_let_go() -> None:
    """f is not called on them any more: they have no residual of zero for that."""
    x0, sample = batch()
    told: list[deqkit.StepInfo] = []
    settings: dict[str, Any] = {"args": (sample,), "solver": "fixed_point", "rtol": 1e-6, "max_steps": 600}
    sol = deqkit.solve(f, x0, sample_args=(0,), callback=told.append, **settings)
    last = told[-1]
    assert last.active.sum() <= 4 and (sol.residual > 0).all()
    torch.testing.assert_close(last.residual, sol.residual)
    torch.testing.assert_close(last.relative_residual, sol.relative_residual)


SOME = [*SOLVERS[1:7], deqkit.Anderson(type=1, history=2), deqkit.Broyden(history=2), deqkit.Anderson(ridge=0.0)]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("sample_args", [None, (0,)])
@pytest.mark.parametrize("solver", SOME, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_books_on_the_host_keep_quiet(
    solver: deqkit.Solver, dtype: torch.dtype, sample_args: tuple[int, ...] | None
) -> None:
    """NumPy warns of what is not finite, and such samples are the solver's business alone."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(8, 6, 6, generator=generator, dtype=dtype) / 6**0.5
    matrix *= torch.linspace(0.0, 3.0, 8, dtype=dtype).view(-1, 1, 1)
    b = torch.randn(8, 6, generator=generator, dtype=dtype)
    b[0] *= 1e30
    b[1, 0], b[2, 0] = torch.nan, torch.inf

    def g(x: Tensor, sample: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        matrix, b, number = sample
        y = torch.einsum("bij,bj->bi", matrix, x) + b
        for i, other in {3: y * 1e30, 4: 1 / x, 6: torch.sqrt(x - 0.5)}.items():
            y = torch.where((number == i).unsqueeze(1), other, y)
        return y

    x0, args = torch.full((8, 6), 0.7, dtype=dtype), ((matrix, b, torch.arange(8)),)
    with torch.no_grad():
        sol = deqkit.solve(g, x0, args=args, solver=solver, max_steps=40, sample_args=sample_args, on_failure="ignore")
    assert sol.status[1] == sol.status[2] == deqkit.Status.NONFINITE and sol.converged[0]
    assert sol.value.isfinite().all()


@pytest.mark.parametrize(
    ("sample_args", "args", "error", "message"),
    [
        (0, (torch.ones(3),), TypeError, "must be positions in args"),
        ("0", (torch.ones(3),), TypeError, "must be positions in args"),
        ((1.5,), (torch.ones(3),), TypeError, "must be an integer"),
        ((-1,), (torch.ones(3),), ValueError, "must not be negative"),
        ((1,), (torch.ones(3),), ValueError, "names position 1, but args has 1"),
        ((0,), (torch.ones(2),), ValueError, r"args\[0\] must be a tensor of 3 samples, got \(2,\)"),
        ((0,), ({"a": 1.0},), ValueError, r"args\[0\]\['a'\] must be a tensor of 3 samples, got float"),
    ],
)
def test_bad_settings(sample_args: Any, args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        deqkit.solve(lambda x, a: x / 2, torch.zeros(3, 2), args=args, sample_args=sample_args)


def test_it_knows_samples_by_one_dim() -> None:
    with pytest.raises(ValueError, match="batch_dims=1"):
        deqkit.solve(lambda x: x / 2, torch.zeros(3, 2, 2), batch_dims=2, sample_args=())


def test_a_forgotten_position_is_told_of() -> None:
    """f then meets arguments of the whole batch, and PyTorch alone would speak of sizes that do not fit."""
    gain, shift = torch.linspace(0.1, 0.95, 8).unsqueeze(1), torch.ones(8, 4)
    with pytest.raises(RuntimeError, match="size of tensor") as caught:
        deqkit.solve(
            lambda x, g, s: g * x + s, torch.zeros(8, 4), args=(gain, shift), sample_args=(0,), solver="fixed_point"
        )
    assert any("it must name every argument that belongs to samples" in note for note in caught.value.__notes__)
