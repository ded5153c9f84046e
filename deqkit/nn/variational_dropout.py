"""L6. Variational dropout: one mask per solve.

Dropout that draws anew at every call makes f another function at every evaluation, which has no fixed point. With one
mask for all evaluations of a solve and for its backward pass f is a function, another one in each solve (Gal &
Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", NeurIPS 2016, arXiv
1512.05287, where the mask is the same in all time steps).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from deqkit import held
from deqkit.state import autocast_enabled


class VariationalDropout(nn.Module):
    """Dropout whose mask stays the same throughout a solve, in its backward pass too.

    In training mode each number is dropped with probability p and the others are divided by 1 - p; in eval mode the
    module does nothing. Every `deqkit.solve` (and so every `FixedPoint`) draws a mask of its own, on the device of the
    input, from PyTorch's global generator, at the first evaluation of f. The mask belongs to the solve and not to the
    module: there is nothing to reset, to save or to move, and solves may be nested or run in several threads.

    Within one solve a module has one mask for each shape and device: used twice on inputs of one shape, it drops the
    same numbers twice. Where that is not meant, use two modules.

    Outside of a solve, in training mode, there is no mask, and calling the module is an error: put what belongs
    together into a `deqkit.nn.hold` block.

    What is kept grows by 1 / (1 - p), and the norm of f may grow with it: a block that contracts by 0.9 need not do so
    behind a rate of 0.5.

    Args:
        p: probability of a number to be dropped, in [0, 1]. It can be changed between solves.
        shared_dims: dims along which the mask is the same; negative ones count from the end. ``(2, 3)`` drops whole
            channels of images (N, C, H, W), as `torch.nn.Dropout2d` does; ``(1,)`` drops the same features in all
            positions of sequences (N, L, D).

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: p out of range.
    """

    def __init__(self, p: float = 0.5, *, shared_dims: int | Iterable[int] = ()) -> None:
        super().__init__()
        if isinstance(p, bool) or not isinstance(p, (int, float)):
            raise TypeError(f"VariationalDropout: p must be a number, got {p!r}")
        if not 0 <= p <= 1:
            raise ValueError(f"VariationalDropout: p must be a probability in [0, 1], got {p}")
        dims = tuple(shared_dims) if isinstance(shared_dims, Iterable) else (shared_dims,)
        if not all(type(d) is int for d in dims):
            raise TypeError(f"VariationalDropout: shared_dims must be dims such as (2, 3), got {shared_dims!r}")
        self.p, self.shared_dims = float(p), dims

    def forward(self, x: Tensor) -> Tensor:
        """Drop numbers of x.

        Args:
            x: any shape, floating or complex.

        Returns:
            A tensor like x.

        Raises:
            IndexError: x lacks one of the shared dims.
            RuntimeError: in training mode, outside of a solve and of `hold`, or inside of activation checkpointing
                that does not know of the mask.
        """
        if not self.training or self.p == 0:
            return x
        return x * self._mask(x).to(x.real.dtype)

    def _mask(self, x: Tensor) -> Tensor:
        scope = held.current()
        if scope is None:
            raise RuntimeError(
                "VariationalDropout has no mask outside of a solve. Call it in deqkit.solve or deqkit.nn.FixedPoint, "
                "let several calls share masks in a block `with deqkit.nn.hold():`, take those of a solve by "
                "`with deqkit.nn.hold(solution=sol):`, or switch it off by eval(). "
                "(In activation checkpointing inside f: checkpoint(..., context_fn=deqkit.nn.hold_in_checkpoint).)"
            )
        if scope.is_checkpointed:
            raise RuntimeError(
                "VariationalDropout inside of activation checkpointing inside of f: the recomputation would not know "
                "the mask. Use checkpoint(..., use_reentrant=False, context_fn=deqkit.nn.hold_in_checkpoint), or "
                "checkpoint the solve as a whole."
            )
        shape = self._mask_shape(x.shape)

        def draw() -> Tensor:
            # Under autocast it may be needed in full precision later on.
            dtype = x.real.dtype
            if autocast_enabled(x.device):
                dtype = torch.promote_types(dtype, torch.float32)
            kept = torch.empty(shape, dtype=dtype, device=x.device).bernoulli_(1 - self.p)
            return kept / (1 - self.p) if self.p < 1 else kept

        return held.mask((self, shape, x.device), draw)

    def _mask_shape(self, shape: torch.Size) -> tuple[int, ...]:
        out = list(shape)
        for d in self.shared_dims:
            if not -len(out) <= d < len(out):
                raise IndexError(f"VariationalDropout: x has shape {tuple(shape)}, without the shared dim {d}")
            out[d] = 1
        return tuple(out)

    def extra_repr(self) -> str:
        """Settings shown by print()."""
        return f"p={self.p}" + (f", shared_dims={self.shared_dims}" if self.shared_dims else "")
