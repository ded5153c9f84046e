"""What every benchmark writes: the record of a run, a CSV, and tables for the terminal."""

from __future__ import annotations

import csv
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import deqkit

_PACKAGES = ("torch", "torchvision", "numpy", "pycocotools")


class DetectorError(RuntimeError):
    """A trained detector, or the data to evaluate it on, cannot be used. The message is one line."""


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run_record(device: torch.device, seed: int | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Hardware, versions, seed, command and settings of this run, ready for JSON."""
    versions = {"python": platform.python_version(), "deqkit": deqkit.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    hardware = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "seed": seed,
        "device": str(device),
        "hardware": hardware,
        "versions": versions,
        "settings": dict(settings),
    }


def describe(record: Mapping[str, Any]) -> str:
    """The record in three lines, for the head of an output."""
    hardware = record["hardware"]
    machine = f"{hardware['cpu']}, {hardware['threads']} of {hardware['cores']} cores"
    if "gpu" in hardware:
        machine = f"{hardware['gpu']}; {machine}"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    seed = "" if record["seed"] is None else f", seed {record['seed']}"
    return f"{record['command']}\n{machine}{seed}\n{versions}"


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a run's record."""
    path.write_text(json.dumps(record, indent=2, default=str) + "\n")


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Write dataclass instances of one type, one line each, with their field names as header."""
    entries = [asdict(row) for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(entries[0]))
        writer.writeheader()
        writer.writerows(entries)


def write_results(
    folder: Path, name: str, rows: Sequence[Any], record: Mapping[str, Any], plot: Callable[[Path], None] | None = None
) -> None:
    """Write rows, record and picture under one name into a folder, which is made, and say so.

    Args:
        folder: where to.
        name: of the files, without ending.
        rows: for the CSV, see `write_csv`.
        record: for the JSON.
        plot: draws the picture to a path; None: there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{name}.csv", rows)
    write_json(folder / f"{name}.json", record)
    if plot is not None:
        plot(folder / f"{name}.png")
    print(f"\nwritten: {folder}/{name}.csv, .json" + (", .png" if plot is not None else ""))


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def cells(line: Sequence[str]) -> Iterable[str]:
        return (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))

    return "\n".join("  ".join(cells(line)).rstrip() for line in lines)


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Wall time of ``action`` in seconds, what it has asked of the device included."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked, so that a clock read afterwards counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
