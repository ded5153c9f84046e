"""``python -m adapters.detection export``: a checkpoint as a program for `torch.export.load`, or as ONNX."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from adapters.detection.commands import new_file
from adapters.detection.data import DataError
from adapters.detection.export import check_fixed_steps, check_onnx, export_detector, export_onnx
from adapters.detection.files import written_whole
from adapters.detection.images import read_image
from adapters.detection.training import load_checkpoint

__all__ = ["DETAILS", "export"]

DETAILS = "detector.json"
"""The extra file of an exported program: a JSON object with `image_size` and `labels`, the names of 1, 2, ..."""

_FORMATS = ("pt2", "onnx")


def export(
    checkpoint: str,
    out: str,
    format: str = "pt2",
    height: int | None = None,
    width: int | None = None,
    num_steps: int | None = None,
    batch_size: int | None = None,
    image: str | None = None,
) -> None:
    """Exports a trained detector with a fixed number of solver steps, for torch.export.load or as ONNX.

    Args:
        checkpoint: Checkpoint of a training.
        out: File to write; it must not exist.
        format: "pt2" or "onnx".
        height: Height of the images that the program takes, pixels. Default: the size that was trained with.
        width: Their width, likewise.
        num_steps: Steps of the i-FPN's solver. Default: its limit in eval mode.
        batch_size: Number of images that the program takes. Default: any.
        image: An image to measure the residual after `num_steps` on, resized to `height` and `width`. Default: noise.
    """
    path = new_file(out)
    if format not in _FORMATS:
        raise DataError(f"unknown format {format!r}: choose one of {list(_FORMATS)}")
    if format == "onnx":
        check_onnx()
    try:
        trained = load_checkpoint(checkpoint)
        side = trained.config.sizes[-1]
        size = (side if height is None else height, side if width is None else width)
        example = _example(image, size)
        program = export_detector(trained.model, size, num_steps=num_steps, batch_size=batch_size)
        steps = check_fixed_steps(trained.model, example, num_steps)
        if format == "onnx":
            export_onnx(program, path)
        else:
            save_program(
                program, path, {"image_size": size, "labels": list(trained.data.get("categories", {}).values())}
            )
    except (ValueError, TypeError) as error:
        raise DataError(str(error)) from error
    takes = f"images ({batch_size or 'B'}, 3, {size[0]}, {size[1]}), RGB from 0 to 1"
    print(f"program: {path}, {path.stat().st_size / 1e6:.1f} MB; takes {takes}")
    if steps is not None:
        print(f"on {image or 'noise'}: {steps}")
        if not steps.suffices:
            print("the program's detections will differ from the detector's: give more --num_steps")


def save_program(program: torch.export.ExportedProgram, path: Path, details: dict[str, Any]) -> None:
    """Write a program for `torch.export.load`, with details as JSON among its extra files (`DETAILS`)."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={DETAILS: json.dumps(details)})
    with written_whole(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def _example(image: str | None, size: tuple[int, int]) -> Tensor:
    """An image (1, 3, H, W), from a file or of noise."""
    if image is None:
        return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return functional.resize(read_image(image)[None], list(size), antialias=True)
