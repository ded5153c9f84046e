"""The basis B of the implicit FPN: the laterals of an FPN, and the levels that its extra block adds to them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from adapters.detection.necks.blocks import autocast_enabled


def check_channels(in_channels_list: Sequence[int], out_channels: int) -> None:
    """Refuse channels that make no pyramid.

    Raises:
        ValueError: If there are no levels, or a level has no channels.
    """
    if not len(in_channels_list):
        raise ValueError("in_channels_list must name the channels of at least one feature map, got an empty list")
    if any(channels < 1 for channels in in_channels_list) or out_channels < 1:
        raise ValueError(f"channels must be positive, got {list(in_channels_list)} -> {out_channels}")


def make_laterals(
    in_channels_list: Sequence[int], out_channels: int, norm_layer: Callable[..., nn.Module] | None
) -> nn.ModuleList:
    """The 1x1 lateral convolutions, with the module layout and initialisation of torchvision's FPN."""
    laterals = nn.ModuleList()
    for channels in in_channels_list:
        block = Conv2dNormActivation(
            channels, out_channels, kernel_size=1, padding=0, norm_layer=norm_layer, activation_layer=None
        )
        conv = block[0]
        assert isinstance(conv, nn.Conv2d)
        nn.init.kaiming_uniform_(conv.weight, a=1)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        laterals.append(block)
    return laterals


def top_down(laterals: Sequence[Tensor], layer_blocks: nn.ModuleList) -> list[Tensor]:
    """What torchvision's FPN makes of the laterals, operation by operation."""
    merged = laterals[-1]
    out = [layer_blocks[-1](merged)]
    for lateral, block in reversed(list(zip(laterals[:-1], layer_blocks[:-1], strict=True))):
        merged = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
        out.insert(0, block(merged))
    return out


@torch.no_grad()
def count_levels(extra_blocks: ExtraFPNBlock, in_channels_list: Sequence[int], out_channels: int) -> int:
    """How many levels there are after the extra block.

    The interface does not say, so a copy of the block is tried on small zero maps: a copy in eval mode,
    because a trial must not touch the statistics of the block.

    Raises:
        ValueError: If the block does not fit the channels.
    """
    block = copy.deepcopy(extra_blocks).eval()
    tensors = (t for t in chain(block.parameters(), block.buffers()) if t.is_floating_point())
    like = next(tensors, torch.zeros(()))
    sizes = [4 * 2**j for j in reversed(range(len(in_channels_list)))]
    levels = [like.new_zeros(1, out_channels, s, s) for s in sizes]
    features = [like.new_zeros(1, c, s, s) for c, s in zip(in_channels_list, sizes, strict=True)]
    try:
        extended, _ = block(levels, features, [str(j) for j in range(len(sizes))])
    except RuntimeError as error:
        widths = f"laterals of {out_channels} channels and feature maps of {list(in_channels_list)}"
        raise ValueError(f"extra_blocks does not fit {widths}: {error}") from error
    channels = [level.shape[1] for level in extended]
    if any(c != out_channels for c in channels):
        raise ValueError(f"extra_blocks must give levels of {out_channels} channels, gave {channels}")
    return len(extended)


def check_features(x: Mapping[str, Tensor], in_channels_list: Sequence[int]) -> tuple[list[str], list[Tensor]]:
    """Names and maps of a backbone's output.

    Raises:
        ValueError: If the number of maps, a number of channels or the batch sizes do not fit.
    """
    if not isinstance(x, Mapping):
        raise ValueError(f"ImplicitFPN needs a dict of feature maps by name, got {type(x).__name__}")
    names, features = list(x.keys()), list(x.values())
    if len(features) != len(in_channels_list):
        raise ValueError(
            f"ImplicitFPN was built for {len(in_channels_list)} feature maps with {in_channels_list} channels, "
            f"got {len(features)}: {names}"
        )
    for name, feature, channels in zip(names, features, in_channels_list, strict=True):
        if feature.dim() != 4 or feature.shape[1] != channels:
            shape = tuple(feature.shape)
            raise ValueError(f"feature map {name!r} must have shape (B, {channels}, H, W), got {shape}")
        if feature.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"feature map {name!r} has batch size {feature.shape[0]}, "
                f"{names[0]!r} has {features[0].shape[0]}; all maps must come from the same images"
            )
    return names, features


def full_precision(x: Tensor) -> Tensor:
    """Lift a tensor to float32 where autocast is on; without autocast the dtype is the user's choice."""
    return x.float() if autocast_enabled(x.device.type) else x
