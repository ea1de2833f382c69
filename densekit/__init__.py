"""Stateless, typed PyTorch primitives for dense self-supervised learning."""

from densekit.boxes import box_area, box_iou, boxes_valid, intersect_boxes
from densekit.losses import (
    cross_entropy_similarity,
    info_nce,
    l2_normalize,
    masked_mean,
    negative_cosine,
    symmetric_loss,
)
from densekit.metrics import (
    LinearProbe,
    SegmentationScore,
    confusion_matrix,
    fit_linear_probe,
    linear_segmentation,
    mean_iou,
    pca_colors,
)
from densekit.pooling import pool_masks
from densekit.sampling import (
    PairedFeatures,
    PairedPoints,
    grid_pairs,
    grid_points,
    gridsample,
    gridsample_pairs,
    hard_points,
    random_points,
)
from densekit.schedules import cosine_schedule, linear_schedule, warmup_cosine
from densekit.views import (
    Overlap,
    View,
    ViewPairs,
    boxes_image_to_view,
    boxes_view_to_image,
    coordinate_map,
    crop_views,
    full_view,
    image_to_view,
    intersect_views,
    sample_view_pairs,
    sample_views,
    view_to_image,
)

__version__ = "0.1.0"

__all__ = [
    "LinearProbe",
    "Overlap",
    "PairedFeatures",
    "PairedPoints",
    "SegmentationScore",
    "View",
    "ViewPairs",
    "box_area",
    "box_iou",
    "boxes_image_to_view",
    "boxes_valid",
    "boxes_view_to_image",
    "confusion_matrix",
    "coordinate_map",
    "cosine_schedule",
    "crop_views",
    "cross_entropy_similarity",
    "fit_linear_probe",
    "full_view",
    "grid_pairs",
    "grid_points",
    "gridsample",
    "gridsample_pairs",
    "hard_points",
    "image_to_view",
    "info_nce",
    "intersect_boxes",
    "intersect_views",
    "l2_normalize",
    "linear_schedule",
    "linear_segmentation",
    "masked_mean",
    "mean_iou",
    "negative_cosine",
    "pca_colors",
    "pool_masks",
    "random_points",
    "sample_view_pairs",
    "sample_views",
    "symmetric_loss",
    "view_to_image",
    "warmup_cosine",
]
