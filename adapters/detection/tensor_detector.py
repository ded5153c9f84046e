"""Torchvision's detectors as a function of tensors of fixed sizes: what can be exported.

Images come in as one tensor of a size that is set when the function is made; all that follows from it (the size after
resizing, padding, anchors, how many candidates there are) is then known. Where torchvision selects by a mask, a score
of -1 marks what is left out here, and detections are padded to `detections_per_img`. What is kept is the same, in the
same order.

Suppression is greedy like torchvision's, for a batch at once: `limit` times the best box is taken, and with it those of
its class go that overlap it. Deviation: torchvision shifts the boxes of class c by c times the largest coordinate if
there are at most 1000 (on a CPU) and calls its kernel once. In float32 that rounds coordinates, by up to 0.008 pixels
for 90 classes on 1300 pixels, so that a pair whose overlap is the threshold to 1e-3 may be decided differently.

Shapes: B images, N candidates, K chosen ones, C classes with the background.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops import boxes as box_ops

from adapters.detection.data.image_files import is_too_thin
from adapters.detection.necks import ImplicitFPN
from adapters.detection.point_detector import PointDetector

__all__ = ["TensorDetector"]

_LEFT_OUT = -1.0  # a score that no detection has
_NO_LABEL = -1
Candidates = tuple[Tensor, Tensor, Tensor]  # boxes (B, N, 4), scores (B, N), labels (B, N)


class TensorDetector(nn.Module):
    """A detector that takes a batch of images of one size as a tensor and returns padded detections.

    Args:
        detector: RetinaNet, FCOS, `PaperFCOS`, `ATSS`, `AutoAssign` or Faster R-CNN, in eval mode. It becomes part of
            the module as it is.
        image_size: Height and width of the images, pixels.

    Raises:
        TypeError: The detector is none of these, or has its own ways of turning predictions into detections.
        ValueError: It is in training mode or not in float32 or float64, or `image_size` is not two positive numbers or
            too thin to be resized.
    """

    mean: Tensor
    std: Tensor
    to_original: Tensor

    def __init__(self, detector: nn.Module, image_size: tuple[int, int]):
        super().__init__()
        _check_size(image_size)
        make_candidates = _maker_of(detector)
        like = next(detector.parameters())
        if detector.training:
            raise ValueError("the detector must be in eval mode: call eval() first")
        if like.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the detector's weights must be float32 or float64, got {like.dtype}")
        self.detector: Any = detector
        if is_too_thin(*image_size, self.detector.transform.max_size):
            raise ValueError(
                f"image_size {tuple(image_size)} is too thin: resized to at most {self.detector.transform.max_size} "
                "pixels, nothing is left of its shorter side"
            )
        self.image_size = tuple(image_size)
        with torch.no_grad():
            image_list, _ = self.detector.transform([like.new_zeros(3, *image_size)])
            self.size: tuple[int, int] = image_list.image_sizes[0]
            self.padded_size: tuple[int, int] = tuple(image_list.tensors.shape[-2:])
            self._tell_sizes(1)
            features = list(self.detector.backbone(image_list.tensors).values())
            self.candidates = make_candidates(self.detector, image_list, features, self.size)
        transform = self.detector.transform
        self.register_buffer("mean", like.new_tensor(transform.image_mean)[:, None, None])
        self.register_buffer("std", like.new_tensor(transform.image_std)[:, None, None])
        height, width = (like.new_tensor(a) / b for a, b in zip(image_size, self.size, strict=True))
        self.register_buffer("to_original", torch.stack((width, height, width, height)))
        settings = self.detector.roi_heads if isinstance(detector, FasterRCNN) else self.detector
        self.iou_threshold, self.limit = settings.nms_thresh, settings.detections_per_img

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Detect.

        Args:
            images: Shape (B, 3, H, W), RGB from 0 to 1, of the set size.

        Returns:
            `boxes` (B, K, 4) in pixels of the given images, `scores` (B, K) in falling order, `labels` (B, K) and
            `num_detections` (B,), where K is the detector's `detections_per_img`. From `num_detections` on boxes and
            scores are 0 and labels -1.
        """
        x = (images - self.mean) / self.std
        if self.size != self.image_size:
            x = F.interpolate(x, size=self.size, mode="bilinear", align_corners=False)
        (height, width), (padded_height, padded_width) = self.size, self.padded_size
        x = F.pad(x, (0, padded_width - width, 0, padded_height - height))
        self._tell_sizes(images.shape[0])
        boxes, scores, labels = self.candidates(list(self.detector.backbone(x).values()))
        chosen, scores = suppress(boxes, scores, labels, self.iou_threshold, self.limit)
        found = scores > _LEFT_OUT
        return {
            "boxes": (gather_rows(boxes, chosen) * self.to_original).where(found.unsqueeze(-1), 0.0),
            "scores": scores.where(found, 0.0),
            "labels": labels.gather(1, chosen).where(found, _NO_LABEL),
            "num_detections": found.sum(1),
        }

    def _tell_sizes(self, batch: int) -> None:
        """What the transform, which does not run here, would tell a neck that masks the padding."""
        neck = getattr(self.detector.backbone, "fpn", None)
        if isinstance(neck, ImplicitFPN) and neck.mask_padding:
            neck.set_image_sizes([self.size] * batch, self.padded_size)


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, limit: int) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression per label, of every image of a batch.

    Args:
        boxes: Shape (B, N, 4).
        scores: Shape (B, N); -1 for what is left out.
        labels: Shape (B, N).
        iou_threshold: IoU above which the lesser of two boxes of a label goes.
        limit: How many to choose.

    Returns:
        Indices and scores (B, limit) of what is left, by falling score; where there are no more, the score is -1.
    """
    from torch._higher_order_ops.scan import scan  # a loop of the exported program; unrolled it would be 2400 nodes

    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    threshold = scores.new_full((), iou_threshold)  # scan takes no numbers that change from call to call

    def choose(scores: Tensor, _: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        best = scores.argmax(1, keepdim=True)
        box = gather_rows(boxes, best)
        low = torch.maximum(box[..., :2], boxes[..., :2])
        high = torch.minimum(box[..., 2:], boxes[..., 2:])
        intersection = (high - low).clamp(min=0).prod(-1)
        iou = intersection / (areas.gather(1, best) + areas - intersection)
        goes = (iou > threshold) & (labels == labels.gather(1, best))
        # A box without an area overlaps nothing, itself included: it goes by its index.
        left = scores.masked_fill(goes, _LEFT_OUT).scatter(1, best, _LEFT_OUT)
        return left, (best.squeeze(1), scores.gather(1, best).squeeze(1))

    _, (chosen, top) = scan(choose, scores.clone(), scores.new_zeros(limit))  # pyright: ignore[reportGeneralTypeIssues]
    return chosen.transpose(0, 1), top.transpose(0, 1)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, D) of x (B, N, D) at the indices (B, K)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class OneStageCandidates(nn.Module):
    """The best candidates of every level of RetinaNet, FCOS and the detectors of points.

    Args:
        detector: The detector.
        image_list: An image of the set size.
        features: Its level maps.
        size: Height and width of the image without its padding.
    """

    anchors: Tensor

    def __init__(self, detector: Any, image_list: Any, features: list[Tensor], size: tuple[int, int]):
        super().__init__()
        # The head is the detector's, and must not be registered a second time.
        self._parts = (detector.head, detector.box_coder)
        self.size, self.score_thresh, self.topk = size, detector.score_thresh, detector.topk_candidates
        self.rank, self.score = _rank_and_score(detector)
        anchors = detector.anchor_generator(image_list, features)[0]
        cells = [feature.shape[-2] * feature.shape[-1] for feature in features]
        self.level_sizes = [n * len(anchors) // sum(cells) for n in cells]
        self.register_buffer("anchors", anchors)

    def forward(self, features: list[Tensor]) -> Candidates:
        """Candidates from the level maps."""
        head, coder = self._parts
        outputs = {name: output.split(self.level_sizes, dim=1) for name, output in head(features).items()}
        found: list[Candidates] = []
        for level, anchors in enumerate(self.anchors.split(self.level_sizes)):
            logits, codes = outputs["cls_logits"][level], outputs["bbox_regression"][level]
            quality = outputs["bbox_ctrness"][level].sigmoid() if "bbox_ctrness" in outputs else logits[..., :1]
            classes = logits.shape[-1]
            ranks = self.rank(logits.sigmoid(), quality).flatten(1)
            ranks = ranks.where(ranks > self.score_thresh, _LEFT_OUT)
            best, order = ranks.topk(min(self.topk, ranks.shape[1]))
            at = order.div(classes, rounding_mode="floor")
            scores = self.score(best, quality.squeeze(-1).gather(1, at)).where(best > _LEFT_OUT, _LEFT_OUT)
            decode = coder.decode_single if hasattr(coder, "decode_single") else coder.decode
            boxes = decode(gather_rows(codes, at).flatten(0, 1), anchors[at].flatten(0, 1))
            boxes = box_ops.clip_boxes_to_image(boxes, self.size).unflatten(0, (-1, at.shape[1]))
            found.append((boxes, scores, order % classes))
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return boxes, scores, labels


def _rank_and_score(
    detector: nn.Module,
) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """By what candidates are chosen, and their score: see `PointDetector.rank` and `PointDetector.score`."""
    if isinstance(detector, PointDetector):
        return detector.rank, detector.score
    if isinstance(detector, FCOS):
        return lambda classes, quality: (classes * quality).sqrt(), lambda ranks, quality: ranks
    return lambda classes, quality: classes, lambda ranks, quality: ranks


class TwoStageCandidates(nn.Module):
    """Proposals, their classes and their boxes: Faster R-CNN.

    Every proposal is pooled from all levels and its own is taken, as the number of those of a level is not known.

    Args:
        detector: The detector.
        image_list: An image of the set size.
        features: Its level maps.
        size: Height and width of the image without its padding.
    """

    anchors: Tensor

    def __init__(self, detector: Any, image_list: Any, features: list[Tensor], size: tuple[int, int]):
        super().__init__()
        self._parts = (detector.rpn, detector.roi_heads)
        self.size = size
        self.names = list(detector.backbone(image_list.tensors))
        pooler = detector.roi_heads.box_roi_pool
        detector.roi_heads.box_roi_pool(  # sets its scales, by the image without its padding
            dict(zip(self.names, features, strict=True)), [features[0].new_tensor([[0.0, 0.0, 8.0, 8.0]])], [size]
        )
        self.scales, self.mapper = pooler.scales, pooler.map_levels
        anchors = detector.rpn.anchor_generator(image_list, features)[0]
        per_cell = detector.rpn.anchor_generator.num_anchors_per_location()
        self.level_sizes = [f.shape[-2] * f.shape[-1] * n for f, n in zip(features, per_cell, strict=True)]
        self.register_buffer("anchors", anchors)

    def forward(self, features: list[Tensor]) -> Candidates:
        """Candidates from the level maps."""
        _, heads = self._parts
        proposals, exists = self._propose(features)
        pooled = self._pool(features, proposals)
        logits, codes = heads.box_predictor(heads.box_head(pooled))
        boxes = heads.box_coder.decode_single(codes, proposals.flatten(0, 1))
        boxes = box_ops.clip_boxes_to_image(boxes.unflatten(1, (-1, 4)), self.size)[:, 1:]
        scores = logits.softmax(-1)[:, 1:]
        good = (scores > heads.score_thresh) & _has_sides(boxes, 1e-2) & exists.reshape(-1, 1)
        scores = scores.where(good, _LEFT_OUT)
        labels = torch.arange(1, logits.shape[1], device=logits.device).expand_as(scores)
        count = proposals.shape[1]
        return (
            boxes.unflatten(0, (-1, count)).flatten(1, 2),
            scores.unflatten(0, (-1, count)).flatten(1),
            labels.unflatten(0, (-1, count)).flatten(1),
        )

    def _propose(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Proposals (B, K, 4), and which of them there are (B, K)."""
        rpn, _ = self._parts
        objectness, codes = concat_box_prediction_layers(*rpn.head(features))
        objectness = objectness.reshape(features[0].shape[0], -1)
        codes = codes.reshape(features[0].shape[0], -1, 4)
        found: list[Candidates] = []
        levels = zip(
            *(part.split(self.level_sizes, dim=1) for part in (objectness, codes)),
            self.anchors.split(self.level_sizes),
            strict=True,
        )
        for level, (logits, code, anchors) in enumerate(levels):
            best, at = logits.topk(min(rpn.pre_nms_top_n(), logits.shape[1]))
            boxes = rpn.box_coder.decode_single(gather_rows(code, at).flatten(0, 1), anchors[at].flatten(0, 1))
            boxes = box_ops.clip_boxes_to_image(boxes, self.size).unflatten(0, (-1, at.shape[1]))
            scores = best.sigmoid()
            good = (scores >= rpn.score_thresh) & _has_sides(boxes, rpn.min_size)
            found.append((boxes, scores.where(good, _LEFT_OUT), torch.full_like(at, level)))
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        limit = min(rpn.post_nms_top_n(), scores.shape[1])
        chosen, scores = suppress(boxes, scores, labels, rpn.nms_thresh, limit)
        return gather_rows(boxes, chosen), scores > _LEFT_OUT

    def _pool(self, features: list[Tensor], proposals: Tensor) -> Tensor:
        """Maps (B * K, channels, h, w) of the proposals, each from the level that its size belongs to."""
        _, heads = self._parts
        pooler = heads.box_roi_pool
        boxes = proposals.flatten(0, 1)
        levels = self.mapper([boxes])[:, None, None, None]
        images = torch.arange(proposals.shape[0], device=boxes.device).to(boxes)
        rois = torch.cat((images[:, None].expand(-1, proposals.shape[1]).reshape(-1, 1), boxes), dim=1)
        pooled_from = [f for name, f in zip(self.names, features, strict=True) if name in pooler.featmap_names]
        pooled = torch.zeros(())
        for level, (feature, scale) in enumerate(zip(pooled_from, self.scales, strict=True)):
            part = roi_align(feature, rois, pooler.output_size, scale, pooler.sampling_ratio)
            pooled = part if level == 0 else torch.where(levels == level, part, pooled)
        return pooled


def _has_sides(boxes: Tensor, least: float) -> Tensor:
    return ((boxes[..., 2:] - boxes[..., :2]) >= least).all(-1)


def _check_size(image_size: Any) -> None:
    numbers = image_size if isinstance(image_size, tuple | list) else ()
    if len(numbers) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise ValueError(f"image_size must be (height, width) in pixels, got {image_size!r}")


_ONE_STAGE = (RetinaNet.postprocess_detections, FCOS.postprocess_detections, PointDetector.postprocess_detections)
_ALL = "RetinaNet, FCOS, PaperFCOS, ATSS, AutoAssign, Faster R-CNN"


def _maker_of(detector: nn.Module) -> Callable[..., nn.Module]:
    """What gives a detector's candidates.

    Raises:
        TypeError: It is not known how it does.
    """
    name = type(detector).__name__
    if not isinstance(detector, RetinaNet | FCOS | FasterRCNN):
        raise TypeError(f"{name} cannot be exported; can be: {_ALL}")
    if not isinstance(getattr(detector, "transform", None), GeneralizedRCNNTransform):
        raise TypeError(f"{name} cannot be exported: its transform is not torchvision's GeneralizedRCNNTransform")
    if not isinstance(detector, FasterRCNN):
        if type(detector).postprocess_detections not in _ONE_STAGE:
            raise TypeError(f"{name} cannot be exported: it has a postprocess_detections of its own")
        return OneStageCandidates
    heads: Any = detector.roi_heads
    if heads.mask_roi_pool is not None or heads.keypoint_roi_pool is not None:
        raise TypeError(f"{name} cannot be exported: it predicts masks or keypoints; can be: {_ALL}")
    parts = ((detector.rpn, RegionProposalNetwork), (heads, RoIHeads), (heads.box_roi_pool, MultiScaleRoIAlign))
    for part, known in parts:
        if type(part) is not known:
            raise TypeError(f"{name} cannot be exported: {type(part).__name__} in place of {known.__name__}")
    return TwoStageCandidates
