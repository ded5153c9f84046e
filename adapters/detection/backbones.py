"""The ResNets that the builders take as backbones: their weights, their frozen and their deformable stages."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import (
    ResNet18_Weights,
    ResNet34_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    ResNeXt101_32X8D_Weights,
    ResNeXt101_64X4D_Weights,
    WeightsEnum,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnext101_32x8d,
    resnext101_64x4d,
)
from torchvision.models.resnet import Bottleneck, ResNet

from adapters.detection.deformable import check_stages, layer_of_stage, make_stages_deformable_

__all__ = ["BACKBONES", "resnext152_32x8d"]

PathLike = str | os.PathLike[str]
NormLayer = Callable[..., nn.Module]
StateDict = dict[str, Tensor]


def resnext152_32x8d(*, weights: None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-152 with 32 groups of width 8, the large backbone of the paper's last table.

    Args:
        weights: None: there are no published ones in torchvision's format.
        progress: Not used; for the signature of torchvision's builders.
        **kwargs: Arguments of torchvision's `ResNet`.

    Returns:
        The classifier.

    Raises:
        ValueError: If `weights` is not None.
    """
    if weights is not None:
        raise ValueError(f"resnext152_32x8d has no published weights, got weights={weights!r}")
    return ResNet(Bottleneck, [3, 8, 36, 3], groups=32, width_per_group=8, **kwargs)


@dataclass(frozen=True)
class Architecture:
    """A builder of classifiers and the weights that there are for it."""

    build: Callable[..., ResNet]
    weights: type[WeightsEnum] | None = None


BACKBONES: Mapping[str, Architecture] = {
    "resnet18": Architecture(resnet18, ResNet18_Weights),
    "resnet34": Architecture(resnet34, ResNet34_Weights),
    "resnet50": Architecture(resnet50, ResNet50_Weights),
    "resnet101": Architecture(resnet101, ResNet101_Weights),
    "resnext101_32x8d": Architecture(resnext101_32x8d, ResNeXt101_32X8D_Weights),
    "resnext101_64x4d": Architecture(resnext101_64x4d, ResNeXt101_64X4D_Weights),
    "resnext152_32x8d": Architecture(resnext152_32x8d),
}
"""The backbones by name."""


def make_body(
    name: str,
    weights: WeightsEnum | PathLike | None,
    norm_layer: NormLayer,
    trainable_layers: int,
    deformable_stages: Sequence[str],
    progress: bool,
) -> ResNet:
    """Build a backbone: a classifier with its weights, its deformable stages and its frozen layers."""
    _check_deformable(deformable_stages, trainable_layers)
    body = _classifier(name, weights, norm_layer, progress)
    make_stages_deformable_(body, deformable_stages)
    freeze(body, trainable_layers)
    return body


def _check_deformable(stages: Sequence[str], trainable_layers: int) -> None:
    check_stages(stages)
    frozen = [stage for stage in stages if layer_of_stage(stage) not in _trained(trainable_layers)]
    if frozen:
        raise ValueError(
            f"deformable stages {frozen} would be frozen before their offsets have learnt anything: "
            f"trainable_backbone_layers={trainable_layers} trains {_trained(trainable_layers)} only"
        )


def _classifier(name: str, weights: WeightsEnum | PathLike | None, norm_layer: NormLayer, progress: bool) -> ResNet:
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}")
    architecture = BACKBONES[name]
    enum = architecture.weights
    names = [] if enum is None else list(enum.__members__)
    member = weights if isinstance(weights, WeightsEnum) else None
    if enum is not None and isinstance(weights, str) and weights.removeprefix(f"{enum.__name__}.") in names:
        member = enum.verify(weights)
    if weights is None or member is not None:
        return architecture.build(weights=member, progress=progress, norm_layer=norm_layer)

    state = read_state_dict(weights, "weights_backbone", names)
    # The classifier is not used: its weights may be absent, or for other classes.
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    body = architecture.build(weights=None, norm_layer=norm_layer)
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


def _trained(trainable_layers: int) -> list[str]:
    trained = ["layer4", "layer3", "layer2", "layer1", "conv1"][:trainable_layers]
    return [*trained, "bn1"] if trainable_layers == 5 else trained


def freeze(body: ResNet, trainable_layers: int) -> None:
    """Leaves all but the last layers of a ResNet untrained, counted from 0 to 5."""
    trained = tuple(_trained(trainable_layers))
    for name, parameter in body.named_parameters():
        if not name.startswith(trained):
            parameter.requires_grad_(False)


def read_state_dict(path: Any, argument: str, names: Sequence[str] | None = None) -> StateDict:
    """Read a state dict, plain or under "model" (where torchvision's training scripts put it).

    Args:
        path: The file.
        argument: What the caller's argument is called, for messages.
        names: Names of published weights that could have been given in place of a path; None where there cannot be any.

    Returns:
        Tensors by name.

    Raises:
        TypeError: If `path` is not a path.
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no state dict.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{argument} must be a path, got {path!r}")
    if not os.path.isfile(path):
        hint = ""
        if names is not None:
            hint = f", and no weights of that name: {', '.join(names) or 'none are published, give a path or None'}"
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
