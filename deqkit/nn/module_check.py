"""L6. Find the modules inside f that make it something else than a function of its arguments, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm as _SpectralNormHook

from deqkit.nn.parametrization import HeldParametrizationList


@dataclass(frozen=True)
class ModuleFinding:
    """A module that has no place inside f as it is.

    Attributes:
        name: its qualified name; "" for the module that was checked itself.
        module: the module.
        problem: what it does.
        remedy: what to use instead.
    """

    name: str
    module: nn.Module
    problem: str
    remedy: str

    def __str__(self) -> str:
        kind = type(self.module).__name__
        return f"{self.name or 'the module itself'} ({kind}) {self.problem}; {self.remedy}"


def check_module(module: nn.Module) -> list[ModuleFinding]:
    """Find modules inside f that make it random or stateful, or couple its samples.

    Only a function has a fixed point. BatchNorm in training mode makes each sample depend on the others, and counts the
    iterates of the solver into its statistics; dropout draws anew at every evaluation; and so on, for what PyTorch has
    and for the stochastic depth and DropBlock of torchvision and timm. The check goes by types and settings, and by the
    mode that each module is in, so check a model in the mode in which it is going to be used. It calls nothing. It
    can't see into a forward() of one's own, where `torch.nn.functional.dropout` may be.

    Args:
        module: f, or a part of it.

    Returns:
        What was found, in the order of ``module.named_modules()``; empty if nothing was.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    return [
        ModuleFinding(name, part, rule.problem, rule.remedy)
        for name, part in module.named_modules()
        for rule in _RULES
        if rule.applies(part)
    ]


def describe(findings: list[ModuleFinding]) -> str:
    """A message about all of them."""
    lines = "".join(f"\n  - {finding}" for finding in findings)
    return f"f is not a function that has a fixed point, because of modules inside it:{lines}"


@dataclass(frozen=True)
class _Rule:
    applies: Callable[[Any], bool]
    problem: str
    remedy: str


def _drops(m: Any) -> bool:
    """Whether it drops at random: by type, or for what is not a part of PyTorch by name."""
    if not m.training:
        return False
    if isinstance(m, _DropoutNd):
        return m.p > 0
    if type(m).__name__ in ("StochasticDepth", "DropBlock2d", "DropBlock3d", "DropPath"):
        return bool(getattr(m, "p", getattr(m, "drop_prob", 1.0)))
    return False


def _drops_within(m: Any) -> bool:
    if isinstance(m, nn.RNNBase):
        return m.training and m.dropout > 0 and m.num_layers > 1
    return isinstance(m, nn.MultiheadAttention) and m.training and m.dropout > 0


def _is_power_iterated(m: Any) -> bool:
    """Whether torch's spectral norm goes on iterating at every evaluation; held, it does so once per solve."""
    if any(isinstance(hook, _SpectralNormHook) for hook in m._forward_pre_hooks.values()):
        return m.training
    if not isinstance(m, ParametrizationList) or isinstance(m, HeldParametrizationList):
        return False
    return any(type(p) is parametrizations._SpectralNorm and p.training for p in m)


_RULES = (
    _Rule(
        lambda m: isinstance(m, _BatchNorm) and (m.training or m.running_mean is None),
        "normalises by the statistics of the batch, so that samples depend on one another, and counts the solver's "
        "iterates into its own",
        "use GroupNorm or LayerNorm, or put it into eval mode",
    ),
    _Rule(
        lambda m: isinstance(m, _InstanceNorm) and m.training and m.track_running_stats,
        "counts the solver's iterates into its running statistics",
        "use track_running_stats=False",
    ),
    _Rule(_drops, "draws at random at every evaluation", "use deqkit.nn.VariationalDropout"),
    _Rule(
        _drops_within,
        "drops at random at every evaluation",
        "set its dropout to 0, and use deqkit.nn.VariationalDropout on its output",
    ),
    _Rule(
        lambda m: isinstance(m, nn.RReLU) and m.training and m.lower != m.upper,
        "draws its slopes at every evaluation",
        "use LeakyReLU or PReLU",
    ),
    _Rule(
        lambda m: isinstance(m, (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)) and m._random_samples is None,
        "draws its regions at every evaluation, in eval mode too",
        "use MaxPool or AdaptiveMaxPool",
    ),
    _Rule(
        _is_power_iterated,
        "moves its estimate of the norm at every evaluation",
        "use deqkit.nn.spectral_norm",
    ),
)
