"""Peak memory of tensors, to the byte: what the allocator of the device has handed out and not yet got back.

On CUDA PyTorch keeps that count. On a CPU its profiler notes every allocation and release of tensor memory, those
inside operators included, and the largest sum of those not yet released is taken; what oneDNN takes without asking
PyTorch (its scratch) is not seen. What was there before the call does not count.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler would tell on stderr that it starts and stops

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MEASURED = "the measured part"


def peak_tensor_bytes(device: torch.device, prepare: Callable[[], Any], *actions: Callable[[Any], Any]) -> list[int]:
    """The largest number of bytes in tensors during each action, with all that ``prepare`` made and that still lives.

    Args:
        device: where the tensors are.
        prepare: makes what the actions work on, such as a model and its optimiser's state.
        actions: called with it, one after the other.
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
