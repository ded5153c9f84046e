"""What determines the shape of a detector, as plain values that fit into a config file and into a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FrozenBatchNorm2d

from adapters.detection.backbones import BACKBONES
from adapters.detection.builders import DETECTORS, NECKS, accepted_arguments, build_detector
from adapters.detection.necks.blocks import group_count

__all__ = ["DetectorConfig"]

BOX_DETECTORS = tuple(name for name in DETECTORS if name not in ("maskrcnn", "keypointrcnn"))
"""Those that learn from boxes alone."""

ANCHOR_RATIOS = (0.5, 1.0, 2.0)
RETINANET_SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))


@dataclass(frozen=True)
class DetectorConfig:
    """What determines the shape of a detector.

    Attributes:
        num_classes: Labels, the background included.
        neck: "ifpn" or "fpn".
        detector: "retinanet", "fcos", "fcos_paper", "atss", "autoassign" or "fasterrcnn".
        backbone: A name in `adapters.detection.builders.BACKBONES`, such as "resnet50".
        neck_channels: Channels of every pyramid level.
        neck_settings: Keyword settings of `ImplicitFPN`, such as ``{"preset": "paper"}``. Solves that do not converge
            are counted in the logs; without ``on_failure`` among the settings no warning is given.
        image_size: Length that the shorter side of every image is resized to, pixels. Several: training draws one of
            them for every image, evaluation takes the last.
        max_size: Limit of the longer side, pixels; None for 1333/800 of the shorter, as in the paper.
        anchor_size: For RetinaNet and Faster R-CNN the side of the smallest anchor on the finest level, pixels; it
            doubles with every level. None scales their 32 pixels at a shorter side of 800 to ``image_size``, but not
            below twice the stride and a little (18 and 9): smaller anchors would leave gaps between one another.
        head_norm: Group normalisation in the towers of RetinaNet's head. Without it a head that starts from random
            weights hardly learns in a short training. The other detectors have their own.
        frozen_norm: `FrozenBatchNorm2d` in the backbone, which needs pretrained weights; otherwise `BatchNorm2d`.
        trainable_backbone_layers: See `adapters.detection.build_detector`; for pretrained weights alone.
        deformable_stages: Stages of the backbone that become deformable (DCNv2), such as ``["c4", "c5"]``.
        options: Further arguments of the detector's class, such as ``{"score_thresh": 0.05}``.

    Raises:
        ValueError: A name is not known or a number is out of range.
        TypeError: The detector has no such option.
    """

    num_classes: int
    neck: str = "ifpn"
    detector: str = "retinanet"
    backbone: str = "resnet18"
    neck_channels: int = 256
    neck_settings: dict[str, Any] = field(default_factory=dict)
    image_size: int | Sequence[int] = 800
    max_size: int | None = None
    anchor_size: float | None = None
    head_norm: bool = True
    frozen_norm: bool = False
    trainable_backbone_layers: int | None = None
    deformable_stages: Sequence[str] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in (("neck", NECKS), ("detector", BOX_DETECTORS), ("backbone", BACKBONES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {list(choices)}")
        if not self.sizes:
            raise ValueError("image_size needs at least one size")
        smallest = {"num_classes": 2, "neck_channels": 1, "max_size": 1}
        numbers = {name: getattr(self, name) for name in smallest} | {
            f"image_size[{i}]": n for i, n in enumerate(self.sizes)
        }
        for name, value in numbers.items():
            if value is not None and value < smallest.get(name, 1):
                raise ValueError(f"{name.split('[')[0]} must be at least {smallest.get(name, 1)}, got {value}")
        if self.anchor_size is not None and not 0 < self.anchor_size < math.inf:
            raise ValueError(f"anchor_size must be a positive number of pixels, got {self.anchor_size}")
        if self.anchor_size is not None and not self._has_scaled_anchors:
            raise ValueError(f"anchor_size is for RetinaNet and Faster R-CNN; {self.detector} has anchors of its own")
        if self.neck == "fpn" and self.neck_settings:
            raise ValueError("neck_settings are for the implicit FPN; neck='fpn' has none")
        unknown = sorted(set(self.options) - accepted_arguments(DETECTORS[self.detector].model))
        if unknown:
            raise TypeError(f"options: {self.detector} has no argument {', '.join(map(repr, unknown))}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The lengths of the shorter side, pixels."""
        return (self.image_size,) if isinstance(self.image_size, int) else tuple(self.image_size)

    @property
    def longest_side(self) -> int:
        """Limit of the longer side of an image, pixels."""
        return self.max_size or round(max(self.sizes) * 1333 / 800)

    @property
    def _has_scaled_anchors(self) -> bool:
        return self.detector == "retinanet" or DETECTORS[self.detector].is_rcnn

    def build(self, weights_backbone: Any = None) -> nn.Module:
        """The detector, in training mode.

        Args:
            weights_backbone: See `adapters.detection.build_detector`; None to train from scratch.
        """
        kwargs: dict[str, Any] = dict(self.options)
        if self._has_scaled_anchors:
            kwargs.update(self._anchors())
        if self.detector == "retinanet" and self.head_norm:
            norm = partial(nn.GroupNorm, group_count(self.neck_channels))
            anchors = len(RETINANET_SCALES) * len(ANCHOR_RATIOS)
            kwargs["head"] = RetinaNetHead(self.neck_channels, anchors, self.num_classes, norm_layer=norm)
        if self.neck == "ifpn":
            # What does not converge is counted in the logs: a warning at every step would bury everything else.
            kwargs["neck_settings"] = {"on_failure": "ignore"} | self.neck_settings
        if weights_backbone is not None:
            kwargs["trainable_backbone_layers"] = self.trainable_backbone_layers
        return build_detector(
            self.detector,
            self.backbone,
            self.neck,
            num_classes=self.num_classes,
            weights_backbone=weights_backbone,
            norm_layer=FrozenBatchNorm2d if self.frozen_norm else nn.BatchNorm2d,
            neck_channels=self.neck_channels,
            deformable_stages=tuple(self.deformable_stages),
            min_size=self.sizes,
            max_size=self.longest_side,
            **kwargs,
        )

    def _anchors(self) -> dict[str, Any]:
        """RetinaNet's anchors on P3..P7, or those of Faster R-CNN's proposals on P2..P6, scaled to the images."""
        is_rcnn = DETECTORS[self.detector].is_rcnn
        base = self.anchor_size or max(9.0 if is_rcnn else 18.0, 32 * max(self.sizes) / 800)
        scales = (1.0,) if is_rcnn else RETINANET_SCALES
        sides = tuple(tuple(base * 2**level * scale for scale in scales) for level in range(5))
        generator = AnchorGenerator(sides, (ANCHOR_RATIOS,) * 5)  # pyright: ignore[reportArgumentType]
        return {"rpn_anchor_generator" if is_rcnn else "anchor_generator": generator}
