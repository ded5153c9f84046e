"""Averages over the ranks of a distributed training."""

import torch.distributed
from torch import Tensor

__all__ = ["mean_over_ranks"]


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average over the ranks; the values themselves where nothing is distributed.

    A loss divided by a normaliser that is averaged over ranks has, averaged over ranks as DDP averages its gradients,
    the value that one process would compute for all images. Every rank must call this equally often, so call it whether
    or not a rank has any objects.

    Args:
        values: Any shape, the same on every rank; not differentiated.

    Returns:
        The same shape.
    """
    values = values.detach()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    values = values.clone()
    torch.distributed.all_reduce(values)
    return values / torch.distributed.get_world_size()
