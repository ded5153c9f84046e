"""Builders of detectors in torchvision's manner: any of eight detectors, on any of seven ResNets, with FPN or i-FPN.

`build_detector` builds them all; the usual combinations have a name, as `retinanet_resnet50_ifpn`. Twins with the
explicit and the implicit FPN are the same model but for the neck: an implicit builder makes the explicit model and
converts it, so that under one seed both draw the same values for backbone, laterals, P6/P7 and head.

RetinaNet, FCOS, Faster, Mask and Keypoint R-CNN are torchvision's own models (their first versions); `fcos_paper`,
`atss` and `autoassign` are `PaperFCOS`, `ATSS` and `AutoAssign`. One-stage detectors read P3..P7, with P6 and P7 from
level 5 of the pyramid (implicit: inside the state); R-CNNs read P2..P5 and P6, which is P5 subsampled.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

from torch import nn
from torchvision.models import WeightsEnum
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import ResNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from adapters.detection.atss import ATSS
from adapters.detection.autoassign import AutoAssign
from adapters.detection.backbones import BACKBONES, NormLayer, PathLike, StateDict, make_body, read_state_dict
from adapters.detection.fcos import PaperFCOS
from adapters.detection.necks import convert_fpn_

NECKS = ("fpn", "ifpn")
_DENSE = "head.classification_head.cls_logits.bias"
_BOX = "roi_heads.box_predictor.cls_score.bias"


@dataclass(frozen=True)
class Family:
    """What tells one detector from another when it is built.

    Attributes:
        model: Its class.
        classifier: The bias in its state dict that has an entry per class.
        anchors: Entries per class in that bias, with the default anchor generator.
        num_classes: Default number of classes with the background: COCO's, as in torchvision.
        is_rcnn: Whether it reads P2..P6 rather than P3..P7.
    """

    model: type[nn.Module]
    classifier: str = _DENSE
    anchors: int = 1
    num_classes: int = 91
    is_rcnn: bool = False


DETECTORS: Mapping[str, Family] = {
    "retinanet": Family(RetinaNet, anchors=9),
    "fcos": Family(FCOS),
    "fcos_paper": Family(PaperFCOS),
    "atss": Family(ATSS),
    "autoassign": Family(AutoAssign),
    "fasterrcnn": Family(FasterRCNN, _BOX, is_rcnn=True),
    "maskrcnn": Family(MaskRCNN, _BOX, is_rcnn=True),
    "keypointrcnn": Family(KeypointRCNN, _BOX, num_classes=2, is_rcnn=True),
}
"""The detectors by name."""


def build_detector(
    detector: str,
    backbone: str = "resnet50",
    neck: str = "ifpn",
    *,
    weights: PathLike | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: WeightsEnum | PathLike | None = "IMAGENET1K_V1",
    trainable_backbone_layers: int | None = None,
    neck_settings: Mapping[str, Any] | None = None,
    norm_layer: NormLayer | None = None,
    neck_channels: int = 256,
    deformable_stages: Sequence[str] = (),
    **kwargs: Any,
) -> nn.Module:
    """Build a detector.

    Images, targets and detections are those of torchvision's detectors.

    Args:
        detector: "retinanet", "fcos", "fcos_paper", "atss", "autoassign", "fasterrcnn", "maskrcnn" or "keypointrcnn".
        backbone: "resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d" or
            "resnext152_32x8d".
        neck: "ifpn", the implicit FPN (arXiv 2012.13563), or "fpn".
        weights: Path of a state dict of the whole detector, plain or under the key "model"; there are no
            published weights. The backbone's weights are then not loaded.
        progress: Show a progress bar while the backbone's weights are downloaded.
        num_classes: Number of classes with the background. Default: that of `weights`, or COCO's 91 (keypoints: 2).
        weights_backbone: Weights of the backbone: a torchvision enum member, its name ("DEFAULT",
            "IMAGENET1K_V1"), the path of a state dict of the classifier, or None to train from scratch.
        trainable_backbone_layers: Number of backbone layers that are trained, counted from the last, 0 to 5.
            Default: 3 with pretrained weights. From scratch all 5 are.
        neck_settings: Keyword settings of `ImplicitFPN`, such as `{"solver": "broyden", "max_steps": 15}`.
        norm_layer: Normalisation of the backbone. Default: `FrozenBatchNorm2d` with pretrained weights, live
            `BatchNorm2d` from scratch, where frozen statistics that nobody learned would end in NaN.
        neck_channels: Channels of every level of the pyramid.
        deformable_stages: Stages of the backbone whose 3x3 convolutions become deformable (DCNv2), such as
            `("c4", "c5")`.
        **kwargs: Arguments of the detector's class and of torchvision's transform: `min_size`, `max_size`,
            `score_thresh`, ...

    Returns:
        The detector, in training mode. The neck is `model.backbone.fpn`.

    Raises:
        TypeError: If an argument is not known to the detector or to the neck.
        ValueError: If a name or a setting is unusable, or weights do not fit the model.
        FileNotFoundError: If `weights` or `weights_backbone` is a path that does not exist.
    """
    family = _check_names(detector, backbone, neck)
    _refuse_unknown(family.model, kwargs)
    if neck == "fpn" and neck_settings is not None:
        raise TypeError("neck_settings are for the implicit FPN; neck='fpn' has none")
    state = None
    if weights is not None:
        state, weights_backbone = read_state_dict(weights, "weights"), None
    is_trained = weights is not None or weights_backbone is not None
    if norm_layer is None:
        norm_layer = FrozenBatchNorm2d if is_trained else nn.BatchNorm2d

    # The order of the draws is torchvision's: backbone, P6/P7, FPN, head. G comes last.
    trainable_layers = _trainable_layers(is_trained, trainable_backbone_layers)
    body = make_body(backbone, weights_backbone, norm_layer, trainable_layers, deformable_stages, progress)
    pyramid = _with_pyramid(body, neck_channels, is_rcnn=family.is_rcnn)
    model = family.model(pyramid, _class_count(family, num_classes, state, kwargs), **kwargs)
    if neck == "ifpn":
        convert_fpn_(model, **(neck_settings or {}))
    if state is not None:
        _check_neck(state, implicit=neck == "ifpn")
        model.load_state_dict(state)
    return model


def _check_names(detector: str, backbone: str, neck: str) -> Family:
    for what, name, known in (
        ("detector", detector, DETECTORS),
        ("backbone", backbone, BACKBONES),
        ("neck", neck, NECKS),
    ):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return DETECTORS[detector]


def _with_pyramid(body: ResNet, channels: int, *, is_rcnn: bool) -> BackboneWithFPN:
    """The backbone with an explicit FPN, P2 to P6 or P3 to P7: C2 has too many points for one-stage detectors."""
    stages = (1, 2, 3, 4) if is_rcnn else (2, 3, 4)
    extra_blocks = LastLevelMaxPool() if is_rcnn else LastLevelP6P7(channels, channels)
    first = body.inplanes // 8  # channels of layer1
    widths = [first * 2 ** (stage - 1) for stage in stages]
    layers = {f"layer{stage}": str(level) for level, stage in enumerate(stages)}
    return BackboneWithFPN(body, layers, widths, channels, extra_blocks=extra_blocks)


def accepted_arguments(model: type[nn.Module]) -> set[str]:
    """Names of what a detector's class accepts beyond `backbone` and `num_classes`, its transform's included."""
    accepted: set[str] = set()
    for cls in model.__mro__:
        parameters = inspect.signature(cls.__init__).parameters.values()
        accepted |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if passes_on and cls.__module__.startswith("torchvision."):  # what is left goes to the transform
            accepted |= {"_skip_resize", *inspect.signature(GeneralizedRCNNTransform).parameters} - {"kwargs"}
            break
        if not passes_on:
            break
    return accepted - {"self", "backbone", "num_classes"}


def _refuse_unknown(model: type[nn.Module], kwargs: Mapping[str, Any]) -> None:
    """Torchvision's detectors hand what they do not know to their transform, which drops it: a typo would pass."""
    accepted = accepted_arguments(model)
    unknown = sorted(set(kwargs) - accepted)
    if unknown:
        known = ", ".join(sorted(name for name in accepted if not name.startswith("_")))
        raise TypeError(f"{model.__name__} has no argument {', '.join(map(repr, unknown))}; accepted: {known}")


def _trainable_layers(is_trained: bool, trainable_layers: int | None) -> int:
    if not is_trained:
        if trainable_layers not in (None, 5):
            warnings.warn(
                f"trainable_backbone_layers={trainable_layers} is ignored: without pretrained weights "
                "all 5 backbone layers are trained",
                stacklevel=4,
            )
        return 5
    if trainable_layers is None:
        return 3
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f"trainable_backbone_layers must be 0 to 5, got {trainable_layers}")
    return trainable_layers


def _class_count(
    family: Family, num_classes: int | None, state: StateDict | None, kwargs: Mapping[str, Any]
) -> int | None:
    """The number of classes asked for, which must be that of the weights; that of the weights; or the default."""
    if "box_predictor" in kwargs:  # torchvision's R-CNNs want None beside one
        return num_classes
    bias = None if state is None else state.get(family.classifier)
    if bias is None or "head" in kwargs:
        return family.num_classes if num_classes is None else num_classes
    generator = kwargs.get("anchor_generator")
    anchors = family.anchors if generator is None else generator.num_anchors_per_location()[0]
    found = bias.shape[0] // anchors
    if num_classes not in (None, found):
        raise ValueError(f"num_classes={num_classes}, but the weights are for {found} classes")
    return found


def _check_neck(state: StateDict, *, implicit: bool) -> None:
    """Name the one mistake that would otherwise end in a long list of keys."""
    explicit_weights = any(key.startswith("backbone.fpn.layer_blocks.") for key in state)
    if implicit and explicit_weights:
        raise ValueError(
            "the weights are those of an explicit FPN: load them into the explicit twin and use convert_fpn_ "
            "(the outputs change, the detector has to be trained again)"
        )
    if not implicit and any(key.startswith("backbone.fpn.module.transform.") for key in state):
        raise ValueError("the weights are those of an implicit FPN: load them into the implicit twin")


ModelT = TypeVar("ModelT", bound=nn.Module)
ModelT_co = TypeVar("ModelT_co", bound=nn.Module, covariant=True)


class Builder(Protocol[ModelT_co]):
    """A builder of one detector with one backbone and one neck: `build_detector` without its first three arguments."""

    __name__: str

    def __call__(
        self,
        *,
        weights: PathLike | None = None,
        progress: bool = True,
        num_classes: int | None = None,
        weights_backbone: WeightsEnum | PathLike | None = ...,
        trainable_backbone_layers: int | None = None,
        neck_settings: Mapping[str, Any] | None = None,
        norm_layer: NormLayer | None = None,
        neck_channels: int = 256,
        deformable_stages: Sequence[str] = (),
        **kwargs: Any,
    ) -> ModelT_co:
        """Build the detector; see `build_detector`."""
        ...


def _named(detector: str, backbone: str, neck: str, model: type[ModelT]) -> Builder[ModelT]:
    enum = BACKBONES[backbone].weights
    default = enum["IMAGENET1K_V1"] if enum is not None else None

    def builder(*, weights_backbone: Any = default, **kwargs: Any) -> ModelT:
        built = build_detector(detector, backbone, neck, weights_backbone=weights_backbone, **kwargs)
        return cast(ModelT, built)

    generic = inspect.signature(build_detector)
    parameters = [p for p in generic.parameters.values() if p.name not in ("detector", "backbone", "neck")]
    parameters = [p.replace(default=default) if p.name == "weights_backbone" else p for p in parameters]
    builder.__signature__ = generic.replace(  # pyright: ignore[reportFunctionMemberAccess]
        parameters=parameters, return_annotation=model
    )
    builder.__name__ = builder.__qualname__ = f"{detector}_{backbone}_{neck}"
    builder.__doc__ = (
        f'{model.__name__}: `build_detector("{detector}", "{backbone}", "{neck}", ...)`, with its keyword arguments.'
    )
    return cast(Builder[ModelT], builder)


retinanet_resnet18_fpn = _named("retinanet", "resnet18", "fpn", RetinaNet)
retinanet_resnet18_ifpn = _named("retinanet", "resnet18", "ifpn", RetinaNet)
retinanet_resnet50_fpn = _named("retinanet", "resnet50", "fpn", RetinaNet)
retinanet_resnet50_ifpn = _named("retinanet", "resnet50", "ifpn", RetinaNet)
fasterrcnn_resnet50_fpn = _named("fasterrcnn", "resnet50", "fpn", FasterRCNN)
fasterrcnn_resnet50_ifpn = _named("fasterrcnn", "resnet50", "ifpn", FasterRCNN)
maskrcnn_resnet50_fpn = _named("maskrcnn", "resnet50", "fpn", MaskRCNN)
maskrcnn_resnet50_ifpn = _named("maskrcnn", "resnet50", "ifpn", MaskRCNN)
keypointrcnn_resnet50_fpn = _named("keypointrcnn", "resnet50", "fpn", KeypointRCNN)
keypointrcnn_resnet50_ifpn = _named("keypointrcnn", "resnet50", "ifpn", KeypointRCNN)
fcos_resnet50_fpn = _named("fcos", "resnet50", "fpn", FCOS)
fcos_resnet50_ifpn = _named("fcos", "resnet50", "ifpn", FCOS)
fcos_paper_resnet50_fpn = _named("fcos_paper", "resnet50", "fpn", PaperFCOS)
fcos_paper_resnet50_ifpn = _named("fcos_paper", "resnet50", "ifpn", PaperFCOS)
atss_resnet50_fpn = _named("atss", "resnet50", "fpn", ATSS)
atss_resnet50_ifpn = _named("atss", "resnet50", "ifpn", ATSS)
autoassign_resnet50_fpn = _named("autoassign", "resnet50", "fpn", AutoAssign)
autoassign_resnet50_ifpn = _named("autoassign", "resnet50", "ifpn", AutoAssign)

__all__ = [
    "BACKBONES",
    "DETECTORS",
    "NECKS",
    "Builder",
    "atss_resnet50_fpn",
    "atss_resnet50_ifpn",
    "autoassign_resnet50_fpn",
    "autoassign_resnet50_ifpn",
    "build_detector",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_ifpn",
    "fcos_paper_resnet50_fpn",
    "fcos_paper_resnet50_ifpn",
    "fcos_resnet50_fpn",
    "fcos_resnet50_ifpn",
    "keypointrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_ifpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_ifpn",
    "retinanet_resnet18_fpn",
    "retinanet_resnet18_ifpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_ifpn",
]
