"""The points that FCOS, ATSS and AutoAssign predict from, and the geometry of points and boxes.

Cell (i, j) of a level with stride s stands for the point (j s, i s) of the image, in pixels (x, y), without an offset
of half a stride, as in cvpods. Torchvision's detectors pass points around as the squares of side s centred on them
(left, top, right, bottom); so do these.

Deviation from `torchvision.models.detection.anchor_utils.AnchorGenerator`: strides are given, not measured as
``image size // grid size``, which makes P6 61 pixels wide instead of 64 on an image of 800x1344; and squares are
float32 whatever the dtype of the features, as bfloat16 would move them by up to 8 pixels.

Shapes: P points over all levels, M objects (boxes).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

__all__ = ["PointGenerator"]


class PointGenerator(AnchorGenerator):
    """One point per cell, with a fixed stride on every level.

    Args:
        strides: Pixels between the points of a level, finest level first.

    Raises:
        ValueError: If there are no strides or one is not positive.
    """

    def __init__(self, strides: Sequence[int] = (8, 16, 32, 64, 128)):
        if not len(strides) or any(stride <= 0 for stride in strides):
            raise ValueError(f"strides must be positive numbers of pixels, one per level, got {tuple(strides)}")
        super().__init__(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Make the points of every image.

        Args:
            image_list: The batch of images.
            feature_maps: Level maps of shape (B, C, H_l, W_l), finest first.

        Returns:
            Per image the squares (P, 4), level by level and row by row, float32. All images share one tensor.

        Raises:
            ValueError: If the number of maps is not that of the strides.
        """
        if len(feature_maps) != len(self.strides):
            raise ValueError(f"there are strides for {len(self.strides)} levels, got {len(feature_maps)} feature maps")
        sizes = [feature_map.shape[-2:] for feature_map in feature_maps]
        device = feature_maps[0].device
        levels = [_squares(h, w, stride, device) for (h, w), stride in zip(sizes, self.strides, strict=True)]
        return [torch.cat(levels)] * len(image_list.image_sizes)

    def extra_repr(self) -> str:
        """The strides, for print()."""
        return f"strides={self.strides}"


def _squares(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    x = torch.arange(width, device=device, dtype=torch.float32) * stride
    y = torch.arange(height, device=device, dtype=torch.float32) * stride
    y, x = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack((x, y), dim=-1).flatten(0, 1)
    return torch.cat((points - stride / 2, points + stride / 2), dim=-1)


def centers(boxes: Tensor) -> Tensor:
    """Centres (..., 2) of boxes (..., 4); of a point's square, the point."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def sides(squares: Tensor) -> Tensor:
    """Sides (...) of squares (..., 4), which are the strides of their points."""
    return squares[..., 2] - squares[..., 0]


def is_inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points (..., 2) lie strictly inside boxes (..., 4); the leading shapes broadcast."""
    x, y = points.unbind(-1)
    left, top, right, bottom = boxes.unbind(-1)
    return (x > left) & (y > top) & (x < right) & (y < bottom)


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) with boxes (..., 4); the leading shapes broadcast."""
    # Coordinate by coordinate: reductions over a last dimension of two take five times as long.
    left, top, right, bottom = first.unbind(-1)
    left2, top2, right2, bottom2 = second.unbind(-1)
    width = torch.minimum(right, right2) - torch.maximum(left, left2)
    height = torch.minimum(bottom, bottom2) - torch.maximum(top, top2)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    return intersection / ((right - left) * (bottom - top) + (right2 - left2) * (bottom2 - top2) - intersection)


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """Centerness of points inside boxes (FCOS, arXiv 1904.01355, Eq. 3): 1 in the middle, 0 on the edge.

    Args:
        points: Shape (K, 2), each inside its box.
        boxes: Shape (K, 4).

    Returns:
        Shape (K,).
    """
    before, after = points - boxes[:, :2], boxes[:, 2:] - points
    return (torch.minimum(before, after) / torch.maximum(before, after)).prod(-1).sqrt()
