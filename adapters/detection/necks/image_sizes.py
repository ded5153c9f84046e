"""The sizes of the images of a batch, remembered with the feature maps that were computed from them.

A neck is told them before a forward pass. `torch.utils.checkpoint` runs that pass a second time, in backward, when
nobody tells and other batches may have gone through since; but it gives the same maps again, or detached ones of the
same storage. So what was told is remembered for as long as that storage lives.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

__all__ = ["ImageSizes", "sizes_for"]

ImageSizes = tuple[list[tuple[int, int]], tuple[int, int]]
"""`(h, w)` of every image, and of the batch that they were padded to."""

_SIZES: WeakKeyDictionary[torch.UntypedStorage, tuple[int, dict[tuple[int, ...], ImageSizes]]] = WeakKeyDictionary()


def sizes_for(features: Tensor, told: ImageSizes | None) -> ImageSizes:
    """The sizes of the images that feature maps come from.

    Args:
        features: One of the maps, shape (B, C, H, W).
        told: What the neck was told; None takes what it was told when it last saw these maps.

    Raises:
        RuntimeError: Nobody told.
    """
    known, place = _known(features), (int(features.storage_offset()), *features.shape)
    sizes = told or known.get(place)
    if sizes is None:
        raise RuntimeError(
            "mask_padding=True, but nobody told the sizes of the images: convert the whole detector by convert_fpn_, "
            "or call set_image_sizes before every forward pass (and, if a checkpointed function computes the "
            "backbone's maps, inside it)"
        )
    known[place] = sizes
    return sizes


def _known(features: Tensor) -> dict[tuple[int, ...], ImageSizes]:
    """What is known of the maps in a storage, by place and shape; empty again once they have been written over."""
    if torch.compiler.is_compiling() or features.is_inference():
        return {}
    try:
        storage = features.untyped_storage()
    except NotImplementedError:  # the tensors of torch.func have none
        return {}
    version, known = _SIZES.get(storage, (-1, {}))
    if version != features._version:
        _SIZES[storage] = features._version, (known := {})
    return known
