"""Putting an implicit FPN into a detector of torchvision."""

from typing import Any

from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork

from adapters.detection.necks.implicit_fpn import ImplicitFPN

__all__ = ["convert_fpn_"]


def convert_fpn_(model: nn.Module, **settings: Any) -> nn.Module:
    """Replace the feature pyramid network of a torchvision detector by an implicit one, in place.

    Works for every detector that holds one `FeaturePyramidNetwork`: RetinaNet, FCOS, Faster, Mask and
    Keypoint R-CNN hold it at `model.backbone.fpn`. Laterals and extra block are kept with their weights, the
    nonlinear transformation is new and random: the outputs of the detector change, and a trained one has to
    be trained again. With `keep_fpn=True` the FPN is kept and corrected instead: a trained detector starts from the
    outputs that it had. Parameters come and go, so build the optimizer afterwards.

    With `mask_padding=True` the detector's transform, which pads the images, tells the neck their sizes from now on.

    Args:
        model: The detector (or its backbone).
        **settings: Keyword settings of `ImplicitFPN`, and `keep_fpn` of `ImplicitFPN.from_fpn`.

    Returns:
        The same `model`.

    Raises:
        ValueError: If the model holds no `FeaturePyramidNetwork`, more than one, or an `ImplicitFPN` already; or if
            padding is to be masked and the model does not pad.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, FeaturePyramidNetwork)]
    if not found:
        converted = [name for name, module in model.named_modules() if isinstance(module, ImplicitFPN)]
        if converted:
            raise ValueError(f"{type(model).__name__} already has an ImplicitFPN at {converted[0]!r}")
        raise ValueError(f"{type(model).__name__} has no torchvision FeaturePyramidNetwork to convert")
    if len(found) > 1:
        raise ValueError(f"{type(model).__name__} has several feature pyramid networks, convert one by one: {found}")
    if not found[0]:
        raise ValueError("the model itself is a FeaturePyramidNetwork: use ImplicitFPN.from_fpn(model)")
    parent, _, name = found[0].rpartition(".")
    neck = ImplicitFPN.from_fpn(model.get_submodule(found[0]), **settings)  # type: ignore[arg-type]
    if neck.mask_padding:
        transforms = [module for module in model.modules() if isinstance(module, GeneralizedRCNNTransform)]
        if len(transforms) != 1:
            raise ValueError(
                f"mask_padding=True: {type(model).__name__} has {len(transforms)} modules that pad images, needs one; "
                "convert the whole detector, or call set_image_sizes of the neck before every forward pass"
            )
        transforms[0].register_forward_hook(_TellImageSizes(neck))
    setattr(model.get_submodule(parent), name, neck)
    return model


class _TellImageSizes:
    """Hook of a detector's transform. Not a closure: models are pickled and copied with their hooks."""

    def __init__(self, neck: ImplicitFPN):
        self.neck = neck

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        images, _ = output
        self.neck.set_image_sizes(images.image_sizes, tuple(images.tensors.shape[-2:]))
