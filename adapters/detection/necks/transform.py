"""The nonlinear transformation G of the implicit FPN: a residual block per level, then a cross-scale connection.

With `Z_j` the input of level j (level 0 is the finest), i-FPN (arXiv 2012.13563, Eq. 8 and Fig. 4) computes

    O_i = act(norm(sum over j of W_ij(R_j(Z_j))))

`R_j` is the residual block of level j (RBL); it works on one level. `W_ij` is the part of the cross-scale connection
(CSC) that leads from level j to level i. Norm and activation after the sum are options ("integrated BN" in the paper).
The paper's G are (a) `cross_scale="dense", rbl=False`, (b) `cross_scale="dense"`, (c) `cross_scale="pyramid"`.

Shapes: B batch, C channels, L levels; level j is (B, C, H_j, W_j), coarser levels have the larger index.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.detection.necks.blocks import ResidualBlock, normalise_weights_, one_of, pick
from adapters.detection.necks.cross_scale import CROSS_SCALE_CONNECTIONS, CrossScaleFactory
from adapters.detection.necks.mdeq import MDEQTransform
from adapters.detection.necks.norms import OUT_NORMS, Masks, blank, each

__all__ = ["TRANSFORMS", "NonlinearTransform", "make_transform"]


class NonlinearTransform(nn.Module):
    """The nonlinear transformation G: a residual block on every level, then a cross-scale connection (Eq. 8).

    Args:
        channels: Width C of every level.
        num_levels: Number of levels L.
        cross_scale: Name of a cross-scale connection (see `CROSS_SCALE_CONNECTIONS`) or a factory
            `(channels, num_levels, *, share) -> nn.Module`.
        rbl: Whether there are residual blocks.
        share_rbl: Use one residual block for all levels instead of one per level.
        share_csc: Share the weights of the cross-scale connection over levels. None leaves it to the connection:
            the pyramid convolution shares, as in SEPC, the others do not.
        deformable: Deformable kernels in the pyramid convolution, for all outputs but that of the finest level.
        out_norm: Normalisation after the sum: "gn" (every level by itself), "integrated_gn", "ibn" (see `OUT_NORMS`) or
            None.
        out_act: Activation after the sum: "relu" or None.
        weight_norm: Weight normalisation of the convolutions of R and W, one length per output channel.
        dropout: Rate of variational dropout inside the residual blocks: one mask per level and forward pass, of whole
            channels.

    Raises:
        ValueError: If a name is not known, or settings do not fit together.
    """

    injects = False

    def __init__(
        self,
        channels: int,
        num_levels: int,
        *,
        cross_scale: str | CrossScaleFactory = "pyramid",
        rbl: bool = True,
        share_rbl: bool = False,
        share_csc: bool | None = None,
        deformable: bool = False,
        out_norm: str | None = None,
        out_act: str | None = None,
        weight_norm: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        one_of("out_norm", out_norm, (None, *OUT_NORMS))
        one_of("out_act", out_act, (None, "relu"))
        if not rbl and cross_scale == "none":
            raise ValueError("rbl=False with cross_scale='none' leaves nothing of G; unroll=0 gives the laterals alone")
        if not rbl and (dropout or share_rbl):
            raise ValueError("dropout and share_rbl are settings of the residual blocks, which rbl=False leaves out")
        self.num_levels, self.out_act = num_levels, out_act
        num_blocks = (1 if share_rbl else num_levels) if rbl else 0
        self.residual_blocks = nn.ModuleList(ResidualBlock(channels, dropout) for _ in range(num_blocks))
        self.cross_scale = _cross_scale_factory(cross_scale, deformable)(channels, num_levels, share=share_csc)
        self.out_norm = None if out_norm is None else OUT_NORMS[out_norm](channels, num_levels)
        if weight_norm:
            normalise_weights_(self)

    def forward(self, levels: Sequence[Tensor], masks: Masks | None = None) -> list[Tensor]:
        """Compute G(Z).

        Args:
            levels: Z, L maps of shapes (B, C, H_j, W_j), finest first, zero in the padding.
            masks: Where the images are, one (B, 1, H_j, W_j) per level; None if nothing is padded.

        Returns:
            L maps of the same shapes, zero in the padding.

        Raises:
            ValueError: If the number of maps is not L.
        """
        if len(levels) != self.num_levels:
            raise ValueError(f"G was built for {self.num_levels} levels, got {len(levels)}")
        given = each(masks, self.num_levels)
        if len(self.residual_blocks):
            levels = [pick(self.residual_blocks, j)(z, given[j]) for j, z in enumerate(levels)]
        out = self.cross_scale(levels) if masks is None else self.cross_scale(levels, masks)
        if self.out_norm is not None:
            out = self.out_norm(out, masks)
        if self.out_act == "relu":
            out = [F.relu(o) for o in out]
        return [blank(o, mask) for o, mask in zip(out, given, strict=True)]

    @torch.no_grad()
    def zero_init_(self) -> None:
        """Let G be zero, whatever its input, and able to learn to be something else.

        Raises:
            ValueError: If there is no parameter that could do it, or it could not learn from there.
        """
        if self.out_act == "relu":
            raise ValueError("out_act='relu' cannot start at zero: no gradient goes through a ReLU of zeros")
        last = self.cross_scale if self.out_norm is None else self.out_norm
        zero_init = getattr(last, "zero_init_", None)
        if zero_init is None:
            raise ValueError(f"{type(last).__name__} cannot start at zero: take another cross_scale or out_norm")
        zero_init()


TransformFactory = Callable[..., nn.Module]

TRANSFORMS: Mapping[str, TransformFactory] = {
    "ifpn": NonlinearTransform,
    "mdeq": MDEQTransform,
}
"""The designs of G that can be asked for by name: that of i-FPN, and the one that it is compared with (Table 5)."""


def make_transform(transform: str | TransformFactory, channels: int, num_levels: int, **design: Any) -> nn.Module:
    """Build G.

    Args:
        transform: A name in `TRANSFORMS`, or a factory `(channels, num_levels, **design) -> nn.Module`.
        channels: Width C of every level.
        num_levels: Number of levels L.
        **design: The settings of the transform.

    Raises:
        ValueError: If the name is not known, or a setting is unusable.
        TypeError: If the transform has no setting of that name.
    """
    if isinstance(transform, str):
        one_of("transform", transform, tuple(TRANSFORMS))
        factory, title = TRANSFORMS[transform], f"transform={transform!r}"
    elif callable(transform):
        factory, title = transform, f"transform={transform!r}"
    else:
        raise TypeError(f"transform must be a name or a factory, got {transform!r}")
    parameters = inspect.signature(factory).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    unknown = [name for name in design if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise TypeError(f"ImplicitFPN with {title} has no setting {', '.join(map(repr, unknown))}; G has: {known}")
    return factory(channels, num_levels, **design)


def _cross_scale_factory(cross_scale: str | CrossScaleFactory, deformable: bool) -> Callable[..., nn.Module]:
    if not isinstance(cross_scale, str):
        if not callable(cross_scale):
            raise ValueError(f"cross_scale must be a name or a factory, got {cross_scale!r}")
        factory: Callable[..., nn.Module] = cross_scale
    elif cross_scale in CROSS_SCALE_CONNECTIONS:
        factory = CROSS_SCALE_CONNECTIONS[cross_scale]
    else:
        known = ", ".join(map(repr, CROSS_SCALE_CONNECTIONS))
        raise ValueError(f"unknown cross_scale {cross_scale!r}; known names: {known}, or pass a factory")
    if not deformable:
        return factory
    if "deformable" not in inspect.signature(factory).parameters:
        raise ValueError(f"cross_scale={cross_scale!r} has no deformable kernels; the pyramid convolution has")
    return partial(factory, deformable=True)
