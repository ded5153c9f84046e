"""Wall time of training steps."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import Any

import lightning as L

__all__ = ["StepTimer"]


class StepTimer(L.Callback):
    """Wall time of training steps, data loading excluded.

    Attributes:
        seconds: Of every step so far.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    @property
    def median(self) -> float:
        """Median seconds per step; NaN before the first."""
        return median(self.seconds) if self.seconds else math.nan

    def on_train_batch_start(self, *args: Any) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stops it."""
        self.seconds.append(time.perf_counter() - self._start)
