"""L1. The warning and the error of a solve that fell short."""

from __future__ import annotations

from typing import Any


class ConvergenceWarning(UserWarning):
    """Some samples of a solve, or of the adjoint solve in a backward pass, did not converge."""


class ConvergenceError(RuntimeError):
    """The same as `ConvergenceWarning`, under ``on_failure="raise"``.

    Attributes:
        solution: the `Solution` (or the `AdjointStats`, from a backward pass) that fell short.
    """

    def __init__(self, message: str, solution: Any = None) -> None:
        super().__init__(message)
        self.solution = solution
