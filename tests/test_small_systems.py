"""The small systems of the quasi-Newton solvers: the inverse that grows, and elimination for ONNX, by torch.linalg."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deqkit import arrays, small_systems
from deqkit.small_systems import BorderedInverse


def systems(seed: int, n: int, batch: int, positive_definite: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(batch, n, n, dtype=torch.float64, generator=generator)
    if positive_definite:
        matrix = matrix @ matrix.mT + 0.1 * torch.eye(n, dtype=torch.float64)
    return matrix, torch.randn(batch, n, dtype=torch.float64, generator=generator)


@given(st.integers(0, 999), st.integers(1, 7), st.integers(1, 4), st.booleans())
def test_elimination(seed: int, n: int, batch: int, positive_definite: bool) -> None:
    matrix, right = systems(seed, n, batch, positive_definite)
    found, status = small_systems._eliminate(matrix, right, exchange=not positive_definite)
    expected, expected_status = small_systems.solve(matrix, right, positive_definite=positive_definite)
    assert not status.any() and not expected_status.any()
    error = (matrix @ found.unsqueeze(2)).squeeze(2) - right
    size = matrix.abs().sum((1, 2)) * found.abs().amax(1)
    assert (error.abs().amax(1) <= 1e-11 * size).all()  # backward error, whatever the condition
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positive_definite", [True, False])
def test_unsolvable_systems_leave_the_others_alone(positive_definite: bool) -> None:
    matrix, right = systems(0, 3, 5, positive_definite)
    matrix[1] = 0.0
    matrix[2] = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))  # regular, but indefinite
    for solution, status in (
        small_systems.solve(matrix, right, positive_definite=positive_definite),
        small_systems._eliminate(matrix, right, exchange=not positive_definite),
    ):
        assert status[1] != 0 and (status[2] != 0) == positive_definite
        fine = torch.tensor([0, 3, 4])
        assert not status[fine].any()
        torch.testing.assert_close((matrix @ solution.unsqueeze(2)).squeeze(2)[fine], right[fine])


def bordered(matrix: torch.Tensor, positive_definite: bool, on_host: bool) -> tuple[BorderedInverse, torch.Tensor]:
    """The inverse of the systems, and which of their rows it took in, (B, n)."""
    n = matrix.shape[1]
    inverse, good = BorderedInverse(positive_definite=positive_definite, resolution=2e-16, limit=n), []
    for k in range(n):
        row, column = matrix[:, k, : k + 1], matrix[:, : k + 1, k]
        taken = inverse.append(*(a.numpy().copy() if on_host else a for a in (row, column)))
        good.append(arrays.as_tensor(taken, matrix))
    return inverse, torch.stack(good, dim=1)


def times(inverse: BorderedInverse, right: torch.Tensor, on_host: bool) -> torch.Tensor:
    return arrays.as_tensor(inverse.solve(right.numpy() if on_host else right), right)


@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 4), st.booleans(), st.booleans())
def test_an_inverse_that_grows(seed: int, n: int, batch: int, positive_definite: bool, on_host: bool) -> None:
    matrix, right = systems(seed, n, batch, positive_definite)
    if not positive_definite:
        matrix += 4 * torch.eye(n, dtype=torch.float64)  # of no small leading minors: there is no pivoting
    inverse, good = bordered(matrix, positive_definite, on_host)
    assert good.all()
    expected = torch.linalg.solve(matrix, right)
    error = (matrix @ times(inverse, right, on_host).unsqueeze(2)).squeeze(2) - right
    assert (error.abs().amax(1) <= 1e-8 * matrix.abs().sum((1, 2)) * expected.abs().amax(1)).all()
    rows = torch.arange(batch)[1:]
    inverse.select(rows.numpy() if on_host else rows)
    torch.testing.assert_close(times(inverse, right[1:], on_host), expected[1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("positive_definite", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_an_inverse_leaves_out_what_depends_on_the_rest(positive_definite: bool, on_host: bool, scale: float) -> None:
    """A row that repeats another, or is not finite, is left out, of its own sample alone."""
    matrix, right = systems(0, 5, 4, positive_definite)
    matrix[0, 2], matrix[0, :, 2] = matrix[0, 1], matrix[0, :, 1].clone()
    matrix[0, 2, 2] = matrix[0, 1, 1]
    matrix[0, 2, 1] = matrix[0, 1, 2] = matrix[0, 1, 1]
    matrix[1, 3, 1] = matrix[1, 1, 3] = torch.nan
    matrix[2, 4, 4] = torch.inf
    matrix *= scale
    kept = torch.ones(4, 5, dtype=torch.bool)
    kept[0, 2] = kept[1, 3] = kept[2, 4] = False
    for i, k in (~kept).nonzero().tolist():
        matrix[i, k, k + 1 :] = matrix[i, k + 1 :, k] = 0.0
    inverse, good = bordered(matrix, positive_definite, on_host)
    assert torch.equal(good, kept)
    found = times(inverse, right, on_host)
    for i, rows in enumerate(kept):
        expected = torch.linalg.solve(matrix[i][rows][:, rows], right[i][rows])
        torch.testing.assert_close(scale * found[i][rows], scale * expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(found[i][~rows], right[i][~rows])


def test_an_inverse_that_is_to_be_positive_definite_takes_nothing_else() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.float64)).unsqueeze(0)
    assert bordered(matrix, True, True)[1].tolist() == [[True, False, False, True]]
    assert bordered(matrix, False, True)[1].tolist() == [[True, True, False, True]]


def test_a_zero_pivot_is_exchanged() -> None:
    matrix = torch.tensor([[[0.0, 2.0], [3.0, 0.0]]])
    found, status = small_systems._eliminate(matrix, torch.tensor([[2.0, 6.0]]), exchange=True)
    assert status.item() == 0
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.0]]))
