"""The residual-like iteration P <- G(P + B) of i-FPN (arXiv 2012.13563, Eq. 7), and the settings it is solved with."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import deqkit
from adapters.detection.necks.blocks import autocast_enabled, one_of
from adapters.detection.necks.norms import Masks

__all__ = ["PRESETS", "ResidualLikeIteration", "as_dtype", "solve_settings"]

_SHORT = deqkit.Anderson(history=3)  # a pyramid is large: a long history would be most of the memory
_BROYDEN = deqkit.Broyden(history=15)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {
        "solver": _SHORT,
        "adjoint": deqkit.NeumannAdjoint(num_terms=2),
        "rtol": 0.15,
        "max_steps": 20,
        "eval_max_steps": None,
    },
    "accurate": {
        "solver": _SHORT,
        "adjoint": deqkit.ImplicitAdjoint(_SHORT),
        "rtol": 1e-2,
        "max_steps": 20,
        "eval_max_steps": None,
    },
    "paper": {
        "solver": _BROYDEN,
        "adjoint": deqkit.ImplicitAdjoint(_BROYDEN, rtol=0.0, max_steps=15),
        "rtol": 0.0,
        "max_steps": 15,
        "eval_max_steps": 7,
    },
}
"""Settings of the solve by name.

"paper": a fixed number of Broyden steps, 15 forward and 15 backward, 7 in eval mode.

"accurate": the fixed point and its gradient to a few per cent. What it rests on was measured with 256 channels, five
levels, G(c), B and dL/dP* of normal numbers; errors are differences from a solve to 2e-6. At the start of training
(spectral radius of dG/dP* 0.6):

| forward / backward | evaluations of G, products | error of P* | of the gradient of G | time |
|---|---|---|---|---|
| Anderson(3), 1e-3 / 1e-3 | 15, 16 | 1e-3 | 5e-3 | 1 |
| Anderson(3), 1e-2 / 1e-2 | 11, 11 | 1e-2 | 1.3e-2 | 0.70 |
| Anderson(3), 1e-2 / 3 terms of Neumann's series | 11, 2 | 1e-2 | 0.14 | 0.50 |
| Anderson(3), 1e-2 / JFB | 11, 0 | 1e-2 | 0.68 | 0.45 |
| "paper" | 17, 16 | 5e-4 | 4e-3 | 1.05 to 1.25 |

With weights of W 1.6 times as large (radius 0.86) 1e-2 takes 20 steps each way with gradients that are 6% off, and
"paper" comes to 5% in P* and 7%; JFB then points elsewhere (0.92). Plain iteration needs as many steps as Anderson or
Broyden or one more while the radius is small, and Anderson with any history from 2 to 8 fewer when it has grown. (The
gradient that reaches B differs by 0.1 at 1e-2 and by 0.04 at 1e-3: a small change of P* turns some ReLUs over.)

"fast": as far as detectors learn as well as with "paper", and no further. The fixed point is left at some 12%, and two
terms of Neumann's series are a gradient that is 45% off; what is learnt is learnt for this P*, so the same tolerance
holds in eval mode. A training step calls G for 8 evaluations, "accurate" for 22 or 23, "paper" for 35.
Faster R-CNN after 300 steps of a drawn set, three seeds, with a G that contracts as fast as at 256 channels (mean and
standard deviation of AP): "paper" 0.502, 0.031; this one 0.487, 0.027; to 0.1 instead 0.503, 0.023 for 8.8 calls of G.
"""

_HALF = (torch.float16, torch.bfloat16)


def solve_settings(unroll: int | None, preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, and those of a preset for the others.

    Args:
        unroll: Number of steps without a solver, or None.
        preset: A name in `PRESETS`; None for "fast", or for "accurate" where `rtol` is given.
        given: Settings by name, None where they were not given.

    Raises:
        ValueError: If a setting is unusable, or there is nothing to solve.
        TypeError: If a setting has the wrong type.
    """
    one_of("preset", preset, (None, *PRESETS))
    chosen = {name: value for name, value in given.items() if value is not None}
    if unroll is not None:
        if isinstance(unroll, bool) or not isinstance(unroll, int):
            raise TypeError(f"unroll must be a number of steps, got {unroll!r}")
        if unroll < 0:
            raise ValueError(f"unroll must not be negative, got {unroll}")
        if chosen or preset:
            unused = ", ".join([*chosen, *(["preset"] if preset else [])])
            raise ValueError(f"unroll={unroll} takes its steps without a solver: leave out {unused}")
    for name in ("max_steps", "eval_max_steps"):
        if chosen.get(name, 1) == 0:
            raise ValueError(f"{name} must be at least 1, got 0: the pyramid would stay zero")
    # Who asks for a tolerance expects gradients that are as good.
    return dict(PRESETS[preset or ("accurate" if "rtol" in chosen else "fast")]) | chosen


def as_dtype(autocast: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that a setting stands for.

    Raises:
        ValueError: If it is no lower precision.
    """
    dtype = {str(d).removeprefix("torch."): d for d in _HALF}.get(str(autocast).removeprefix("torch."))
    if autocast is not None and dtype is None:
        raise ValueError(f"unknown autocast {autocast!r}; accepted: 'bfloat16', 'float16', None")
    return dtype


class ResidualLikeIteration(nn.Module):
    """One residual-like iteration, P -> G(P + B); for a G that injects B itself, P -> G(P, B).

    Args:
        transform: G.
        autocast: Lower precision that G is computed in, whatever the precision of the state; None for no change.
    """

    def __init__(self, transform: nn.Module, autocast: torch.dtype | None = None):
        super().__init__()
        self.transform = transform
        self.autocast = autocast

    def forward(
        self, pyramid: Sequence[Tensor], basis: Sequence[Tensor], masks: Masks | None = None
    ) -> Sequence[Tensor]:
        """Take the step.

        Args:
            pyramid: P, L maps of shapes (B, C, H_j, W_j), finest first.
            basis: B, likewise, zero in the padding.
            masks: Where the images are, one (B, 1, H_j, W_j) per level; None if nothing is padded.

        Returns:
            L maps of the shapes and dtypes of `pyramid`.
        """
        device = basis[0].device.type
        if self.autocast is None:
            out = self._apply_transform(pyramid, basis, masks)
        else:
            # To the next evaluation with gradient, a cast that this one caches would be a tensor that G closes over.
            cache = torch.is_autocast_cache_enabled() and not torch.is_grad_enabled()
            with torch.autocast(device, dtype=self.autocast, cache_enabled=cache):
                out = self._apply_transform(pyramid, basis, masks)
        if self.autocast is not None or autocast_enabled(device):
            out = [o.to(p.dtype) for o, p in zip(out, pyramid, strict=True)]
        return out

    def casts_kept(self, device: str) -> contextlib.AbstractContextManager[Any]:
        """A block in which weights are cast to the lower precision once, and not in each evaluation without gradient.

        PyTorch keeps such casts until the outermost autocast block ends; this one changes nothing else. Those of an
        earlier call, which weights may have changed since, are not used.
        """
        if self.autocast is None or torch.compiler.is_compiling():
            return contextlib.nullcontext()
        torch.clear_autocast_cache()
        cache, dtype = torch.is_autocast_cache_enabled(), torch.get_autocast_dtype(device)
        return torch.autocast(device, dtype=dtype, enabled=autocast_enabled(device), cache_enabled=cache)

    def zero_init_(self) -> None:
        """Let G be zero, whatever its input; without a G there is nothing to do.

        Raises:
            ValueError: If G cannot.
        """
        if isinstance(self.transform, nn.Identity):
            return
        zero_init = getattr(self.transform, "zero_init_", None)
        if zero_init is None:
            raise ValueError(f"{type(self.transform).__name__} has no zero_init_, and so cannot start at zero")
        zero_init()

    def _apply_transform(
        self, pyramid: Sequence[Tensor], basis: Sequence[Tensor], masks: Masks | None
    ) -> Sequence[Tensor]:
        if getattr(self.transform, "injects", False):
            return self.transform(pyramid, masks, basis)
        z = [p + b for p, b in zip(pyramid, basis, strict=True)]
        return self.transform(z) if masks is None else self.transform(z, masks)

    def resolution(self) -> float:
        """Relative precision of G where it is computed in half precision, 0 otherwise."""
        like = next(self.parameters(), None)
        if like is None:
            return 0.0
        device = like.device.type
        dtype = torch.get_autocast_dtype(device) if autocast_enabled(device) else like.dtype
        dtype = self.autocast or dtype
        return torch.finfo(dtype).eps if dtype in _HALF else 0.0
