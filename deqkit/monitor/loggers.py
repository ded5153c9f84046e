"""L6. Where figures go: anything with ``log_metrics(figures, step)``, as Lightning's loggers have it."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Logger(Protocol):
    """What a Monitor writes to."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write the figures of one step."""
        ...


def make_loggers(logger: Any) -> list[Logger]:
    """The loggers behind what a user may give: see `deqkit.Monitor`.

    Raises:
        TypeError: it is none of those.
    """
    if logger is None:
        return []
    if isinstance(logger, list | tuple):
        return [single for item in logger for single in make_loggers(item)]
    if isinstance(logger, str | os.PathLike):
        return [CSVFile(logger)]
    if isinstance(logger, Logger):
        return [logger]
    if callable(getattr(logger, "add_scalar", None)):
        return [TensorBoard(logger)]
    raise TypeError(
        f"logger must be the path of a CSV file, a TensorBoard SummaryWriter, a Lightning logger (anything with "
        f"log_metrics) or a list of those, got {type(logger).__name__}"
    )


class TensorBoard:
    """A `torch.utils.tensorboard.SummaryWriter`, or anything else with ``add_scalar(tag, value, step)``.

    Args:
        writer: the writer.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """One scalar per figure."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)


class CSVFile:
    """A CSV file with a line per step and a column per figure.

    Figures that were not measured at a step are empty. A figure that is new gets a column of its own, for which the
    file is written anew. A file that exists is continued, as a resumed training wants it, without a last line that was
    cut short when the one before was killed.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise IsADirectoryError(f"logger must be the path of a CSV file, {self.path} is a folder")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns: list[str] | None = None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a line."""
        row: dict[str, Any] = {"step": step, **metrics}
        if self._columns is None:
            self._columns = self._columns_of_file()
        new = [name for name in row if name not in self._columns]
        if new:
            before = self._read() if self._columns else []
            self._columns += new
            temporary = self.path.with_name(self.path.name + ".new")
            self._write(temporary, "w", [*before, row])
            temporary.replace(self.path)
        else:
            self._write(self.path, "a", [row])

    def _columns_of_file(self) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
        with self.path.open(newline="") as file:
            return next(csv.reader(file), [])

    def _read(self) -> list[dict[str, Any]]:
        with self.path.open(newline="") as file:
            return [{key: row[key] for key in row if key} for row in csv.DictReader(file)]

    def _write(self, path: Path, mode: str, rows: list[dict[str, Any]] | list[Mapping[str, Any]]) -> None:
        assert self._columns is not None
        with path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self._columns)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)
