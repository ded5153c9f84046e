"""Implicit feature pyramid network: the neck whose output is the fixed point P* = G(P* + B).

Source: Wang et al., "Implicit Feature Pyramid Network for Object Detection", arXiv 2012.13563, Eq. 7 and 8.
Backbone features C_j pass a 1x1 convolution each and give the basis B_j (the laterals of an FPN). Starting
from P = 0 the residual-like iteration P <- G(P + B) is driven to its fixed point P*, and the heads read P*
(not P* + B). The gradient comes from the fixed point alone (implicit differentiation), so training memory is
that of one evaluation of G.

B enters through P + B alone, so dL/dB = u J_G = u - g (Eq. 13) comes out of the one vector-Jacobian product that the
parameters of G need anyway.

Deliberate deviations from the paper: dropout and weight normalisation are options; and, as settings, Anderson
acceleration in place of Broyden and a tolerance that may end a sample's solve before `max_steps`.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

import deqkit
from adapters.detection.necks.basis import (
    check_channels,
    check_features,
    count_levels,
    full_precision,
    make_laterals,
    top_down,
)
from adapters.detection.necks.blocks import one_of
from adapters.detection.necks.image_sizes import ImageSizes, sizes_for
from adapters.detection.necks.iteration import ResidualLikeIteration, as_dtype, solve_settings
from adapters.detection.necks.norms import GroupNorm, IntegratedBatchNorm, Masks, blank, each, padding_masks
from adapters.detection.necks.transform import TransformFactory, make_transform

__all__ = ["ImplicitFPN", "last_solution"]


class ImplicitFPN(deqkit.nn.FixedPoint):
    """Implicit feature pyramid network, a drop-in for `torchvision.ops.FeaturePyramidNetwork`.

    Same call, same keys in the same order, same output shapes. Shapes: B batch, C_j channels of backbone
    level j, C = `out_channels`; levels go from the finest to the coarsest.

    The extra block of a detector works in one of two ways. *In the state*: it extends the laterals (it is
    given the laterals B and the backbone maps C_j), and the levels it adds are solved for like all others.
    This is the default for every block but `LastLevelMaxPool`; RetinaNet's P3..P7 are all in the state.
    *Outside*: P* is solved for the backbone's levels, and the block is applied to P* afterwards, as in a
    plain FPN. This is the default for `LastLevelMaxPool` (Faster R-CNN).

    How the fixed point is solved for is a matter of `preset` and the settings after it. The default is "fast": Anderson
    with a short history until the residual is 0.15 of P* on every level (3 or 4 steps at the start of training), and
    two terms of Neumann's series backward, an approximate gradient. "accurate" solves to 1e-2, forward and backward
    (10 steps), and is the default where an `rtol` is given. "paper" is Broyden with 15 steps forward and backward and 7
    in eval mode. `PRESETS` tells what they rest on. The norm is "leaf_max" because the finest level holds three
    quarters of the state: a single l2 norm hides coarse levels that are not solved.

    Under autocast the laterals and G run in the lower precision, while state and output are float32, because
    anchors take the dtype of the features. G is then known to the resolution of the lower precision only, so
    `rtol` is raised to it: 8e-3 for bfloat16 (`last_solution.rtol` shows what was used). The same holds for a
    neck whose weights are in half precision; its state and output are too.

    Args:
        in_channels_list: Channels of the backbone levels, finest first.
        out_channels: Channels of every output level.
        extra_blocks: Block that adds levels, such as `LastLevelP6P7(out_channels, out_channels)`.
        norm_layer: Normalisation of the laterals (a callable from channels to module). Default: none, a 1x1
            convolution with bias.
        transform: Design of G: "ifpn", "mdeq" (see `TRANSFORMS`) or a factory
            `(channels, num_levels, **design) -> nn.Module`.
        extra_in_state: Whether the levels of `extra_blocks` are part of the state. None decides by its type,
            see above.
        basis_norm: "gn" normalises every level of B, those of the extra block included, on its way into G; the scale of
            B has a say in whether the iteration contracts. None leaves B as it is.
        mask_padding: Keep the padding of a batch out of the statistics of G's norms, and out of the state. The neck
            must then be told the sizes of the images before every forward pass: `convert_fpn_` sees to it, elsewhere
            `set_image_sizes` does it.
        autocast: Precision that G is computed in ("bfloat16", "float16" or the dtype), with state, laterals and output
            left as they are. None: that of the surrounding autocast, if any.
        unroll: Number k of steps P <- G(P + B) from P = 0 to take and to differentiate through, without a solver
            (the paper's Table 2). 0 gives B itself, and there is no G. `norm` and `on_failure` then have no meaning, as
            nothing is solved for. None: the fixed point.
        preset: Where the five settings after it come from if they are not given: "fast", "accurate" or "paper" (see
            `PRESETS`). None: "fast", or "accurate" where `rtol` is given.
        solver: Solver of the forward pass, a name or a solver object of `deqkit`.
        adjoint: How the fixed point is differentiated, a name or an adjoint object of `deqkit`.
        rtol: A sample is solved when |G(P + B) - P| <= rtol * |G(P + B)|.
        max_steps: Largest number of solver steps.
        eval_max_steps: The same in eval mode.
        norm: Norm over the levels of a sample. "leaf_max": the tolerance holds on every level; None: one l2
            norm.
        on_failure: "warn", "raise" or "ignore", for samples that are not solved to `rtol` in `max_steps`.
        trace: Record the relative residual of every step in `last_solution.trace`.
        **design: Settings of G. For "ifpn" those of `NonlinearTransform`: `cross_scale`, `rbl`, `share_rbl`,
            `share_csc`, `deformable`, `out_norm`, `out_act`, `weight_norm`, `dropout`; for "mdeq" those of
            `MDEQTransform`.

    Attributes:
        inner_blocks: The laterals, laid out as in `FeaturePyramidNetwork`.
        layer_blocks: The output convolutions of an FPN that is kept (see `from_fpn`), or None.
        extra_blocks: The extra block or None.
        transform: The nonlinear transformation G.
        last_solution: The `deqkit.Solution` of the last forward pass, detached; its `adjoint_stats` are filled in when
            backward() runs. None before the first, and without a solve (`unroll`).

    Raises:
        ValueError: If a setting is unusable.
        TypeError: If `extra_blocks` is not an `ExtraFPNBlock`, or a setting is unknown.

    Example:
        >>> neck = ImplicitFPN([10, 20, 30], 64)
        >>> features = OrderedDict(c3=torch.rand(1, 10, 64, 64), c4=torch.rand(1, 20, 32, 32))
        >>> features["c5"] = torch.rand(1, 30, 16, 16)
        >>> pyramid = neck(features)
        >>> print(neck.last_solution)
    """

    module: ResidualLikeIteration

    def __init__(
        self,
        in_channels_list: Sequence[int],
        out_channels: int,
        extra_blocks: ExtraFPNBlock | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        transform: str | TransformFactory = "ifpn",
        extra_in_state: bool | None = None,
        basis_norm: str | None = None,
        mask_padding: bool = False,
        autocast: str | torch.dtype | None = None,
        unroll: int | None = None,
        preset: str | None = None,
        solver: Any = None,
        adjoint: Any = None,
        rtol: float | None = None,
        max_steps: int | None = None,
        eval_max_steps: int | None = None,
        norm: Any = "leaf_max",
        on_failure: str = "warn",
        trace: bool = False,
        **design: Any,
    ):
        check_channels(in_channels_list, out_channels)
        if extra_blocks is not None and not isinstance(extra_blocks, ExtraFPNBlock):
            raise TypeError(f"extra_blocks should be of type ExtraFPNBlock, not {type(extra_blocks)}")
        one_of("basis_norm", basis_norm, (None, "gn"))
        given = {"solver": solver, "adjoint": adjoint, "rtol": rtol, "max_steps": max_steps}
        settings = solve_settings(unroll, preset, given | {"eval_max_steps": eval_max_steps, "trace": trace or None})
        in_channels_list = list(in_channels_list)
        if extra_in_state is None:
            extra_in_state = not isinstance(extra_blocks, LastLevelMaxPool)
        num_levels = len(in_channels_list)
        if extra_blocks is not None and extra_in_state:
            num_levels = count_levels(extra_blocks, in_channels_list, out_channels)
        inner_blocks = make_laterals(in_channels_list, out_channels, norm_layer)
        with torch.device("meta") if unroll == 0 else contextlib.nullcontext():
            g = make_transform(transform, out_channels, num_levels, **design)
        # Made on the meta device it has had its settings checked at no cost, and can go.
        iteration = ResidualLikeIteration(nn.Identity() if unroll == 0 else g, as_dtype(autocast))
        super().__init__(iteration, norm=norm, on_failure=on_failure, **settings)  # pyright: ignore

        self.in_channels_list, self.out_channels, self.num_levels = in_channels_list, out_channels, num_levels
        self.inner_blocks, self.extra_blocks = inner_blocks, extra_blocks
        self.layer_blocks: nn.ModuleList | None = None
        self.extra_in_state = extra_in_state and extra_blocks is not None
        normalised = num_levels if basis_norm else 0
        self.basis_norms = nn.ModuleList(GroupNorm(out_channels) for _ in range(normalised))
        self.mask_padding, self.unroll = mask_padding, unroll
        self._level_names: list[str] = []
        self._image_sizes: ImageSizes | None = None

    @classmethod
    def from_fpn(cls, fpn: FeaturePyramidNetwork, *, keep_fpn: bool = False, **settings: Any) -> "ImplicitFPN":
        """Build an implicit FPN around the laterals and the extra block of an explicit one.

        `inner_blocks` and `extra_blocks` become part of the new neck as they are: the same module objects
        with their weights, device and dtype. Without `keep_fpn` the `layer_blocks` (the 3x3 output convolutions) have
        no counterpart and are left out. G is new and random, so the outputs change: the heads of a trained detector
        have to be trained again.

        To go on from a trained detector, keep the FPN: its output is then B, the neck gives P* + B, and G starts at
        zero. Before the first training step the outputs are those of the FPN, bit for bit (in float32 under autocast).

        Args:
            fpn: The explicit FPN.
            keep_fpn: Whether to keep all of it, see above.
            **settings: Keyword settings of `ImplicitFPN`, from `transform` on.

        Returns:
            The implicit FPN, on the device and in the dtype, the memory format and the mode (train or eval) of `fpn`.

        Raises:
            TypeError: If `fpn` is not a `FeaturePyramidNetwork`, or a setting is unknown.
            ValueError: If a setting is unusable, or with `keep_fpn` if the FPN has a forward pass of its own, or G
                cannot start at zero.
        """
        if not isinstance(fpn, FeaturePyramidNetwork):
            raise TypeError(f"from_fpn needs a torchvision FeaturePyramidNetwork, got {type(fpn).__name__}")
        if keep_fpn and type(fpn).forward is not FeaturePyramidNetwork.forward:
            raise ValueError(f"keep_fpn: {type(fpn).__name__} has a forward pass of its own, which would be lost")
        laterals = [next(m for m in block.modules() if isinstance(m, nn.Conv2d)) for block in fpn.inner_blocks]
        neck = cls([m.in_channels for m in laterals], laterals[0].out_channels, fpn.extra_blocks, **settings)
        neck.inner_blocks = fpn.inner_blocks
        if keep_fpn:
            neck.layer_blocks = fpn.layer_blocks
            neck.module.zero_init_()
        weight = laterals[0].weight
        # Module by module: parts of a frozen backbone may be in another mode than their parent.
        neck.training = fpn.training
        for module in (neck.module, neck.basis_norms):
            module.to(device=weight.device, dtype=weight.dtype).train(fpn.training)
        kernel = next(m.weight for m in fpn.layer_blocks.modules() if isinstance(m, nn.Conv2d))
        if not kernel.is_contiguous():
            neck.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return neck

    @property
    def transform(self) -> nn.Module:
        """The nonlinear transformation G."""
        return self.module.transform

    @property
    def settings(self) -> dict[str, Any]:
        """What a call in the present mode hands to `deqkit.solve`."""
        getter = deqkit.nn.FixedPoint.settings.fget  # torch.compile does not know properties of super()
        assert getter is not None
        settings = getter(self)
        # Below its resolution a half precision G only jitters, no step would help. rtol=0 asks for a fixed
        # number of steps and stays.
        if self.rtol > 0:
            settings["rtol"] = max(self.rtol, self.module.resolution())
        if any(isinstance(m, IntegratedBatchNorm) and m.training for m in self.module.modules()):
            settings["batch_dims"] = 0  # the batch is one system
        return settings

    @property
    def level_residuals(self) -> "OrderedDict[str, Tensor] | None":
        """The relative residual of every level of the last solve by its name, shape (B,).

        P3 holds three quarters of the numbers of a pyramid: over all of them together, P6 and P7 would not be seen.
        None before the first solve, and for another norm than "leaf_max".
        """
        if self._last_solution is None or self._last_solution.leaf_residuals is None:
            return None
        return OrderedDict(zip(self._level_names, self._last_solution.leaf_residuals, strict=True))

    def set_image_sizes(self, image_sizes: Sequence[tuple[int, int]], padded_size: tuple[int, int]) -> None:
        """Tell the next forward pass which part of its maps is image and which is padding (`mask_padding`).

        A second pass over the same backbone maps, such as that of `torch.utils.checkpoint` in backward, knows them.

        Args:
            image_sizes: `(h, w)` of every image of the batch.
            padded_size: `(h, w)` that they were padded to.
        """
        self._image_sizes = list(image_sizes), padded_size

    def forward(self, x: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        """Compute the equilibrium feature pyramid.

        Args:
            x: Backbone maps by name, finest first; map j has shape (B, C_j, H_j, W_j). Any sizes.

        Returns:
            Maps P*_j of shape (B, C, H_j, W_j) under the same names in the same order, then those of the
            extra block. float32 under autocast, otherwise the dtype of the laterals.

        Raises:
            ValueError: If the number of maps, a number of channels or the batch sizes do not fit.
            RuntimeError: If padding is to be masked and nobody told the sizes of the images.
        """
        names, features = check_features(x, self.in_channels_list)
        levels = [block(feature) for block, feature in zip(self.inner_blocks, features, strict=True)]
        if self.layer_blocks is not None:
            levels = top_down(levels, self.layer_blocks)
        if self.extra_in_state:
            levels, names = self._extend(levels, features, names)
        self._level_names = list(names)
        levels = [full_precision(level) for level in levels]
        if self.unroll != 0:
            pyramid = self._equilibrium(levels, of=features[0])
            kept = self.layer_blocks is not None
            levels = [p + b for p, b in zip(pyramid, levels, strict=True)] if kept else pyramid
        if self.extra_blocks is not None and not self.extra_in_state:
            levels, names = self._extend(levels, features, names)
            levels = [full_precision(level) for level in levels]
        return OrderedDict(zip(names, levels, strict=True))

    def _equilibrium(self, basis: list[Tensor], of: Tensor) -> list[Tensor]:
        """P* for a basis B, or P_k; the finest backbone map that it is of stands for the batch."""
        masks = self._masks(basis, of)
        given = each(masks, len(basis))
        if self.basis_norms:
            basis = [norm(b, mask) for norm, b, mask in zip(self.basis_norms, basis, given, strict=True)]
        basis = [full_precision(blank(b, mask)) for b, mask in zip(basis, given, strict=True)]
        pyramid: Any = [torch.zeros_like(b) for b in basis]
        with self.module.casts_kept(of.device.type):
            if self.unroll is None:
                pyramid = super().forward(pyramid, basis, masks)
            else:
                with deqkit.nn.hold(self.module):
                    for _ in range(self.unroll):
                        pyramid = self.module(pyramid, basis, masks)
        for module in self.module.modules():
            if isinstance(module, IntegratedBatchNorm):
                module.update_running_stats()
        return list(pyramid)

    def _masks(self, levels: list[Tensor], of: Tensor) -> Masks | None:
        if not self.mask_padding:
            return None
        told, self._image_sizes = self._image_sizes, None
        return padding_masks(*sizes_for(of, told), levels)

    def _extend(self, levels: list[Tensor], features: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Apply the extra block, which appends to the lists it is given: hence the copies."""
        assert self.extra_blocks is not None
        return self.extra_blocks(list(levels), list(features), list(names))

    def extra_repr(self) -> str:
        """Settings shown by print()."""
        added = self.num_levels - len(self.in_channels_list)
        levels = f"{len(self.in_channels_list)}" + (f" + {added} extra" if added else "")
        title = f"{self.in_channels_list} -> {self.out_channels}, levels in the state: {levels}"
        how = super().extra_repr() if self.unroll is None else f"unroll={self.unroll}"
        return f"{title}\n{how}"


def last_solution(neck: nn.Module) -> deqkit.Solution | None:
    """The report of a neck's last solve; None before the first, and for a neck that solves nothing."""
    return neck.last_solution if isinstance(neck, ImplicitFPN) else None
