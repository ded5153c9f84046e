"""The order in which a training sees its images, as a function of the seed and the epoch alone.

Neither the number of loading processes nor a resume changes it, and the ranks of a distributed training share it out
without a word to one another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ["BatchOrder", "epoch_order", "seed_of"]


def seed_of(*numbers: int) -> int:
    """A seed in 0..2^63-1 that is different for every tuple of numbers, and the same in every process."""
    digest = hashlib.blake2b(repr(tuple(map(int, numbers))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def epoch_order(
    num_images: int,
    batch_size: int,
    seed: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    groups: Sequence[int] | None = None,
) -> list[int]:
    """Shuffled indices of one rank's images, of which every ``batch_size`` in a row make a batch.

    Args:
        num_images: Size of the set.
        batch_size: Images per batch and rank.
        seed: Seed of the shuffle.
        rank: Whose share is wanted.
        world_size: Number of ranks; all get equally many batches.
        groups: Group of every image, such as upright or not. The images of a batch are of one group where possible:
            what is left over of the groups at the end is put together.

    Returns:
        The indices. A last, incomplete batch is left out unless it is the only one.

    Raises:
        ValueError: Not every rank can have a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(num_images, generator=generator).tolist()
    if groups is not None:
        order = _gathered(order, batch_size, groups)
    whole = batch_size * world_size
    if num_images < whole and world_size == 1:
        return order
    if num_images < whole:
        raise ValueError(f"{num_images} images are too few for {world_size} processes with {batch_size} images each")
    batches = [order[i : i + batch_size] for i in range(0, num_images - num_images % whole, batch_size)]
    return [index for batch in batches[rank::world_size] for index in batch]


def _gathered(order: Sequence[int], batch_size: int, groups: Sequence[int]) -> list[int]:
    """The same images; a batch is complete when its group has enough of them."""
    waiting: dict[int, list[int]] = {}
    gathered: list[int] = []
    for index in order:
        batch = waiting.setdefault(groups[index], [])
        batch.append(index)
        if len(batch) == batch_size:
            gathered += batch
            batch.clear()
    return gathered + [index for batch in waiting.values() for index in batch]


class BatchOrder(Sampler[int]):
    """A given order, of which a resumed epoch has seen a part.

    Its length is that of the whole epoch, as Lightning counts on.

    Args:
        order: Indices.
        start: How many of them have been seen.
    """

    def __init__(self, order: Sequence[int], start: int = 0) -> None:
        self.order, self.start = list(order), start

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order[self.start :])
