"""The head of FCOS, ATSS and AutoAssign: two towers over every level, and what is predicted from each.

Per level l with stride s_l and per point: class logits from the first tower; from the second the distances to the
four sides of the box, ``relu(scale_l * conv(x))`` in strides, and one more logit (centerness or objectness, by the
detector). Towers are four times 3x3 convolution, group normalisation, ReLU. Names of modules and outputs are those of
torchvision's `FCOSHead`; the learnable `scale_l` is the paper's (arXiv 1904.01355, section 3.2), not in torchvision.

Shapes: B images, P points over all levels, C classes with the background, which no target ever has.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from adapters.detection.deformable import ModulatedDeformConv2d
from adapters.detection.necks.blocks import group_count
from adapters.detection.points import centerness, centers
from adapters.detection.ranks import mean_over_ranks

__all__ = ["CenternessHead", "PointHead"]


class PointRegressionHead(FCOSRegressionHead):
    """Torchvision's regression head with a learnable scale per level.

    Args:
        in_channels: Channels of every level.
        num_convs: Convolutions of the tower.
        num_levels: Number of levels, None for no scales.
        box_bias: What the distances start from, in strides.
    """

    def __init__(self, in_channels: int, num_convs: int, num_levels: int | None, box_bias: float):
        super().__init__(in_channels, 1, num_convs, partial(nn.GroupNorm, group_count(in_channels)))
        self.scales = None if num_levels is None else nn.Parameter(torch.ones(num_levels))
        assert self.bbox_reg.bias is not None
        nn.init.constant_(self.bbox_reg.bias, box_bias)

    def forward(self, x: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Predict from the levels (B, channels, H_l, W_l): distances (B, P, 4) in strides and logits (B, P, 1)."""
        if self.scales is not None and len(x) != len(self.scales):
            raise ValueError(f"the head has scales for {len(self.scales)} levels, got {len(x)} feature maps")
        distances, logits = [], []
        for level, features in enumerate(x):
            features = self.conv(features)
            distance = self.bbox_reg(features)
            if self.scales is not None:
                distance = distance * self.scales[level]
            distances.append(F.relu(distance).flatten(2).transpose(1, 2))
            logits.append(self.bbox_ctrness(features).flatten(2).transpose(1, 2))
        return torch.cat(distances, dim=1), torch.cat(logits, dim=1)


class PointHead(nn.Module):
    """The head; its losses are the detector's business.

    Args:
        in_channels: Channels of every level.
        num_classes: Number of classes C with the background.
        num_levels: Number of levels that get a scale of their own; None for no scales.
        num_convs: Convolutions per tower.
        prior_probability: Probability that every class starts from.
        box_bias: Distance from a point to the sides of its box that training starts from, in strides.
        deformable: Make the last convolution of both towers deformable (DCNv2).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        num_levels: int | None = 5,
        num_convs: int = 4,
        prior_probability: float = 0.01,
        box_bias: float = 0.0,
        deformable: bool = False,
    ):
        super().__init__()
        self.box_coder = BoxLinearCoder(normalize_by_size=True)
        norm = partial(nn.GroupNorm, group_count(in_channels))
        self.classification_head = FCOSClassificationHead(
            in_channels, 1, num_classes, num_convs, prior_probability, norm
        )
        self.regression_head = PointRegressionHead(in_channels, num_convs, num_levels, box_bias)
        if deformable:
            for tower in (self.classification_head.conv, self.regression_head.conv):
                tower[-3] = ModulatedDeformConv2d(tower[-3])  # type: ignore[arg-type]

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Predict.

        Args:
            x: Level maps (B, in_channels, H_l, W_l), finest first.

        Returns:
            `cls_logits` (B, P, C), `bbox_regression` (B, P, 4) in strides, `bbox_ctrness` (B, P, 1): a logit.
        """
        distances, logits = self.regression_head(x)
        return {"cls_logits": self.classification_head(x), "bbox_regression": distances, "bbox_ctrness": logits}


class CenternessHead(PointHead):
    """The head of FCOS and ATSS, with their losses.

        classification  = sum of focal losses (alpha 0.25, gamma 2) / N
        bbox_regression = weight * sum(c * (1 - GIoU)) / sum(c)
        bbox_ctrness    = sum of binary cross entropies with c / N

    N is the number of positive points, c their centerness; both sums that divide are averaged over ranks and at least 1
    (arXiv 1912.02424 on the losses of FCOS, arXiv 1904.01355 and its public code; cvpods has the lower bound).

    Args:
        in_channels: Channels of every level.
        num_classes: Number of classes with the background.
        regression_weight: Weight of the box loss.
        weight_by_centerness: False: c = 1 in the box loss.
        **settings: Further arguments of `PointHead`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        regression_weight: float = 1.0,
        weight_by_centerness: bool = True,
        **settings,
    ):
        super().__init__(in_channels, num_classes, **settings)
        self.regression_weight = regression_weight
        self.weight_by_centerness = weight_by_centerness

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Compute the three losses.

        Args:
            targets: Per image `boxes` (M, 4) and `labels` (M,).
            head_outputs: What `forward` gave.
            anchors: Per image the squares (P, 4) of the points.
            matched_idxs: Per image (P,): the index of the object that a point is positive for, or negative.

        Returns:
            `classification`, `bbox_regression` and `bbox_ctrness`. All depend on all parameters of the head, and are
            zero but for the first where nothing is positive.
        """
        matched = torch.stack(matched_idxs)
        positive = matched >= 0
        chosen = [per_image[per_image >= 0] for per_image in matched_idxs]
        boxes = torch.cat([target["boxes"][index] for target, index in zip(targets, chosen, strict=True)])
        labels = torch.cat([target["labels"][index] for target, index in zip(targets, chosen, strict=True)])

        logits = head_outputs["cls_logits"]
        classes = torch.zeros_like(logits)
        classes[positive, labels] = 1
        classification = sigmoid_focal_loss(logits, classes, alpha=0.25, gamma=2, reduction="sum")

        squares = torch.stack(anchors)[positive]
        predicted = self.box_coder.decode(head_outputs["bbox_regression"][positive], squares)
        quality = centerness(centers(squares), boxes).to(predicted)
        weights = quality if self.weight_by_centerness else torch.ones_like(quality)
        regression = (weights * generalized_box_iou_loss(predicted, boxes)).sum()

        quality_logits = head_outputs["bbox_ctrness"][positive].squeeze(-1)
        entropy = F.binary_cross_entropy_with_logits(quality_logits, quality, reduction="sum")

        sums = torch.stack((positive.sum().to(weights), weights.sum()))
        num_positive, total_weight = mean_over_ranks(sums).clamp(min=1).unbind()
        return {
            "classification": classification / num_positive,
            "bbox_regression": self.regression_weight * regression / total_weight,
            "bbox_ctrness": entropy / num_positive,
        }
