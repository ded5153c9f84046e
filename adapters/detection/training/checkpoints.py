"""Checkpoints: how they are kept, and how a detector is built again from one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from adapters.detection.training.config import DetectorConfig
from adapters.detection.training.module import SETTINGS, DetectionModule
from adapters.detection.training.schedule import Schedule

__all__ = ["MovableCheckpoint", "check_weights", "load_checkpoint", "read_checkpoint"]


class MovableCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint callback, which also knows its best score again when the run's folder was moved.

    Lightning's own forgets it then, and the first validation after a resume would write over the best checkpoint.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the state of the run that is resumed, with the paths of today."""
        before, now = str(state_dict.get("dirpath") or ""), str(self.dirpath or "")
        if before and now and before != now:

            def moved(value: Any) -> Any:
                if isinstance(value, dict):
                    return {moved(key): moved(entry) for key, entry in value.items()}
                inside = isinstance(value, str) and value.startswith(before)
                return now + value.removeprefix(before) if inside else value

            state_dict = moved(state_dict)
        super().load_state_dict(state_dict)


def load_checkpoint(path: str | Path) -> DetectionModule:
    """The module of a checkpoint, in eval mode on the CPU.

    Args:
        path: a checkpoint that Lightning wrote for a `DetectionModule`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of a `DetectionModule`, or damaged.
    """
    content = read_checkpoint(path)
    settings = content[SETTINGS]
    try:
        detector, schedule = DetectorConfig(**settings["detector"]), Schedule(**settings["schedule"])
        module = DetectionModule(detector, schedule, data=settings["data"])
    except Exception as error:  # whatever a foreign file may bring
        raise ValueError(f"{path} is not a checkpoint of a DetectionModule: {_line(error)}") from error
    check_weights(path, content["state_dict"], module)
    module.load_state_dict(content["state_dict"])
    return module.eval()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint; its tensors stay in the file until they are used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or is not one of a `DetectionModule`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint not found: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not a checkpoint of a DetectionModule: it holds more than plain data") from error
    except Exception as error:  # what is said of such a file is about zip archives, mostly
        size = path.stat().st_size
        raise ValueError(f"{path} is not a checkpoint, or is damaged or cut off ({size} bytes)") from error
    missing = [key for key in (SETTINGS, "state_dict") if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of a DetectionModule: it has no {missing[0]!r}")
    return content


def check_weights(path: str | Path, state: dict[str, Tensor], module: DetectionModule) -> None:
    """Refuses weights that are not those of the module's detector.

    Raises:
        ValueError: a weight is missing, is one too many, or has another shape; the message names the first.
    """
    wanted, config = module.state_dict(), module.config
    odd = {
        "lacks": [name for name in wanted if name not in state],
        "also has": [name for name in state if name not in wanted],
        "has another shape of": [n for n in wanted if n in state and state[n].shape != wanted[n].shape],
    }
    for what, names in odd.items():
        if names:
            detector = f"{config.detector} with {config.backbone} and {config.neck}"
            raise ValueError(f"{path} does not fit this detector, {detector}: it {what} {names[0]} ({len(names)} such)")


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
