import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapters.detection import NonlinearTransform, PyramidConv, ResidualBlock
from adapters.detection.necks.blocks import group_count


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(256, 32), (512, 32), (64, 8), (32, 4), (48, 6), (100, 10), (15, 1), (1, 1), (514, 2)],
)
def test_group_count_divides_and_leaves_eight_channels(channels, groups):
    assert group_count(channels) == groups


def test_residual_block_is_conv_norm_relu_conv_norm_plus_input():
    block = ResidualBlock(64)
    assert block.norm1.num_groups == 8 and block.conv1.bias is None and block.conv2.bias is None
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 64, 5, 4)

    def norm(y, layer):
        grouped = y.reshape(2, 8, -1)
        mean, var = grouped.mean(2, keepdim=True), grouped.var(2, unbiased=False, keepdim=True)
        normed = ((grouped - mean) / (var + 1e-5).sqrt()).reshape(y.shape)
        return normed * layer.weight[:, None, None] + layer.bias[:, None, None]

    hidden = norm(F.conv2d(x, block.conv1.weight, padding=1), block.norm1).clamp(min=0)
    expected = (norm(F.conv2d(hidden, block.conv2.weight, padding=1), block.norm2) + x).clamp(min=0)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_pyramid_conv_weights_start_small():
    csc = PyramidConv(64, 2)
    for conv in csc.modules():
        if isinstance(conv, nn.Conv2d):
            assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("share_rbl", [True, False])
@pytest.mark.parametrize("share_csc", [True, False])
def test_sharing_decides_the_number_of_parameters(share_rbl, share_csc):
    transform = NonlinearTransform(8, 4, share_rbl=share_rbl, share_csc=share_csc)
    rbl = 2 * 8 * 8 * 9 + 4 * 8
    conv = 8 * 8 * 9 + 8
    expected = rbl * (1 if share_rbl else 4) + conv * (3 if share_csc else 4 + 3 + 3)
    assert sum(p.numel() for p in transform.parameters()) == expected
    out = transform([torch.randn(1, 8, s, s) for s in (8, 4, 2, 1)])
    sum(o.square().sum() for o in out).backward()
    assert all(p.grad is not None for p in transform.parameters())
