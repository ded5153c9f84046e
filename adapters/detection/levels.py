"""The pyramid that a detector's heads read: the names of its levels, and its maps of one image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

__all__ = ["choose_levels", "level_names", "strengths"]


def level_names(model: Any, count: int) -> list[str]:
    """The names of a detector's levels: from P2 on for the R-CNNs, from P3 on for the others."""
    first = 2 if isinstance(model, GeneralizedRCNN) else 3
    return [f"P{first + k}" for k in range(count)]


def choose_levels(names: Sequence[str], chosen: Sequence[str] | None) -> list[int]:
    """Where the chosen levels stand among ``names``; None chooses all.

    Raises:
        ValueError: There is no such level.
    """
    unknown = [name for name in chosen or () if name not in names]
    if unknown:
        raise ValueError(f"unknown level {unknown[0]!r}: choose of {list(names)}")
    return [k for k, name in enumerate(names) if not chosen or name in chosen]


@torch.no_grad()
def strengths(model: Any, image: Tensor) -> list[tuple[Tensor, float, float]]:
    """Strength of every pyramid level at every position, the norm over channels.

    Args:
        model: A detector in eval mode.
        image: Image of shape (3, H, W) in 0..1.

    Returns:
        Per level a map (H_l, W_l), and the height and the width that it covers in pixels of ``image``. Those may be
        larger than the image's: its last cells are partly padding. Cells that are nothing else are left out.
    """
    device = next(model.parameters()).device
    batch, _ = model.transform([image.to(device)])
    height, width = batch.image_sizes[0]
    levels = []
    for level in model.backbone(batch.tensors).values():
        down, across = batch.tensors.shape[2] / level.shape[2], batch.tensors.shape[3] / level.shape[3]
        rows, columns = math.ceil(height / down), math.ceil(width / across)
        strength = torch.linalg.vector_norm(level[0, :, :rows, :columns], dim=0).cpu()
        levels.append((strength, rows * down * image.shape[1] / height, columns * across * image.shape[2] / width))
    return levels
