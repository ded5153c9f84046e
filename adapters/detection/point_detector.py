"""What FCOS (the paper's), ATSS and AutoAssign have in common: points of fixed stride, losses and scores in float32.

The frame is torchvision's `FCOS`: transform of images and targets, backbone, head, points, and then either
`compute_loss` or `postprocess_detections`, which are ours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.ops import batched_nms, clip_boxes_to_image

from adapters.detection.points import PointGenerator

__all__ = ["PointDetector"]

Targets = list[dict[str, Tensor]]


class PointDetector(FCOS):
    """Base of the detectors that predict one box per point. It has no losses: see `PaperFCOS`, `ATSS`, `AutoAssign`.

    Images, targets and detections are those of torchvision's detectors; class 0 is the background's and `num_classes`
    counts it.

    Args:
        backbone: Network with an attribute `out_channels` that returns a dict of level maps, finest first.
        num_classes: Number of classes with the background.
        head: What predicts from the levels: see `PointHead.forward`.
        anchor_generator: Maker of the points. Default: strides 8 to 128, for P3 to P7.
        min_size: Length of an image's shorter side after resizing, pixels.
        max_size: Limit of its longer side.
        image_mean: Mean of the images' channels. Default: ImageNet's.
        image_std: Standard deviation of the channels. Default: ImageNet's.
        size_divisible: Images are padded to multiples of this number of pixels.
        fixed_size: Size (height, width) that all images are resized to, in place of `min_size` and `max_size`.
        score_thresh: Scores that a candidate must exceed; see `rank`.
        nms_thresh: IoU above which the lesser of two boxes of a class is suppressed.
        detections_per_img: Limit of detections in an image.
        topk_candidates: Limit of candidates from one level, before suppression.

    Raises:
        TypeError: If `anchor_generator` is not a `PointGenerator`.
        ValueError: If the backbone has no `out_channels`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        head: nn.Module,
        anchor_generator: PointGenerator | None = None,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        size_divisible: int = 32,
        fixed_size: tuple[int, int] | None = None,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.6,
        detections_per_img: int = 100,
        topk_candidates: int = 1000,
    ):
        transform: dict[str, Any] = {
            "min_size": min_size, "max_size": max_size, "image_mean": image_mean, "image_std": image_std,
            "size_divisible": size_divisible, "fixed_size": fixed_size,
        }  # fmt: skip
        super().__init__(
            backbone, num_classes, **transform, anchor_generator=points_or_default(anchor_generator), head=head,
            score_thresh=score_thresh, nms_thresh=nms_thresh, detections_per_img=detections_per_img,
            topk_candidates=topk_candidates,
        )  # fmt: skip
        self.num_classes = num_classes

    def compute_loss(
        self,
        targets: Targets,
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        num_anchors_per_level: list[int],
    ) -> dict[str, Tensor]:
        """Compute the losses, in float32 or better and without autocast.

        Args:
            targets: Per image `boxes` (M, 4) and `labels` (M,), with M from 0.
            head_outputs: See `PointHead.forward`.
            anchors: Per image the squares (P, 4) of the points.
            num_anchors_per_level: Number of points of every level; their sum is P.

        Returns:
            The losses by name, each a scalar.

        Raises:
            ValueError: If a label is not below `num_classes`, or labels and boxes are not equally many.
        """
        _check_targets(targets, self.num_classes)
        outputs = {name: _full_precision(output) for name, output in head_outputs.items()}
        exact = [{"boxes": _full_precision(target["boxes"]), "labels": target["labels"]} for target in targets]
        with torch.autocast(anchors[0].device.type, enabled=False):
            return self.losses(exact, outputs, anchors, num_anchors_per_level)

    def losses(
        self,
        targets: Targets,
        outputs: dict[str, Tensor],
        squares: list[Tensor],
        level_sizes: list[int],
    ) -> dict[str, Tensor]:
        """The losses of a detector; arguments as of `compute_loss`, in float32 or better."""
        raise NotImplementedError(f"{type(self).__name__} has no losses")

    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Turn predictions into detections: the best candidates of each level, then suppression per class.

        Args:
            head_outputs: Per level what `PointHead.forward` gives for its points.
            anchors: Per image and level the squares of the points.
            image_shapes: Height and width of every image without its padding.

        Returns:
            Per image `boxes` (N, 4) in pixels, `scores` (N,) in falling order and `labels` (N,).
        """
        logits, distances, quality = (
            [_full_precision(level) for level in head_outputs[name]]
            for name in ("cls_logits", "bbox_regression", "bbox_ctrness")
        )
        detections = []
        for index, (squares, shape) in enumerate(zip(anchors, image_shapes, strict=True)):
            candidates = [
                self._candidates(logits[level][index], distances[level][index], quality[level][index], points)
                for level, points in enumerate(squares)
            ]
            boxes, scores, labels = (torch.cat(parts) for parts in zip(*candidates, strict=True))
            boxes = clip_boxes_to_image(boxes, shape)
            keep = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            detections.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
        return detections

    def _candidates(
        self, logits: Tensor, distances: Tensor, quality: Tensor, squares: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels of the best candidates of one level of one image."""
        quality = quality.sigmoid()
        ranks = self.rank(logits.sigmoid(), quality).flatten()
        (chosen,) = torch.where(ranks > self.score_thresh)
        best, order = ranks[chosen].topk(min(self.topk_candidates, len(chosen)))
        chosen = chosen[order]
        points = chosen.div(logits.shape[1], rounding_mode="floor")
        boxes = self.box_coder.decode(distances[points], squares[points])
        return boxes, self.score(best, quality[points, 0]), chosen % logits.shape[1]

    def rank(self, classes: Tensor, quality: Tensor) -> Tensor:
        """What candidates are chosen by, and what must exceed `score_thresh`: here the probability of the class.

        Args:
            classes: Probabilities (P, C).
            quality: Centerness or objectness (P, 1), between 0 and 1.

        Returns:
            Shape (P, C).
        """
        return classes

    def score(self, ranks: Tensor, quality: Tensor) -> Tensor:
        """Score (K,) of chosen candidates from their rank (K,) and quality (K,): here the geometric mean."""
        return (ranks * quality).sqrt()


def points_or_default(points: PointGenerator | None) -> PointGenerator:
    """The given maker of points, checked, or one of strides 8 to 128."""
    if not isinstance(points, PointGenerator | None):
        raise TypeError(f"anchor_generator must be a PointGenerator, got {type(points).__name__}")
    return points or PointGenerator()


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_targets(targets: Targets, num_classes: int) -> None:
    for index, target in enumerate(targets):
        boxes, labels = target["boxes"], target["labels"]
        if len(boxes) != len(labels):
            raise ValueError(f"the target of image {index} has {len(boxes)} boxes and {len(labels)} labels")
    labels = torch.cat([target["labels"] for target in targets])
    if labels.numel():
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"labels must be 0 to {num_classes - 1}, as num_classes is {num_classes}; found {wrong}")
