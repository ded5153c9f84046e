"""ATSS: adaptive training sample selection (Zhang et al., arXiv 1912.02424, Algorithm 1).

The detector is FCOS (the paper's, see `PaperFCOS`) with another rule for which points are positive. A point of stride
s stands for a square anchor of side 8 s around it. Of every object, on every level, the 9 points nearest to its centre
are candidates; with the IoUs of the object and their anchors, a candidate is positive where

    IoU >= mean(IoUs of the object's candidates) + std(...)    and the point lies inside the object.

A point that is positive for several objects goes to the one with the highest IoU. All others are background; there is
no band of ignored ones. Constants are cvpods' (39.3 AP with ResNet-50, 1x): the box loss weighs 2, the distances start
from 0, candidates are ranked by their class alone.

Deviations: a level with fewer than 9 points gives all it has; the deviation of a single candidate is 0, not NaN.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.detection.point_detector import PointDetector, Targets, points_or_default
from adapters.detection.point_head import CenternessHead
from adapters.detection.points import PointGenerator, centers, is_inside, paired_iou, sides

__all__ = ["ATSS"]

_OBJECTS_AT_ONCE = 128  # bounds the distances from objects to points: 12 MB for an image of 800x1344


class ATSS(PointDetector):
    """FCOS with adaptive training sample selection.

    Args:
        backbone: Network with an attribute `out_channels` that returns a dict of level maps, finest first.
        num_classes: Number of classes with the background.
        anchor_generator: Maker of the points. Default: strides 8 to 128, for P3 to P7.
        head: The head. Default: a `CenternessHead`.
        regression_weight: Weight of the box loss; for the default head.
        deformable_head: Make the last convolution of both towers deformable (DCNv2); for the default head.
        topk: Number of candidates per object and level.
        anchor_scale: Side of a point's anchor, in strides.
        **kwargs: Further arguments of `PointDetector`.

    Raises:
        ValueError: If `topk` or `anchor_scale` is not positive.

    Example:
        >>> from adapters.detection import build_detector
        >>> model = build_detector("atss", "resnet18", "ifpn", weights_backbone=None)
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        anchor_generator: PointGenerator | None = None,
        head: nn.Module | None = None,
        regression_weight: float = 2.0,
        deformable_head: bool = False,
        topk: int = 9,
        anchor_scale: float = 8.0,
        **kwargs: Any,
    ):
        if topk < 1 or anchor_scale <= 0:
            raise ValueError(f"topk and anchor_scale must be positive, got {topk} and {anchor_scale}")
        anchor_generator = points_or_default(anchor_generator)
        head = head or CenternessHead(
            backbone.out_channels,  # type: ignore[arg-type]
            num_classes,
            num_levels=len(anchor_generator.strides),
            regression_weight=regression_weight,
            deformable=deformable_head,
        )
        super().__init__(backbone, num_classes, anchor_generator=anchor_generator, head=head, **kwargs)
        self.topk = topk
        self.anchor_scale = anchor_scale

    def losses(
        self,
        targets: Targets,
        outputs: dict[str, Tensor],
        squares: list[Tensor],
        level_sizes: list[int],
    ) -> dict[str, Tensor]:
        """Assign, then the losses of the head."""
        matched = [
            assign(points, target["boxes"], level_sizes, self.topk, self.anchor_scale)
            for points, target in zip(squares, targets, strict=True)
        ]
        return self.head.compute_loss(targets, outputs, squares, matched)  # type: ignore[operator]


@torch.no_grad()
def assign(
    squares: Tensor, boxes: Tensor, level_sizes: Sequence[int], topk: int = 9, anchor_scale: float = 8.0
) -> Tensor:
    """Choose the positive points of an image.

    Args:
        squares: The points as squares (P, 4) with their stride as side, level by level.
        boxes: The objects (M, 4), M from 0.
        level_sizes: Number of points of every level.
        topk: Number of candidates per object and level.
        anchor_scale: Side of a point's anchor, in strides.

    Returns:
        Shape (P,): the index of the object that a point is positive for, -1 for background. Among objects with equal
        IoUs the first wins; candidates at equal distances are as `torch.topk` takes them.
    """
    if not len(boxes):
        return torch.full_like(squares[:, 0], -1, dtype=torch.int64)
    points = centers(squares)
    candidates = _nearest(points, centers(boxes), level_sizes, topk)
    half = anchor_scale * sides(squares)[candidates].unsqueeze(-1) / 2
    anchors = torch.cat((points[candidates] - half, points[candidates] + half), dim=-1)
    ious = paired_iou(boxes[:, None], anchors)
    positive = _above_mean_and_deviation(ious) & is_inside(points[candidates], boxes[:, None])

    objects = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(candidates)[positive]
    claimed, ious = candidates[positive], ious[positive]
    best = ious.new_zeros(len(squares)).scatter_reduce(0, claimed, ious, "amax")
    wins = ious == best[claimed]
    nobody = len(boxes)
    matched = torch.full_like(best, nobody, dtype=torch.int64)
    matched = matched.scatter_reduce(0, claimed[wins], objects[wins], "amin")
    return matched.masked_fill(matched == nobody, -1)


def _above_mean_and_deviation(ious: Tensor) -> Tensor:
    """Where the IoUs (M, K) of an object's candidates reach their mean plus their standard deviation."""
    # Relative to the first: where all are equal, rounding must not lift the mean above them.
    ious = ious - ious[:, :1]
    threshold = ious.mean(dim=1, keepdim=True)
    if ious.shape[1] > 1:
        threshold = threshold + ious.std(dim=1, keepdim=True)
    return ious >= threshold


def _nearest(points: Tensor, objects: Tensor, level_sizes: Sequence[int], topk: int) -> Tensor:
    """Indices (M, K) of the points nearest to the centres (M, 2) of objects: `topk` of each level, or all it has."""
    starts = [sum(level_sizes[:level]) for level in range(len(level_sizes))]
    levels = list(zip(starts, points.split(list(level_sizes)), strict=True))
    chosen = []
    for some in objects.split(_OBJECTS_AT_ONCE):
        parts = []
        for start, level in levels:
            # The faster product form of the distance is off by pixels in float32.
            distances = torch.cdist(some, level.to(some), compute_mode="donot_use_mm_for_euclid_dist")
            parts.append(start + distances.topk(min(topk, len(level)), largest=False).indices)
        chosen.append(torch.cat(parts, dim=1))
    return torch.cat(chosen)
