"""The most memory that a piece of work holds at once, to the byte, beyond what was held before it.

On a CPU every allocation and every release that PyTorch's allocator makes is taken from the profiler and summed up; on
CUDA the allocator keeps that peak itself. Temporaries inside an operation count, scratch space that MKL and oneDNN take
from the system does not.

`python -m adapters.detection cost` reads the resident memory of the process instead, which holds everything, a
detector's workspaces included, but in pages and with the reserves of the C library: a state of 64 KiB cannot be seen in
it.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read once, when the profiler starts for the first time

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(action: Callable[[], Any], device: torch.device, *, numpy: bool = False) -> int:
    """The largest number of bytes that ``action`` holds at once; what it returns counts until it has returned.

    Args:
        action: what to do; it must not use the profiler.
        device: where its tensors are.
        numpy: whether it keeps its numbers in NumPy arrays: the largest number of bytes that these and Python's objects
            take is added, so that the sum is a bound from above where both peaks are not at the same time.

    Raises:
        RuntimeError: the profiler of this build of PyTorch does not record memory.
    """
    if numpy:
        tracemalloc.start()
        try:
            tensors = _of_tensors(action, device)
            return tensors + tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    return _of_tensors(action, device)


def _of_tensors(action: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.empty(1)  # taken and given back, to be seen where memory is recorded at all
        action()
    results: Any = profiled.profiler.kineto_results if profiled.profiler is not None else None
    changes = [event for event in results.events() if event.name() == "[memory]"] if results is not None else []
    if not changes:
        raise RuntimeError("the profiler of this build of PyTorch does not record memory: the peak is not known")
    live = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    return peak
