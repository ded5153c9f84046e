"""Checkpoints: how they are kept, and how a detector is built again from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from adapters.detection.training.config import DetectorConfig
from adapters.detection.training.module import SETTINGS, DetectionModule
from adapters.detection.training.schedule import Schedule

__all__ = ["MovableCheckpoint", "load_checkpoint"]


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
        ValueError: not a checkpoint of a `DetectionModule`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint not found: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        settings, state = content[SETTINGS], content["state_dict"]
        detector, schedule = DetectorConfig(**settings["detector"]), Schedule(**settings["schedule"])
        module = DetectionModule(detector, schedule, data=settings["data"])
        module.load_state_dict(state)
    except Exception as error:  # whatever a foreign file may bring
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of a DetectionModule: {reason}") from error
    return module.eval()
