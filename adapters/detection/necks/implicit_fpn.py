"""Implicit feature pyramid network: the neck whose output is the fixed point P* = G(P* + B).

Source: Wang et al., "Implicit Feature Pyramid Network for Object Detection", arXiv 2012.13563, Eq. 7 and 8.
Backbone features C_j pass a 1x1 convolution each and give the basis B_j (the laterals of an FPN). Starting
from P = 0 the residual-like iteration P <- G(P + B) is driven to its fixed point P*, and the heads read P*
(not P* + B). The gradient comes from the fixed point alone (implicit differentiation), so training memory is
that of one evaluation of G.

Deliberate deviations from the paper: no dropout and no weight normalisation inside G, so that G is the same
function at every step; and, as settings, Anderson acceleration in place of Broyden and a tolerance that may
end a sample's solve before `max_steps`.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

import deqkit
from adapters.detection.necks.blocks import CrossScaleFactory, NonlinearTransform

__all__ = ["ImplicitFPN", "convert_fpn_"]

_SOLVER = deqkit.Anderson(history=3)
_ADJOINT = deqkit.ImplicitAdjoint(_SOLVER)  # a pyramid is large: a long history would be most of the memory


class ImplicitFPN(nn.Module):
    """Implicit feature pyramid network, a drop-in for `torchvision.ops.FeaturePyramidNetwork`.

    Same call, same keys in the same order, same output shapes. Shapes: B batch, C_j channels of backbone
    level j, C = `out_channels`; levels go from the finest to the coarsest.

    The extra block of a detector works in one of two ways. *In the state*: it extends the laterals (it is
    given the laterals B and the backbone maps C_j), and the levels it adds are solved for like all others.
    This is the default for every block but `LastLevelMaxPool`; RetinaNet's P3..P7 are all in the state.
    *Outside*: P* is solved for the backbone's levels, and the block is applied to P* afterwards, as in a
    plain FPN. This is the default for `LastLevelMaxPool` (Faster R-CNN).

    Defaults of the solve, and what they rest on (at initialisation, on random features and on ResNet
    features of photographs, five levels): the spectral radius of dG/dP is 0.61 with 256 channels and 0.32
    with 64, and no solver is much faster than plain iteration. A relative residual of 1e-2, 1e-3 and 1e-4
    takes 10, 15 and 20 plain steps, and 9, 14 and 19 of Anderson or Broyden (64 channels: 5, 7 and 9 with all
    three). With cross-scale weights 1.6 times as large, 1e-2 takes 24 plain steps, 23 of Broyden and 21 of
    Anderson with any history from 2 to 8, at 1.1 (Anderson) and 1.4 (Broyden) times the time of a plain step.
    Hence Anderson with a short history, 1e-3 and a limit of 20 steps. The norm is "leaf_max" because the
    finest level holds three quarters of the state, so that a single l2 norm hides coarse levels that are not
    solved; it costs about one step, and up to ten where the last levels have a single pixel.

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
        cross_scale: Cross-scale connection inside G: a name or a factory, see `NonlinearTransform`.
        share_rbl: One residual block for all levels instead of one per level.
        share_csc: Share the weights of the cross-scale connection over levels.
        extra_in_state: Whether the levels of `extra_blocks` are part of the state. None decides by its type,
            see above.
        solver: Solver of the forward pass, a name or a solver object of `deqkit`.
        adjoint: How the fixed point is differentiated, a name or an adjoint object of `deqkit`. Default: implicitly,
            with the same solver.
        rtol: A sample is solved when |G(P + B) - P| <= rtol * |G(P + B)|.
        max_steps: Largest number of solver steps.
        eval_max_steps: The same in eval mode; None takes `max_steps`. The paper trains with 15 and tests with
            7.
        norm: Norm over the levels of a sample. "leaf_max": the tolerance holds on every level; None: one l2
            norm.
        on_failure: "warn", "raise" or "ignore", for samples that are not solved to `rtol` in `max_steps`.
        trace: Record the relative residual of every step in `last_solution.trace`.

    Attributes:
        inner_blocks: The laterals, laid out as in `FeaturePyramidNetwork`.
        extra_blocks: The extra block or None.
        transform: The nonlinear transformation G.
        last_solution: The `deqkit.Solution` of the last forward pass.
        num_monitors: How many a `deqkit.Monitor` report this neck's failures. If any, `on_failure` "warn" does
            not warn.

    Raises:
        ValueError: If a setting is unusable.
        TypeError: If `extra_blocks` is not an `ExtraFPNBlock`.

    Example:
        >>> neck = ImplicitFPN([10, 20, 30], 64)
        >>> features = OrderedDict(c3=torch.rand(1, 10, 64, 64), c4=torch.rand(1, 20, 32, 32))
        >>> features["c5"] = torch.rand(1, 30, 16, 16)
        >>> pyramid = neck(features)
        >>> print(neck.last_solution)
    """

    def __init__(
        self,
        in_channels_list: Sequence[int],
        out_channels: int,
        extra_blocks: ExtraFPNBlock | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        cross_scale: str | CrossScaleFactory = "pyramid",
        share_rbl: bool = False,
        share_csc: bool = True,
        extra_in_state: bool | None = None,
        solver: Any = _SOLVER,
        adjoint: Any = _ADJOINT,
        rtol: float = 1e-3,
        max_steps: int = 20,
        eval_max_steps: int | None = None,
        norm: Any = "leaf_max",
        on_failure: str = "warn",
        trace: bool = False,
    ):
        super().__init__()
        _check_channels(in_channels_list, out_channels)
        if extra_blocks is not None and not isinstance(extra_blocks, ExtraFPNBlock):
            raise TypeError(f"extra_blocks should be of type ExtraFPNBlock, not {type(extra_blocks)}")
        self.in_channels_list = list(in_channels_list)
        self.out_channels = out_channels
        self.inner_blocks = _laterals(in_channels_list, out_channels, norm_layer)
        self.extra_blocks = extra_blocks
        if extra_in_state is None:
            extra_in_state = extra_blocks is not None and not isinstance(extra_blocks, LastLevelMaxPool)
        self.extra_in_state = extra_in_state and extra_blocks is not None

        num_levels = len(self.in_channels_list)
        if extra_blocks is not None and self.extra_in_state:
            num_levels = _count_levels(extra_blocks, self.in_channels_list, out_channels)
        self.transform = NonlinearTransform(
            out_channels, num_levels, cross_scale=cross_scale, share_rbl=share_rbl, share_csc=share_csc
        )

        self.solver = solver
        self.adjoint = adjoint
        self.rtol = rtol
        self.max_steps = max_steps
        self.eval_max_steps = eval_max_steps
        self.norm = norm
        self.on_failure = on_failure
        self.trace = trace
        self.num_monitors = 0
        self._check_settings()
        self._last_solution: deqkit.Solution | None = None

    @classmethod
    def from_fpn(cls, fpn: FeaturePyramidNetwork, **settings: Any) -> "ImplicitFPN":
        """Build an implicit FPN around the laterals and the extra block of an explicit one.

        `inner_blocks` and `extra_blocks` become part of the new neck as they are: the same module objects
        with their weights, device and dtype. `layer_blocks` (the 3x3 output convolutions) have no counterpart
        and are left out. G is new and random, so the outputs change: the heads of a trained detector have to
        be trained again.

        Args:
            fpn: The explicit FPN.
            **settings: Keyword settings of `ImplicitFPN`, from `cross_scale` on.

        Returns:
            The implicit FPN, on the device, in the dtype and in the mode (train or eval) of `fpn`.

        Raises:
            TypeError: If `fpn` is not a `FeaturePyramidNetwork`, or a setting is unknown.
            ValueError: If a setting is unusable.
        """
        if not isinstance(fpn, FeaturePyramidNetwork):
            raise TypeError(f"from_fpn needs a torchvision FeaturePyramidNetwork, got {type(fpn).__name__}")
        laterals = [next(m for m in block.modules() if isinstance(m, nn.Conv2d)) for block in fpn.inner_blocks]
        neck = cls([m.in_channels for m in laterals], laterals[0].out_channels, fpn.extra_blocks, **settings)
        neck.inner_blocks = fpn.inner_blocks
        weight = laterals[0].weight
        neck.transform.to(device=weight.device, dtype=weight.dtype)
        # Module by module: parts of a frozen backbone may be in another mode than their parent.
        neck.training = fpn.training
        neck.transform.train(fpn.training)
        return neck

    @property
    def last_solution(self) -> "deqkit.Solution | None":
        """What the solver reports about the last forward pass, None before the first.

        Its tensors are detached, so holding it does not hold the autograd graph; `adjoint_stats` is filled in
        when backward() runs. Copies and pickles of the neck start without it.
        """
        return self._last_solution

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the solve, as given to the constructor."""
        names = ("solver", "adjoint", "rtol", "max_steps", "eval_max_steps", "norm", "on_failure", "trace")
        return {name: getattr(self, name) for name in names}

    def forward(self, x: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        """Compute the equilibrium feature pyramid.

        Args:
            x: Backbone maps by name, finest first; map j has shape (B, C_j, H_j, W_j). Any sizes.

        Returns:
            Maps P*_j of shape (B, C, H_j, W_j) under the same names in the same order, then those of the
            extra block. float32 under autocast, otherwise the dtype of the laterals.

        Raises:
            ValueError: If the number of maps, a number of channels or the batch sizes do not fit.
        """
        names, features = self._check_input(x)
        basis = [block(feature) for block, feature in zip(self.inner_blocks, features, strict=True)]
        if self.extra_in_state:
            basis, names = self._extend(basis, features, names)
        basis = [_full_precision(b) for b in basis]

        zeros = [torch.zeros_like(b) for b in basis]
        settings = self._solve_settings(_compute_dtype(basis[0]))
        solution = deqkit.solve(self._residual_like_step, zeros, args=(basis,), **settings)
        self._last_solution = solution.detach()

        levels = list(solution.value)
        if self.extra_blocks is not None and not self.extra_in_state:
            levels, names = self._extend(levels, features, names)
            levels = [_full_precision(level) for level in levels]
        return OrderedDict(zip(names, levels, strict=True))

    def _residual_like_step(self, pyramid: Sequence[Tensor], basis: Sequence[Tensor]) -> list[Tensor]:
        """One residual-like iteration, P -> G(P + B) (Eq. 7)."""
        return self.transform([p + b for p, b in zip(pyramid, basis, strict=True)])

    def _extend(self, levels: list[Tensor], features: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Apply the extra block, which appends to the lists it is given: hence the copies."""
        assert self.extra_blocks is not None
        return self.extra_blocks(list(levels), list(features), list(names))

    def _solve_settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """The settings for `deqkit.solve`, where G is computed in `dtype`."""
        settings = self.settings
        eval_max_steps = settings.pop("eval_max_steps")
        if not self.training and eval_max_steps is not None:
            settings["max_steps"] = eval_max_steps
        if self.num_monitors and self.on_failure == "warn":
            settings["on_failure"] = "ignore"
        # Below its resolution a half precision G only jitters, no step would help. rtol=0 asks for a fixed
        # number of steps and stays.
        if dtype in (torch.float16, torch.bfloat16) and self.rtol > 0:
            settings["rtol"] = max(self.rtol, torch.finfo(dtype).eps)
        return settings

    def _check_settings(self) -> None:
        """Let `deqkit` judge the settings now, on a batch without samples, not at the first forward."""
        nothing = [torch.zeros(0, self.out_channels, 1, 1)]
        settings = self.settings
        limits: dict[str, Any] = {
            "max_steps": self.max_steps,
            "eval_max_steps": settings.pop("eval_max_steps"),
        }
        for name, limit in limits.items():
            if name == "eval_max_steps" and limit is None:
                continue
            settings["max_steps"] = limit
            deqkit.solve(lambda pyramid: pyramid, nothing, **settings)
            if limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}: the pyramid would stay zero")

    def _check_input(self, x: Mapping[str, Tensor]) -> tuple[list[str], list[Tensor]]:
        if not isinstance(x, Mapping):
            raise ValueError(f"ImplicitFPN needs a dict of feature maps by name, got {type(x).__name__}")
        names, features = list(x.keys()), list(x.values())
        expected = self.in_channels_list
        if len(features) != len(expected):
            raise ValueError(
                f"ImplicitFPN was built for {len(expected)} feature maps with {expected} channels, "
                f"got {len(features)}: {names}"
            )
        for name, feature, channels in zip(names, features, expected, strict=True):
            if feature.dim() != 4 or feature.shape[1] != channels:
                shape = tuple(feature.shape)
                raise ValueError(f"feature map {name!r} must have shape (B, {channels}, H, W), got {shape}")
            if feature.shape[0] != features[0].shape[0]:
                raise ValueError(
                    f"feature map {name!r} has batch size {feature.shape[0]}, "
                    f"{names[0]!r} has {features[0].shape[0]}; all maps must come from the same images"
                )
        return names, features

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last solution out of copies and pickles: it reports on a batch, it is not the model."""
        state = self.__dict__.copy()
        return state | {"_last_solution": None, "num_monitors": 0}

    def extra_repr(self) -> str:
        """Settings shown by print()."""
        added = self.transform.num_levels - len(self.in_channels_list)
        levels = f"{len(self.in_channels_list)}" + (f" + {added} extra" if added else "")
        lines = [f"{self.in_channels_list} -> {self.out_channels}, levels in the state: {levels}"]
        lines.append(", ".join(f"{name}={value!r}" for name, value in self.settings.items()))
        return "\n".join(lines)


def convert_fpn_(model: nn.Module, **settings: Any) -> nn.Module:
    """Replace the feature pyramid network of a torchvision detector by an implicit one, in place.

    Works for every detector that holds one `FeaturePyramidNetwork`: RetinaNet, FCOS, Faster, Mask and
    Keypoint R-CNN hold it at `model.backbone.fpn`. Laterals and extra block are kept with their weights, the
    nonlinear transformation is new and random: the outputs of the detector change, and a trained one has to
    be trained again. Parameters come and go, so build the optimizer afterwards.

    Args:
        model: The detector (or its backbone).
        **settings: Keyword settings of `ImplicitFPN`.

    Returns:
        The same `model`.

    Raises:
        ValueError: If the model holds no `FeaturePyramidNetwork`, more than one, or an `ImplicitFPN` already.
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
    setattr(model.get_submodule(parent), name, neck)
    return model


def _check_channels(in_channels_list: Sequence[int], out_channels: int) -> None:
    if not len(in_channels_list):
        raise ValueError("in_channels_list must name the channels of at least one feature map, got an empty list")
    if any(channels < 1 for channels in in_channels_list) or out_channels < 1:
        raise ValueError(f"channels must be positive, got {list(in_channels_list)} -> {out_channels}")


def _laterals(
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


@torch.no_grad()
def _count_levels(extra_blocks: ExtraFPNBlock, in_channels_list: Sequence[int], out_channels: int) -> int:
    """How many levels there are after the extra block.

    The interface does not say, so a copy of the block is tried on small zero maps: a copy in eval mode,
    because a trial must not touch the statistics of the block.
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


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that convolutions of `x` are computed in."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def _full_precision(x: Tensor) -> Tensor:
    """Lift a tensor to float32 where autocast is on; without autocast the dtype is the user's choice."""
    return x.float() if torch.is_autocast_enabled(x.device.type) else x
