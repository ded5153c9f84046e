"""Files and folders that exist whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Gives a path to write to, and moves what was written there to ``path`` when the block ends without an error.

    An interrupted or failed write leaves ``path`` as it was: a reader never sees half a file.

    Args:
        path: the file to create or replace; its folder is created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: str | Path) -> Iterator[Path]:
    """Gives a folder to write to, and moves what is in there to ``path`` when the block ends without an error.

    An interrupted or failed block leaves nothing behind.

    Args:
        path: a folder that is new or empty.
    """
    path = Path(path)
    was_there = path.exists()
    partial = path / ".partial"
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in partial.iterdir():
            os.replace(entry, path / entry.name)
    finally:
        shutil.rmtree(partial)
        if not was_there and not any(path.iterdir()):
            path.rmdir()
