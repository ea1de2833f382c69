"""Stateless, typed PyTorch primitives for dense self-supervised learning.

The modules, whose public names can all be imported from the package too, but for those of
`viz`, `testing`, `typing` and `recipes`:

    numerics: Numerics that several modules share: unit vectors, masked means, wider dtypes, rows of
        maps.
    distributed: Sums, means and rows over processes, with their gradients; the identity without a
        group.
    schedules: Schedules: pure functions of the training step, in plain Python numbers.
    ema: Momentum update of a teacher: an exponential moving average of a student's weights.
    bank: A bank of keys, first in, first out: the source of negatives in MoCo and related methods.
    boxes: Box algebra, and random selection and placement of boxes.
    views: Views of an image: a crop box and flips, the maps between the frames, overlap, cropping.
    adapters: Views from and to what other libraries record of a crop: so that any of them may do
        the cropping.
    sampling: Points in regions, and features at points: how the same image point is found in two
        views.
    matching: Correspondences of two views: by place, by feature, and by regions that both views
        contain.
    pooling: Features of regions: RoIAlign of boxes, levels of a feature pyramid, sums over soft
        masks.
    regions: Region augmentations: proposals are jittered, cut, covered, shifted, and pasted on
        other images.
    clustering: Clustering of tokens: Sinkhorn transport, merging of centroids, pruning.
    k_means: k-means: start centroids, Lloyd's iteration, batches of a large set, the nearest
        centroid.
    sorting: Differentiable sorting: a fixed network of comparisons, each of which mixes its two
        values.
    losses: Losses of rows: of single rows, of rows against others, and of the structure of a set of
        rows.
    metrics: Scores of predictions: confusion, IoU, matched clusters, accuracy, precision,
        intervals.
    probes: Classifiers on frozen features: linear layers and support vector machines, and their
        scores.
    neighbors: Nearest neighbors by cosine: votes for classes, nearest rows, retrieval of maps.
    video: Videos: labels propagated from frame to frame, and the scores J and F of object masks.
    diagnostics: Measures of a model without labels: affinity, similarity against IoU, coupling,
        health.
    scenes: Procedural scenes of many objects, with ground truth, for tests, demos and
        documentation.
    viz: Pictures of views, clusters, features and scores: matplotlib figures, and the colors in
        them.
    testing: Checks that your tests call on your code: the same on any number of processes, right
        geometry.
    typing: Functions with checked shapes: the `typed` decorator and the aliases that signatures
        share.
    recipes: The recipes that come with densekit, and copies of them to change.

Start with `help(densekit.views)`, or with README.md.
"""

from densekit.adapters import (
    view_from_albumentations,
    view_from_kornia,
    view_from_lightly_train,
    view_from_torchvision,
    view_to_albumentations,
    view_to_kornia,
    view_to_lightly_train,
    view_to_torchvision,
)
from densekit.bank import Bank, Negatives, bank_negatives, init_bank, push_to_bank, sample_keys
from densekit.boxes import (
    SampledBoxes,
    box_area,
    box_containment,
    box_iou,
    boxes_valid,
    clip_boxes,
    intersect_boxes,
    sample_boxes,
    sample_boxes_at_iou,
)
from densekit.clustering import (
    MergedClusters,
    PrunedClusters,
    positional_cost,
    prune_clusters,
    sample_tokens,
    sinkhorn,
    sinkhorn_merge,
    split_assignments,
    swav_codes,
)
from densekit.diagnostics import (
    CouplingImages,
    DenseStructure,
    LayerBias,
    SimilarityCurve,
    affinity_matrix,
    coupling_images,
    coupling_rate,
    dense_structure_score,
    effective_rank,
    layer_bias,
    layer_features,
    mean_cosine_similarity,
    norm_outliers,
    off_diagonal_cosine,
    pca_colors,
    position_share,
    similarity_iou_curve,
)
from densekit.distributed import (
    all_gather,
    all_max,
    all_mean,
    all_sum,
    shuffle_batch,
    unshuffle_batch,
)
from densekit.ema import ema_update
from densekit.k_means import KMeans, kmeans, kmeans_plus_plus, minibatch_kmeans, nearest_centroids
from densekit.losses import (
    VarianceCovariance,
    cross_entropy_similarity,
    gram_loss,
    info_nce,
    kernel_alignment,
    mutual_information_loss,
    negative_cosine,
    neighbor_distribution_loss,
    neighbor_order_loss,
    self_distillation,
    symmetric_loss,
    update_center,
    variance_covariance,
)
from densekit.matching import (
    Matches,
    PairedBoxes,
    candidate_regions,
    match_by_feature,
    match_by_place,
    positive_pairs,
    take_rows,
)
from densekit.metrics import (
    Accuracy,
    ConfusionScores,
    Interval,
    accuracy,
    as_dict,
    as_table,
    average_precision,
    bootstrap,
    confusion_matrix,
    confusion_scores,
    group_scores,
    match_clusters,
    mean_iou,
    merge_clusters,
)
from densekit.neighbors import Neighbors, knn_votes, nearest_maps, nearest_rows, object_knn
from densekit.numerics import l2_normalize, map_to_rows, masked_mean, rows_to_map, widen
from densekit.pooling import RoIFeatures, assign_levels, pool_masks, roi_align
from densekit.probes import (
    LinearProbe,
    SegmentationScore,
    fit_linear_probe,
    fit_svm,
    linear_maps,
    linear_segmentation,
    probe_scenes,
    segmentation_counts,
    train_linear_probe,
)
from densekit.regions import (
    Cutout,
    boxes_to_mask,
    composite,
    fill_mask,
    proposal_cutout,
    sample_cutout,
    sample_inner_boxes,
    sample_jittered_boxes,
    sample_shift,
    sample_surrounding_boxes,
    shift_boxes,
)
from densekit.sampling import (
    PairedFeatures,
    PairedPoints,
    grid_pairs,
    grid_points,
    gridsample,
    gridsample_pairs,
    hard_points,
    patch_pairs,
    sample_points,
)
from densekit.scenes import SCENE_CLASSES, Scenes, sample_scenes
from densekit.schedules import cosine_schedule, linear_schedule, warmup_cosine
from densekit.sorting import SoftSort, soft_sort
from densekit.video import boundary_f_measure, propagate_labels, propagate_video, region_similarity
from densekit.views import (
    BoxesInView,
    MatrixViews,
    Overlap,
    PairedViews,
    View,
    ViewPairs,
    boxes_image_to_view,
    boxes_in_view,
    boxes_view_to_image,
    check_views,
    coordinate_map,
    crop_views,
    full_view,
    image_to_view,
    index_views,
    intersect_views,
    pair_views,
    sample_inner_views,
    sample_view_pairs,
    sample_views,
    stack_views,
    unstack_views,
    view_from_matrix,
    view_from_relative,
    view_from_xywh,
    view_to_image,
    view_to_matrix,
    views_to,
    views_valid,
)

__version__ = "0.1.0"

__all__ = [
    "SCENE_CLASSES",
    "Accuracy",
    "Bank",
    "BoxesInView",
    "ConfusionScores",
    "CouplingImages",
    "Cutout",
    "DenseStructure",
    "Interval",
    "KMeans",
    "LayerBias",
    "LinearProbe",
    "Matches",
    "MatrixViews",
    "MergedClusters",
    "Negatives",
    "Neighbors",
    "Overlap",
    "PairedBoxes",
    "PairedFeatures",
    "PairedPoints",
    "PairedViews",
    "PrunedClusters",
    "RoIFeatures",
    "SampledBoxes",
    "Scenes",
    "SegmentationScore",
    "SimilarityCurve",
    "SoftSort",
    "VarianceCovariance",
    "View",
    "ViewPairs",
    "accuracy",
    "affinity_matrix",
    "all_gather",
    "all_max",
    "all_mean",
    "all_sum",
    "as_dict",
    "as_table",
    "assign_levels",
    "average_precision",
    "bank_negatives",
    "bootstrap",
    "boundary_f_measure",
    "box_area",
    "box_containment",
    "box_iou",
    "boxes_image_to_view",
    "boxes_in_view",
    "boxes_to_mask",
    "boxes_valid",
    "boxes_view_to_image",
    "candidate_regions",
    "check_views",
    "clip_boxes",
    "composite",
    "confusion_matrix",
    "confusion_scores",
    "coordinate_map",
    "cosine_schedule",
    "coupling_images",
    "coupling_rate",
    "crop_views",
    "cross_entropy_similarity",
    "dense_structure_score",
    "effective_rank",
    "ema_update",
    "fill_mask",
    "fit_linear_probe",
    "fit_svm",
    "full_view",
    "gram_loss",
    "grid_pairs",
    "grid_points",
    "gridsample",
    "gridsample_pairs",
    "group_scores",
    "hard_points",
    "image_to_view",
    "index_views",
    "info_nce",
    "init_bank",
    "intersect_boxes",
    "intersect_views",
    "kernel_alignment",
    "kmeans",
    "kmeans_plus_plus",
    "knn_votes",
    "l2_normalize",
    "layer_bias",
    "layer_features",
    "linear_maps",
    "linear_schedule",
    "linear_segmentation",
    "map_to_rows",
    "masked_mean",
    "match_by_feature",
    "match_by_place",
    "match_clusters",
    "mean_cosine_similarity",
    "mean_iou",
    "merge_clusters",
    "minibatch_kmeans",
    "mutual_information_loss",
    "nearest_centroids",
    "nearest_maps",
    "nearest_rows",
    "negative_cosine",
    "neighbor_distribution_loss",
    "neighbor_order_loss",
    "norm_outliers",
    "object_knn",
    "off_diagonal_cosine",
    "pair_views",
    "patch_pairs",
    "pca_colors",
    "pool_masks",
    "position_share",
    "positional_cost",
    "positive_pairs",
    "probe_scenes",
    "propagate_labels",
    "propagate_video",
    "proposal_cutout",
    "prune_clusters",
    "push_to_bank",
    "region_similarity",
    "roi_align",
    "rows_to_map",
    "sample_boxes",
    "sample_boxes_at_iou",
    "sample_cutout",
    "sample_inner_boxes",
    "sample_inner_views",
    "sample_jittered_boxes",
    "sample_keys",
    "sample_points",
    "sample_scenes",
    "sample_shift",
    "sample_surrounding_boxes",
    "sample_tokens",
    "sample_view_pairs",
    "sample_views",
    "segmentation_counts",
    "self_distillation",
    "shift_boxes",
    "shuffle_batch",
    "similarity_iou_curve",
    "sinkhorn",
    "sinkhorn_merge",
    "soft_sort",
    "split_assignments",
    "stack_views",
    "swav_codes",
    "symmetric_loss",
    "take_rows",
    "train_linear_probe",
    "unshuffle_batch",
    "unstack_views",
    "update_center",
    "variance_covariance",
    "view_from_albumentations",
    "view_from_kornia",
    "view_from_lightly_train",
    "view_from_matrix",
    "view_from_relative",
    "view_from_torchvision",
    "view_from_xywh",
    "view_to_albumentations",
    "view_to_image",
    "view_to_kornia",
    "view_to_lightly_train",
    "view_to_matrix",
    "view_to_torchvision",
    "views_to",
    "views_valid",
    "warmup_cosine",
    "widen",
]
