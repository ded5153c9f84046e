"""Peak memory: of tensors on an accelerator, of the process on a CPU."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch

__all__ = ["PeakMemory"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Reads the largest memory in use since the last `reset`.

    On CUDA that is what the allocator has handed out. On a CPU under Linux it is the resident memory of the process,
    beyond that when this object was made. Elsewhere it is not known.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        _give_back()
        self.device = device
        self._base = _resident("VmRSS") if device.type == "cpu" else None

    def reset(self) -> None:
        """Starts anew."""
        _give_back()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._base is not None:
            try:
                _CLEAR.write_text("5")  # man 5 proc: resets the peak of the resident memory
            except OSError:
                self._base = None

    def peak(self) -> int | None:
        """The largest number of bytes since, None where it cannot be known."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = _resident("VmHWM")
        return None if peak is None or self._base is None else max(0, peak - self._base)


def _give_back() -> None:
    """Returns memory that nobody uses: what is taken out of such a reserve later would not be seen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _STATUS.exists() else None
    if trim is not None:  # glibc's
        trim(0)


def _resident(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
