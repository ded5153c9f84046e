"""FCOS as its paper and its public code have it (arXiv 1904.01355 with the later improvements; cvpods' 38.6 AP).

A point of stride s is positive for an object if it lies inside, within 1.5 s of the object's centre on both axes, and
the farthest side of the object is between 4 s and 8 s away (finest level: from 0, coarsest: without limit). Of several
objects it goes to the smallest. Torchvision's `FCOS` is the same but for this:

    ==========================  =========================  ============================
    what                        torchvision                here
    ==========================  =========================  ============================
    regression                  relu(x)                    relu(scale_l * x), learnable
    box loss                    mean of (1 - GIoU)         weighted by centerness
    normalisers                 of each rank by itself     averaged over ranks
    strides of the points       image size // grid size    8, 16, 32, 64, 128
    score threshold             0.2, sqrt(class * ctr)     0.05, class
    the smallest of several     areas rounded to 8 pixels  exact
    ==========================  =========================  ============================
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.detection.point_detector import PointDetector, Targets, points_or_default
from adapters.detection.point_head import CenternessHead
from adapters.detection.points import PointGenerator, centers, is_inside, sides

__all__ = ["PaperFCOS"]


class PaperFCOS(PointDetector):
    """FCOS with the scales, losses, points and scores of its paper.

    Args:
        backbone: Network with an attribute `out_channels` that returns a dict of level maps, finest first.
        num_classes: Number of classes with the background.
        anchor_generator: Maker of the points. Default: strides 8 to 128, for P3 to P7.
        head: The head. Default: a `CenternessHead` from the four arguments that follow.
        level_scales: Learn a scale per level.
        weight_by_centerness: Weight a point's box loss by its centerness.
        deformable_head: Make the last convolution of both towers deformable (DCNv2).
        center_sampling_radius: A point is positive within this many strides of the centre of an object.
        **kwargs: Further arguments of `PointDetector`.

    Example:
        >>> from adapters.detection import build_detector
        >>> model = build_detector("fcos_paper", "resnet18", "ifpn", weights_backbone=None)
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        anchor_generator: PointGenerator | None = None,
        head: nn.Module | None = None,
        level_scales: bool = True,
        weight_by_centerness: bool = True,
        deformable_head: bool = False,
        center_sampling_radius: float = 1.5,
        **kwargs: Any,
    ):
        anchor_generator = points_or_default(anchor_generator)
        head = head or CenternessHead(
            backbone.out_channels,  # type: ignore[arg-type]
            num_classes,
            num_levels=len(anchor_generator.strides) if level_scales else None,
            weight_by_centerness=weight_by_centerness,
            deformable=deformable_head,
        )
        super().__init__(backbone, num_classes, anchor_generator=anchor_generator, head=head, **kwargs)
        self.center_sampling_radius = center_sampling_radius

    def losses(
        self,
        targets: Targets,
        outputs: dict[str, Tensor],
        squares: list[Tensor],
        level_sizes: list[int],
    ) -> dict[str, Tensor]:
        """Assign, then the losses of the head."""
        matched = [
            assign(points, target["boxes"], level_sizes, self.center_sampling_radius)
            for points, target in zip(squares, targets, strict=True)
        ]
        return self.head.compute_loss(targets, outputs, squares, matched)  # type: ignore[operator]


@torch.no_grad()
def assign(squares: Tensor, boxes: Tensor, level_sizes: Sequence[int], radius: float = 1.5) -> Tensor:
    """Choose the positive points of an image.

    Args:
        squares: The points as squares (P, 4) with their stride as side, level by level.
        boxes: The objects (M, 4), M from 0.
        level_sizes: Number of points of every level.
        radius: Limit of the distance to an object's centre, in strides.

    Returns:
        Shape (P,): the index of the object that a point is positive for, -1 for background.
    """
    if not len(boxes):
        return torch.full_like(squares[:, 0], -1, dtype=torch.int64)
    points, strides = centers(squares)[:, None], sides(squares)[:, None]
    near = (points - centers(boxes)).abs().amax(-1) < radius * strides
    reach = torch.maximum(points - boxes[:, :2], boxes[:, 2:] - points).amax(-1)
    low, high = 4 * strides, 8 * strides
    low[: level_sizes[0]] = 0
    high[len(high) - level_sizes[-1] :] = math.inf
    positive = near & is_inside(points, boxes) & (low < reach) & (reach < high)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    smallest, matched = areas.where(positive, math.inf).min(1)
    return matched.masked_fill(smallest.isinf(), -1)
