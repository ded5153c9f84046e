"""Detection data: sets in the layout of COCO-2017 or Pascal VOC, and a generator of synthetic ones."""

from adapters.detection.data.annotations import (
    CocoAnnotations,
    DataError,
    find_splits,
    merge_categories,
    read_annotations,
)
from adapters.detection.data.coco import BoxReport, CocoDetection
from adapters.detection.data.image_files import verify_images
from adapters.detection.data.module import CocoDataModule
from adapters.detection.data.synthetic import SyntheticSettings, generate_dataset
from adapters.detection.data.voc import read_voc

__all__ = [
    "BoxReport",
    "CocoAnnotations",
    "CocoDataModule",
    "CocoDetection",
    "DataError",
    "SyntheticSettings",
    "find_splits",
    "generate_dataset",
    "merge_categories",
    "read_annotations",
    "read_voc",
    "verify_images",
]
