"""RetinaNet builders in torchvision's manner: with the implicit FPN, and their twins with the explicit FPN.

Twins are the same model but for the neck: torchvision's RetinaNet (its first version: nine anchors per cell,
P3..P7, P6 and P7 made from level 5 of the pyramid). An implicit builder makes the explicit model and converts
it, so that under one seed both draw the same values for backbone, laterals, P6/P7 and head.
"""

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights, WeightsEnum, resnet18, resnet50
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import ResNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from adapters.detection.necks import convert_fpn_

__all__ = [
    "retinanet_resnet18_fpn",
    "retinanet_resnet18_ifpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_ifpn",
]

PathLike = str | os.PathLike[str]
NormLayer = Callable[..., nn.Module]
StateDict = dict[str, Tensor]

_BACKBONES: dict[str, tuple[Callable[..., ResNet], type[WeightsEnum]]] = {
    "resnet18": (resnet18, ResNet18_Weights),
    "resnet50": (resnet50, ResNet50_Weights),
}
_NUM_CLASSES = 91  # COCO's category ids with background, as in torchvision
_ANCHORS_PER_CELL = 9  # of RetinaNet's default anchor generator


def retinanet_resnet50_ifpn(
    *,
    weights: PathLike | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: WeightsEnum | PathLike | None = ResNet50_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    neck_settings: Mapping[str, Any] | None = None,
    norm_layer: NormLayer | None = None,
    neck_channels: int = 256,
    **kwargs: Any,
) -> RetinaNet:
    """RetinaNet with a ResNet-50 backbone and the implicit FPN (arXiv 2012.13563).

    Images, targets and detections are those of `torchvision.models.detection.retinanet_resnet50_fpn`.

    Args:
        weights: Path of a state dict of the whole detector, plain or under the key "model"; there are no
            published weights. The backbone's weights are then not loaded.
        progress: Show a progress bar while the backbone's weights are downloaded.
        num_classes: Number of classes with the background. Default: that of `weights`, or 91.
        weights_backbone: Weights of the backbone: a torchvision enum member, its name ("DEFAULT",
            "IMAGENET1K_V1"), the path of a state dict of the classifier, or None to train from scratch.
        trainable_backbone_layers: Number of backbone layers that are trained, counted from the last, 0 to 5.
            Default: 3 with pretrained weights. From scratch all 5 are.
        neck_settings: Keyword settings of `ImplicitFPN`, such as `{"solver": "broyden", "max_steps": 15}`.
        norm_layer: Normalisation of the backbone. Default: `FrozenBatchNorm2d` with pretrained weights, live
            `BatchNorm2d` from scratch, where frozen statistics that nobody learned would end in NaN.
        neck_channels: Channels of every level of the pyramid.
        **kwargs: Arguments of torchvision's `RetinaNet` and its transform: `min_size`, `max_size`,
            `anchor_generator`, `score_thresh`, ...

    Returns:
        The detector, in training mode. The neck is `model.backbone.fpn`.

    Raises:
        TypeError: If an argument is not known to RetinaNet or to the neck.
        ValueError: If a setting is unusable, or weights do not fit the model.
        FileNotFoundError: If `weights` or `weights_backbone` is a path that does not exist.
    """
    return _retinanet(
        "resnet50",
        weights,
        progress,
        num_classes,
        weights_backbone,
        trainable_backbone_layers,
        norm_layer,
        neck_channels,
        kwargs,
        neck_settings=neck_settings or {},
    )


def retinanet_resnet18_ifpn(
    *,
    weights: PathLike | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: WeightsEnum | PathLike | None = ResNet18_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    neck_settings: Mapping[str, Any] | None = None,
    norm_layer: NormLayer | None = None,
    neck_channels: int = 256,
    **kwargs: Any,
) -> RetinaNet:
    """RetinaNet with a ResNet-18 backbone and the implicit FPN.

    Arguments, result and errors are those of `retinanet_resnet50_ifpn`, with `ResNet18_Weights` for the
    backbone.
    """
    return _retinanet(
        "resnet18",
        weights,
        progress,
        num_classes,
        weights_backbone,
        trainable_backbone_layers,
        norm_layer,
        neck_channels,
        kwargs,
        neck_settings=neck_settings or {},
    )


def retinanet_resnet50_fpn(
    *,
    weights: PathLike | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: WeightsEnum | PathLike | None = ResNet50_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    norm_layer: NormLayer | None = None,
    neck_channels: int = 256,
    **kwargs: Any,
) -> RetinaNet:
    """RetinaNet with a ResNet-50 backbone and the explicit FPN: the twin of `retinanet_resnet50_ifpn`.

    The same model as `torchvision.models.detection.retinanet_resnet50_fpn`, with the arguments of its
    implicit twin. For torchvision's COCO weights take torchvision's builder.

    Arguments, result and errors are those of `retinanet_resnet50_ifpn`, without `neck_settings`.
    """
    return _retinanet(
        "resnet50",
        weights,
        progress,
        num_classes,
        weights_backbone,
        trainable_backbone_layers,
        norm_layer,
        neck_channels,
        kwargs,
    )


def retinanet_resnet18_fpn(
    *,
    weights: PathLike | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: WeightsEnum | PathLike | None = ResNet18_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    norm_layer: NormLayer | None = None,
    neck_channels: int = 256,
    **kwargs: Any,
) -> RetinaNet:
    """RetinaNet with a ResNet-18 backbone and the explicit FPN: the twin of `retinanet_resnet18_ifpn`.

    Arguments, result and errors are those of `retinanet_resnet50_ifpn`, without `neck_settings` and with
    `ResNet18_Weights` for the backbone.
    """
    return _retinanet(
        "resnet18",
        weights,
        progress,
        num_classes,
        weights_backbone,
        trainable_backbone_layers,
        norm_layer,
        neck_channels,
        kwargs,
    )


def _retinanet(
    backbone_name: str,
    weights: PathLike | None,
    progress: bool,
    num_classes: int | None,
    weights_backbone: WeightsEnum | PathLike | None,
    trainable_layers: int | None,
    norm_layer: NormLayer | None,
    channels: int,
    kwargs: dict[str, Any],
    neck_settings: Mapping[str, Any] | None = None,
) -> RetinaNet:
    """The explicit RetinaNet, converted when there are neck settings."""
    _refuse_unknown(kwargs)
    state = None
    if weights is not None:
        state = _read_state_dict(weights, "weights")
        weights_backbone = None
    is_trained = weights is not None or weights_backbone is not None
    trainable_layers = _trainable_layers(is_trained, trainable_layers)
    if norm_layer is None:
        norm_layer = FrozenBatchNorm2d if is_trained else nn.BatchNorm2d

    body = _resnet(backbone_name, weights_backbone, norm_layer, progress)
    _freeze(body, trainable_layers)
    # The order of the draws is torchvision's: backbone, P6/P7, FPN, head. G comes last.
    extra_blocks = LastLevelP6P7(channels, channels)
    first = body.inplanes // 8  # channels of layer1; C2 is skipped because it gives too many anchors
    widths = [first * 2, first * 4, first * 8]
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(body, layers, widths, channels, extra_blocks=extra_blocks)
    model = RetinaNet(backbone, _class_count(num_classes, state, kwargs), **kwargs)
    if neck_settings is not None:
        convert_fpn_(model, **neck_settings)
    if state is not None:
        _check_neck(state, implicit=neck_settings is not None)
        model.load_state_dict(state)
    return model


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    """RetinaNet hands what it does not know to its transform, which drops it: a misspelt name would pass."""
    signatures = (inspect.signature(RetinaNet), inspect.signature(GeneralizedRCNNTransform))
    named = {p.name for s in signatures for p in s.parameters.values() if p.kind is not p.VAR_KEYWORD}
    named = (named | {"_skip_resize"}) - {"backbone", "num_classes"}
    unknown = sorted(set(kwargs) - named)
    if unknown:
        known = ", ".join(sorted(name for name in named if not name.startswith("_")))
        raise TypeError(f"RetinaNet has no argument {', '.join(map(repr, unknown))}; accepted: {known}")


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


def _resnet(name: str, weights: WeightsEnum | PathLike | None, norm_layer: NormLayer, progress: bool) -> ResNet:
    build, enum = _BACKBONES[name]
    member = weights if isinstance(weights, WeightsEnum) else None
    if isinstance(weights, str) and weights.removeprefix(f"{enum.__name__}.") in enum.__members__:
        member = enum.verify(weights)
    if weights is None or member is not None:
        return build(weights=member, progress=progress, norm_layer=norm_layer)

    state = _read_state_dict(weights, "weights_backbone", names=list(enum.__members__))
    # The classifier is not used: its weights may be absent, or for other classes.
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    body = build(weights=None, norm_layer=norm_layer)
    try:
        missing, unexpected = body.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"weights_backbone={os.fspath(weights)!r} does not fit {name}: {error}") from error
    missing = [key for key in missing if not key.startswith("fc.")]
    if missing or unexpected:
        raise ValueError(
            f"weights_backbone={os.fspath(weights)!r} does not fit {name}: "
            f"missing {_some(missing)}, unexpected {_some(unexpected)}"
        )
    return body


def _some(keys: list[str]) -> str:
    return f"{keys[:4]}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _freeze(body: ResNet, trainable_layers: int) -> None:
    trained = ["layer4", "layer3", "layer2", "layer1", "conv1"][:trainable_layers]
    if trainable_layers == 5:
        trained.append("bn1")
    for name, parameter in body.named_parameters():
        if not name.startswith(tuple(trained)):
            parameter.requires_grad_(False)


def _read_state_dict(path: Any, argument: str, names: list[str] | None = None) -> StateDict:
    """Read a state dict, plain or under "model" (where torchvision's training scripts put it)."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{argument} must be a path, got {path!r}")
    if not os.path.isfile(path):
        hint = f", and no weights of that name: {', '.join(names)}" if names else ""
        raise FileNotFoundError(f"{argument}={os.fspath(path)!r}: no such file{hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file that is no checkpoint can fail in any way
        raise ValueError(f"{argument}={os.fspath(path)!r} cannot be read as weights: {type(error).__name__}") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f'{argument}={os.fspath(path)!r} holds no state dict (names to tensors), plain or under "model"'
        )
    return dict(content)


def _class_count(num_classes: int | None, state: StateDict | None, kwargs: Mapping[str, Any]) -> int:
    """The number of classes asked for, which must be that of the weights; that of the weights; or 91."""
    bias = None if state is None else state.get("head.classification_head.cls_logits.bias")
    if bias is None or "head" in kwargs:
        return _NUM_CLASSES if num_classes is None else num_classes
    generator = kwargs.get("anchor_generator")
    anchors = _ANCHORS_PER_CELL if generator is None else generator.num_anchors_per_location()[0]
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
    if not implicit and any(key.startswith("backbone.fpn.transform.") for key in state):
        raise ValueError("the weights are those of an implicit FPN: load them into the implicit twin")
