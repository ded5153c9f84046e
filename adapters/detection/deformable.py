"""Deformable convolution with modulation (DCNv2), for the backbone's stages and the last convolution of a head's tower.

    y(p) = sum over k of w_k * x(p + p_k + dp_k) * m_k,        m_k = sigmoid(...)

with offsets dp_k and modulation m_k predicted from x by a 3x3 convolution that starts at zero (arXiv 1811.11168,
Eq. 1). So dp = 0 and m = 0.5 at the start: half of what the plain convolution gives, as in the paper. The plain
convolution's weights stay under their names in a state dict; the predictor's are added under `offset`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import DeformConv2d, deform_conv2d

__all__ = ["ModulatedDeformConv2d", "make_stages_deformable_"]

STAGES = ("c2", "c3", "c4", "c5")
"""Stages of a ResNet by the name of their output; torchvision calls them layer1 to layer4."""


class ModulatedDeformConv2d(DeformConv2d):
    """Deformable convolution with modulation that predicts its own offsets: takes the place of an `nn.Conv2d`.

    It computes in float32 where its input is in half precision, under autocast too, and returns the input's dtype:
    offsets are positions, and torchvision has no bfloat16 kernel for the CPU.

    Args:
        conv: The convolution to replace; its weights are adopted as they are.

    Raises:
        ValueError: If the convolution does not pad with zeros, or pads by a name.
    """

    def __init__(self, conv: nn.Conv2d):
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"a deformable convolution pads with zeros by a number of pixels, got {conv}")
        shape: dict = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        super().__init__(conv.in_channels, conv.out_channels, groups=conv.groups, bias=False, **shape)
        self.weight = conv.weight
        self.bias = conv.bias
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        self.offset = nn.Conv2d(conv.in_channels, 3 * taps, **shape).to(conv.weight)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve.

        Args:
            input: Map of shape (B, C, H, W).

        Returns:
            Map of shape (B, C', H', W'), as of the plain convolution.
        """
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        with torch.autocast(input.device.type, enabled=False):
            x = input.to(dtype)
            offset = self.offset
            predicted = torch.conv2d(
                x, offset.weight.to(dtype), _to(offset.bias, dtype), self.stride, self.padding, self.dilation
            )
            taps = predicted.shape[1] // 3
            out = deform_conv2d(
                x,
                predicted[:, : 2 * taps],
                self.weight.to(dtype),
                _to(self.bias, dtype),
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                mask=predicted[:, 2 * taps :].sigmoid(),
            )
        return out.to(input.dtype)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def make_stages_deformable_(body: ResNet, stages: Sequence[str]) -> ResNet:
    """Replace the 3x3 convolution of every block of some stages, in place.

    Of a bottleneck it is the only one, of a basic block the second.

    Args:
        body: The backbone.
        stages: Of "c2", "c3", "c4", "c5"; the DCN backbones of the literature have "c4" and "c5" or all but "c2".

    Returns:
        The same `body`.

    Raises:
        ValueError: If a stage is not known.
    """
    check_stages(stages)
    for stage in stages:
        for block in body.get_submodule(layer_of_stage(stage)).children():
            assert isinstance(block, BasicBlock | Bottleneck)
            block.conv2 = ModulatedDeformConv2d(block.conv2)  # pyright: ignore[reportAttributeAccessIssue]
    return body


def check_stages(stages: Iterable[str]) -> None:
    """Refuse names that are not in `STAGES`."""
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or isinstance(stages, str):
        raise ValueError(f"deformable stages must be a sequence of {STAGES}, got {stages!r}")


def layer_of_stage(stage: str) -> str:
    """Torchvision's name of a stage: layer3 for c4."""
    return f"layer{STAGES.index(stage) + 1}"
