"""L0. Some samples of a batch, picked out of what is kept per sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deqkit.arrays import Array
from deqkit.state import Blocks


class Rows:
    """Some samples of a batch, in their order.

    Args:
        mask: which, bool (B,), on the host.
        device: where blocks of them are.
    """

    def __init__(self, mask: Array, device: torch.device) -> None:
        self.on_host = np.flatnonzero(mask)
        self.on_device = torch.from_numpy(self.on_host).to(device)

    def __len__(self) -> int:
        return len(self.on_host)

    def of(self, values: Array) -> Array:
        """Their part of values per sample (B, ...), as a copy."""
        return values[self.on_device] if isinstance(values, Tensor) else values[self.on_host]

    def of_blocks(self, blocks: Blocks) -> Blocks:
        """Their rows, as a copy."""
        return tuple(b.index_select(0, self.on_device) for b in blocks)

    def put(self, part: Blocks, into: Blocks) -> Blocks:
        """A copy of ``into`` (B, d) with their rows from ``part``."""
        return tuple(b.index_copy(0, self.on_device, p) for b, p in zip(into, part, strict=True))
