"""AutoAssign: which points are positive is learnt with the detector (Zhu et al., arXiv 2007.03496).

Every point inside an object, on every level, is positive for it to some degree. For object n with class c_n and point
i inside it, of stride s and at the offset d from the object's centre:

    center prior     G_ni = exp(-|(d / s - mu_c) / sigma_c|^2 / 2),   mu and sigma learnt per class and axis
    confidence       P_ni = cls_i[c_n] * obj_i * exp(-5 (1 - GIoU_ni))
    weight           w_ni = exp(3 P_ni) G_ni / sum over i of the same
    positive loss    0.25 / #objects * sum over n of -log(sum over i of w_ni P_ni)
    negative loss    0.75 / sum(G) * sum over points and classes of conf^2 * -log(1 - conf),
                     conf = cls * obj * (1 - A)
    prior loss       0.75 * mean over images of #objects / sum(G)

A is between 0 and 1: 1 / (1 - IoU), the IoU of a point's box with the object that it fits best, is normalised over
the points inside each object to [0, 1] and set at the object's class, without a gradient. #objects and the first
sum(G) are averaged over ranks and at least 1; sum(G) has no gradient in the negative loss. Constants are those of the
authors' code (40.5 AP with ResNet-50, 1x), as are the distances' start from 4 strides and the classes' from 0.02.

Deviations. A point inside two objects of a class has the larger A (their code: whichever is written last). An object
with no point inside adds nothing to the positive loss, and an image with such objects only nothing to the prior loss
(there: constants of 100 and 1e12 without a gradient). Pairs of points and objects are kept only where the point is
inside, which changes no value.

Shapes: B images, P points of an image, C classes with the background, M objects of the batch, K pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import generalized_box_iou_loss

from adapters.detection.point_detector import PointDetector, Targets, points_or_default
from adapters.detection.point_head import PointHead
from adapters.detection.points import PointGenerator, centers, is_inside, paired_iou, sides
from adapters.detection.ranks import mean_over_ranks

__all__ = ["AutoAssign", "CenterPrior"]

_EPS = 1e-12
_PAIRS_AT_ONCE = 2**18  # bounds what is computed per pair: some 60 floats


class CenterPrior(nn.Module):
    """The learnt prior of where in an object the positive points lie: a Gaussian per class and axis, in strides.

    Args:
        num_classes: Number of classes C with the background.

    Attributes:
        mu: Offset of the middle from the object's centre (C, 2), x and y, in strides.
        sigma: Width (C, 2).
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(num_classes, 2))
        self.sigma = nn.Parameter(torch.ones(num_classes, 2))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would pull away from what they mean: all of them."""
        return {"mu", "sigma"}

    def forward(self, offsets: Tensor, labels: Tensor) -> Tensor:
        """Evaluate the prior.

        Args:
            offsets: From the centre of an object to a point, in strides, (K, 2).
            labels: Classes of the objects (K,).

        Returns:
            Shape (K,), between 0 and 1.
        """
        width = (2 * self.sigma[labels].square()).clamp(min=_EPS)
        return (-(offsets - self.mu[labels]).square() / width).sum(-1).exp()


@dataclass(frozen=True)
class Pairs:
    """The pairs of an object and a point inside it, over the images of a batch.

    Attributes:
        objects: Index of the pair's object among those of the batch (K,).
        points: Index of its point among those of the batch (K,): P times the image plus the point.
        boxes: The objects (M, 4).
        labels: Their classes (M,).
        images: Their images (M,).
    """

    objects: Tensor
    points: Tensor
    boxes: Tensor
    labels: Tensor
    images: Tensor

    @classmethod
    def find(cls, targets: Targets, squares: list[Tensor]) -> "Pairs":
        """Find the pairs of a batch."""
        found, counts = [], [len(target["boxes"]) for target in targets]
        for target, points in zip(targets, squares, strict=True):
            found.append(is_inside(centers(points), target["boxes"][:, None]).nonzero())
        first_object = [sum(counts[:image]) for image in range(len(targets))]
        objects = torch.cat([pairs[:, 0] + start for pairs, start in zip(found, first_object, strict=True)])
        points = torch.cat([pairs[:, 1] + image * len(squares[0]) for image, pairs in enumerate(found)])
        boxes = torch.cat([target["boxes"] for target in targets])
        labels = torch.cat([target["labels"] for target in targets])
        images = torch.arange(len(targets), device=boxes.device)
        return cls(objects, points, boxes, labels, images.repeat_interleave(torch.tensor(counts).to(images)))

    def chunks(self) -> Iterator["Pairs"]:
        """The pairs, `_PAIRS_AT_ONCE` at a time."""
        parts = zip(self.objects.split(_PAIRS_AT_ONCE), self.points.split(_PAIRS_AT_ONCE), strict=True)
        for objects, points in parts:
            yield Pairs(objects, points, self.boxes, self.labels, self.images)


class AutoAssign(PointDetector):
    """The detector that learns its assignment.

    Its losses are `positive`, `negative` and `center_prior`. The second output of the head's regression tower,
    `bbox_ctrness`, is the objectness here.

    Args:
        backbone: Network with an attribute `out_channels` that returns a dict of level maps, finest first.
        num_classes: Number of classes with the background.
        anchor_generator: Maker of the points. Default: strides 8 to 128, for P3 to P7.
        head: The head. Default: a `PointHead` that starts from a probability of 0.02 and distances of 4 strides.
        regression_weight: Factor of 1 - GIoU in the confidence.
        deformable_head: Make the last convolution of both towers deformable (DCNv2); for the default head.
        **kwargs: Further arguments of `PointDetector`.

    Example:
        >>> from adapters.detection import build_detector
        >>> model = build_detector("autoassign", "resnet18", "ifpn", weights_backbone=None)
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        anchor_generator: PointGenerator | None = None,
        head: nn.Module | None = None,
        regression_weight: float = 5.0,
        deformable_head: bool = False,
        **kwargs: Any,
    ):
        anchor_generator = points_or_default(anchor_generator)
        head = head or PointHead(
            backbone.out_channels,  # type: ignore[arg-type]
            num_classes,
            num_levels=len(anchor_generator.strides),
            prior_probability=0.02,
            box_bias=4.0,
            deformable=deformable_head,
        )
        super().__init__(backbone, num_classes, anchor_generator=anchor_generator, head=head, **kwargs)
        self.regression_weight = regression_weight
        self.center_prior = CenterPrior(num_classes)

    def rank(self, classes: Tensor, quality: Tensor) -> Tensor:
        """The probability of the class times the objectness."""
        return classes * quality

    def score(self, ranks: Tensor, quality: Tensor) -> Tensor:
        """The rank, as it is."""
        return ranks

    def losses(
        self,
        targets: Targets,
        outputs: dict[str, Tensor],
        squares: list[Tensor],
        level_sizes: list[int],
    ) -> dict[str, Tensor]:
        """The three losses; see the top of the file."""
        pairs = Pairs.find(targets, squares)
        points = torch.cat(squares)
        probabilities = outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid()
        predicted = self.box_coder.decode(outputs["bbox_regression"].flatten(0, 1), points)

        confidence, prior = self._evaluate(pairs, probabilities, predicted, points)
        num_images, num_objects = len(targets), len(pairs.labels)
        prior_of_image = prior.new_zeros(num_images).index_add(0, pairs.images[pairs.objects], prior)
        sums = torch.stack((prior.new_tensor(float(num_objects)), prior.sum().detach()))
        mean_objects, mean_prior = mean_over_ranks(sums).clamp(min=1).unbind()

        assigned = assigned_probability(pairs, predicted.detach(), probabilities)
        confusion = probabilities * (1 - assigned)
        negative = confusion.square() * minus_log(1 - confusion)
        objects_of_image = torch.bincount(pairs.images, minlength=num_images)
        return {
            "positive": 0.25 * _positive(pairs, confidence, prior) / mean_objects,
            "negative": 0.75 * negative.sum() / mean_prior,
            "center_prior": 0.75 * _prior_loss(objects_of_image, prior_of_image),
        }

    def _evaluate(
        self, pairs: Pairs, probabilities: Tensor, predicted: Tensor, squares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Confidence (K,) and centre prior (K,) of every pair, in the memory of a few numbers per pair."""
        values = [
            checkpoint(
                self._evaluate_pairs, part, probabilities, predicted, squares,
                use_reentrant=False, preserve_rng_state=False,
            )
            for part in pairs.chunks()
        ]  # fmt: skip
        confidence, prior = (torch.cat(parts) for parts in zip(*values, strict=True))
        return confidence, prior

    def _evaluate_pairs(
        self, pairs: Pairs, probabilities: Tensor, predicted: Tensor, squares: Tensor
    ) -> tuple[Tensor, Tensor]:
        boxes, labels, square = pairs.boxes[pairs.objects], pairs.labels[pairs.objects], squares[pairs.points]
        offsets = (centers(square) - centers(boxes)) / sides(square).unsqueeze(-1)
        located = torch.exp(-self.regression_weight * generalized_box_iou_loss(predicted[pairs.points], boxes))
        return probabilities.flatten(0, 1)[pairs.points, labels] * located, self.center_prior(offsets, labels)


def _positive(pairs: Pairs, confidence: Tensor, prior: Tensor) -> Tensor:
    """Sum over the objects of -log of the weighted mean of their confidences."""
    zeros = prior.new_zeros(len(pairs.labels))
    weights = (3 * confidence).exp() * prior
    total = zeros.index_add(0, pairs.objects, weights).clamp(min=_EPS)
    mean = zeros.index_add(0, pairs.objects, weights * confidence) / total
    has_points = zeros.bool().index_fill(0, pairs.objects, True)
    return minus_log(mean[has_points]).sum()


def minus_log(probability: Tensor) -> Tensor:
    """-log of probabilities, finite and with a finite gradient at 0.

    `binary_cross_entropy` would end the process where a probability is NaN or rounded to more than 1.
    """
    return -probability.clamp(torch.finfo(probability.dtype).tiny, 1).log()


def _prior_loss(objects_of_image: Tensor, prior_of_image: Tensor) -> Tensor:
    """Mean over the images of #objects / sum of the prior, 0 where no point is inside an object."""
    has_points = prior_of_image > 0
    # The inner choice keeps a division by zero out of the gradient.
    total = torch.where(has_points, prior_of_image, 1).clamp(min=_EPS)
    return torch.where(has_points, objects_of_image / total, 0 * prior_of_image).mean()


@torch.no_grad()
def assigned_probability(pairs: Pairs, predicted: Tensor, like: Tensor) -> Tensor:
    """A: how far a point is assigned to a class, by the IoU of its box.

    Args:
        pairs: The pairs of the batch.
        predicted: Predicted boxes of all points (B * P, 4).
        like: A tensor of shape (B, P, C).

    Returns:
        Shape (B, P, C), between 0 and 1; 0 where a point is in no object of the class.
    """
    num_images, num_points, num_classes = like.shape
    iou = like.new_zeros(num_images * num_points)
    for image, mine in enumerate(iou.split(num_points)):
        boxes = pairs.boxes[pairs.images == image]
        theirs = predicted[image * num_points : (image + 1) * num_points]
        for first in range(0, len(boxes), 16):  # all objects at once would be the most memory of all the losses
            mine.copy_(torch.maximum(mine, paired_iou(theirs[:, None], boxes[first : first + 16]).amax(1)))
    fit = 1 / (1 - iou[pairs.points]).clamp(min=_EPS)

    extremes = fit.new_zeros(len(pairs.labels))
    low = extremes.scatter_reduce(0, pairs.objects, fit, "amin", include_self=False)[pairs.objects]
    high = extremes.scatter_reduce(0, pairs.objects, fit, "amax", include_self=False)[pairs.objects]
    share = (fit - low + _EPS) / (high - low + _EPS)
    assigned = torch.zeros_like(like)
    flat = pairs.points * num_classes + pairs.labels[pairs.objects]
    assigned.view(-1).scatter_reduce_(0, flat, share, "amax")
    return assigned
