"""The small systems of the quasi-Newton solvers: elimination, for ONNX, against the factorisations of torch.linalg."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deqkit import small_systems


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


def test_a_zero_pivot_is_exchanged() -> None:
    matrix = torch.tensor([[[0.0, 2.0], [3.0, 0.0]]])
    found, status = small_systems._eliminate(matrix, torch.tensor([[2.0, 6.0]]), exchange=True)
    assert status.item() == 0
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.0]]))
