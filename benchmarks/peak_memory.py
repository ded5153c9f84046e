"""The most memory that a piece of work holds at once, to the byte, beyond what was held before it.

On CUDA PyTorch's allocator keeps that peak. On a CPU the profiler notes every allocation and release of tensor memory,
those inside operators included, and the largest sum of what is not yet released is taken; scratch space that MKL and
oneDNN take from the system is not seen.

`python -m adapters.detection cost` reads the resident memory of the process instead, which holds everything, a
detector's workspaces included, but in pages and with the reserves of the C library: a state of 64 KiB cannot be seen in
it.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read once, when the profiler starts for the first time

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MEASURED = "the measured part"


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
    traced = 0

    def acting(_: None) -> None:
        nonlocal traced
        if not numpy:
            action()
            return
        tracemalloc.start()
        try:
            action()
            traced = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return peak_tensor_bytes(device, lambda: None, acting)[0] + traced


def peak_tensor_bytes(device: torch.device, prepare: Callable[[], Any], *actions: Callable[[Any], Any]) -> list[int]:
    """The largest number of bytes in tensors during each action, with all that ``prepare`` made and that still lives.

    Args:
        device: where the tensors are.
        prepare: makes what the actions work on, such as a model and its optimiser's state.
        actions: called with it, one after the other; none may use the profiler.

    Raises:
        RuntimeError: the profiler of this build of PyTorch does not record memory.
    """
    gc.collect()
    return (_on_cuda if device.type == "cuda" else _on_cpu)(device, prepare, actions)


def _on_cuda(device: torch.device, prepare: Callable[[], Any], actions: Iterable[Callable[[Any], Any]]) -> list[int]:
    before = torch.cuda.memory_allocated(device)
    subject = prepare()
    peaks = []
    for action in actions:
        torch.cuda.reset_peak_memory_stats(device)
        action(subject)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    return peaks


def _on_cpu(device: torch.device, prepare: Callable[[], Any], actions: Iterable[Callable[[Any], Any]]) -> list[int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        torch.empty(1)  # taken and given back, to be seen where memory is recorded at all
        subject = prepare()
        for action in actions:
            with record_function(MEASURED):
                action(subject)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        return _peaks(json.loads(path.read_text())["traceEvents"])


def _peaks(events: Sequence[Mapping[str, Any]]) -> list[int]:
    """The largest sum of live blocks in each measured part of a trace."""
    blocks = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    if not blocks:
        raise RuntimeError("the profiler of this build of PyTorch does not record memory: the peak is not known")
    live: dict[int, int] = {}
    total, course = 0, []
    for event in sorted(blocks, key=lambda e: e["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        total -= live.pop(address, 0)  # a block from before the recording has no entry
        if size > 0:
            live[address] = size
            total += size
        course.append((event["ts"], total))
    parts = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == MEASURED and e.get("ph") == "X")
    peaks = []
    for start, end in parts:
        at_start = [total for when, total in course if when < start][-1:]
        peaks.append(max([*at_start, *(total for when, total in course if start <= when <= end)], default=0))
    return peaks
