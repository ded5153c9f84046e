"""The cost of a detector that a config file of a training describes, as a table and as json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from adapters.detection.backbones import freeze
from adapters.detection.cost import Cost, Timing
from adapters.detection.data import DataError
from adapters.detection.training import DetectorConfig
from adapters.detection.training.cli import DEFAULTS, find_recipe

__all__ = ["as_trained", "format_cost", "read_detector", "to_json"]


def read_detector(path: str, num_classes: int) -> DetectorConfig:
    """The detector of a config file; what the file leaves out is that of the recipes.

    Args:
        path: The file, or ``recipes/NAME.yaml`` for one of this package.
        num_classes: Where the file does not say.

    Raises:
        DataError: The file cannot be read or describes no detector.
    """
    try:
        settings: dict[str, Any] = {"num_classes": num_classes}
        for file in (DEFAULTS, Path(find_recipe(path))):
            settings |= _detector_settings(file)
        return DetectorConfig(**settings)
    except OSError as error:
        raise DataError(f"cannot read config file {path}: {error.strerror}") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"config file {path}: {str(error).splitlines()[0]}") from error


def _detector_settings(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise ValueError("not a config file of a training")
    parser = ArgumentParser(exit_on_error=False)
    for key in content:
        parser.add_argument(f"--{key}", type=Any)
    # Read again in the way of the training: to plain YAML 1e-2 is a word.
    model = parser.parse_path(path).get("model") or {}
    settings = model.get("detector", {}) if isinstance(model, dict) else None
    if not isinstance(settings, dict):
        raise ValueError("model.detector is no set of names and values")
    return {name: value for name, value in settings.items() if value is not None}


def as_trained(model: Any, detector: DetectorConfig) -> nn.Module:
    """The model with those layers of its backbone left untrained that a training with pretrained weights leaves."""
    if detector.frozen_norm:  # which only pretrained weights can do with
        layers = detector.trainable_backbone_layers
        freeze(model.backbone.body, 3 if layers is None else layers)
    return model


def format_cost(cost: Cost, *, random_weights: bool) -> str:
    """A table of the parts, and a line each on inference and training.

    Args:
        cost: The figures.
        random_weights: Whether to say that the weights are random, and what that means.
    """
    rows = [("", "parameters", "GMACs", "evaluations", "GMACs in all")]
    for part in cost.parts:
        often = f"{part.evaluations}" if part.evaluations > 1 else ""
        rows.append((part.name, _count(part.parameters), _giga(part.macs), often, _giga(part.total_macs)))
    rows.append(("total", _count(cost.parameters), "", "", _giga(cost.inference.macs)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    height, width = cost.input_size
    lines.insert(0, f"input {height} x {width} pixels, batches of {cost.batch_size}, {cost.device}; per image:")
    lines.append(f"trained are {_count(cost.trainable)} parameters")
    lines.append(f"inference      {_timing(cost.inference)}")
    if cost.training is not None:
        lines.append(f"training step  {_timing(cost.training)}, {_giga(cost.training.macs)} GMACs per image")
        if cost.training_evaluations:
            adjoint = f", its vector-Jacobian product {cost.backward_evaluations} times"
            lines.append(
                f"{'':15}G is evaluated {cost.training_evaluations} times{adjoint if cost.backward_evaluations else ''}"
            )
    if random_weights and any(part.evaluations > 1 for part in cost.parts):
        lines.append("weights are random: to a tolerance, trained ones may need another number of evaluations of G")
    return "\n".join(lines)


def to_json(cost: Cost, detector: DetectorConfig) -> str:
    """The figures, what they were measured on and with; MACs and parameters as plain numbers, memory in bytes."""
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    return json.dumps({"detector": asdict(detector), "cost": asdict(cost), "versions": versions}, indent=1) + "\n"


def _timing(timing: Timing) -> str:
    memory = "n/a" if timing.peak_memory is None else f"{timing.peak_memory / 2**30:.2f} GiB"
    return f"{timing.seconds:.3f} s, {timing.images_per_second:.2f} images/s, peak memory {memory}"


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M"


def _giga(macs: float) -> str:
    giga = macs / 1e9
    return f"{giga:.2f}" if giga >= 1 or giga == 0 else f"{giga:.2g}"  # a small detector's are not all 0.00
