"""Features of regions: RoIAlign of boxes, levels of a feature pyramid, sums over soft masks."""

import math
from typing import NamedTuple

import torch
from einops import einsum
from densekit.boxes import box_area, boxes_valid, clip_boxes
from densekit.numerics import (
    check,
    check_cells,
    full_precision,
    interpolation_weights,
    safe_divide,
    widened,
)
from densekit.typing import Bool, Float, Int, Size, Tensor, typed

__all__ = ["RoIFeatures", "assign_levels", "pool_masks", "roi_align"]


class RoIFeatures(NamedTuple):
    """Features pooled from boxes.

    Attributes:
        features: One small map for each box; zeros where not valid.
        valid: True for a box that is to be used, and encloses an area, a part of it on the map.
    """

    features: Float[Tensor, "*batch n d bins_y bins_x"]
    valid: Bool[Tensor, "*batch n"]


@typed
def pool_masks(
    features: Float[Tensor, "*batch n d"],
    masks: Float[Tensor, "*batch n k"],
    valid: Bool[Tensor, "*batch n"] | None = None,
    *,
    average: bool = False,
) -> Float[Tensor, "*batch k d"]:
    r"""Pool the features of k regions as sums over soft masks.

    $e_k = \sum_n m_{nk} f_n$, as in the paper. With `average` the sum is divided by the region's
    mass, $\sum_n m_{nk}$, which gives the centroids of soft clusters.

    Args:
        features: Features of n cells or points.
        masks: Weight of each cell in each region, not negative.
        valid: Cells to use; by default all.
        average: Divide by the mass of the region. A region without mass is zero.

    Returns:
        One row of features for each region, in at least float32, because a sum in half precision
        overflows.

    Examples:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
        >>> pool_masks(features, torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
        tensor([[1.0000, 0.5000],
                [2.0000, 2.5000]])

    References:
        DenseSiam, Eq 4 (masks softmax(z'), features gridsample(f(x))); CrOC, Eq 1 and 2
        (centroids).
    """
    dtype = torch.promote_types(torch.promote_types(features.dtype, masks.dtype), torch.float32)
    values = features.to(dtype)
    weights = masks.to(dtype)
    if valid is not None:
        values = torch.where(valid[..., None], values, 0.0)
        weights = torch.where(valid[..., None], weights, 0.0)
    with full_precision(features):
        regions = einsum(weights, values, "... n k, ... n d -> ... k d")
    if average:
        mass = weights.sum(-2)[..., None]
        regions = safe_divide(regions, mass)
    return regions


@typed
def roi_align(
    features: Float[Tensor, "*batch d h w"],
    boxes: Float[Tensor, "*batch n 4"],
    size: int | Size,
    valid: Bool[Tensor, "*batch n"] | None = None,
    *,
    sampling_ratio: int = 2,
) -> RoIFeatures:
    """Pool the features of each box into a small map of fixed size (RoIAlign).

    Each box is split into equal bins, and each bin is the mean of the bilinear features at regular
    points inside it. The weights of upright boxes are separable, so a box needs two small matrix
    products, which are computed in float32 and rounded to the dtype of the features. The function
    is deterministic on every device, and twice differentiable, also with respect to the boxes. A
    NaN in a map reaches all boxes of this map. Time and memory grow with the number of boxes times
    the height of the map, so the function suits few boxes a map, or small maps. The result is that
    of torchvision's `roi_align` with `aligned=True`.

    Args:
        features: One feature map for each batch entry.
        boxes: n boxes `(x1, y1, x2, y2)` of each map, in the map's frame, which is [0, 1] across
            the map; divide boxes in pixels by the image's width and height. Points that lie outside
            the map by more than half a cell count as zero.
        size: Bins `(bins_y, bins_x)`; a number S means S x S.
        valid: Boxes to use, where their number differs between images; by default all.
        sampling_ratio: Number of points in a bin along each axis. With 0 it is the number of cells
            along the bin, rounded up; a box that is larger than the map uses the number for a box
            of the map's size.

    Returns:
        The pooled maps and which of them are valid. The maps have the features' dtype and are
        channels-last in memory. A box that is reversed, empty or not finite is not valid, nor is
        one that shares no area with the map, as most boxes in pixels do. Features and all gradients
        are zero where not valid.

    Raises:
        TypeError: The leading axes, or those of `valid`, do not match.
        ValueError: The size is not positive, the ratio is negative, or the map has no cell.

    Examples:
        >>> features = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
        >>> roi_align(features, torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]]), 1)
        RoIFeatures(features=tensor([[[[1.5000]]],
        <BLANKLINE>
        <BLANKLINE>
                [[[0.0000]]]]), valid=tensor([ True, False]))

    References:
        Mask R-CNN, Sec 3; DUPR, Eq 3 and 4.
    """
    bins = (size, size) if isinstance(size, int) else size
    h, w = features.shape[-2:]
    check("pooling.roi_align", "size", size, min(bins) >= 1, "at least one bin")
    check("pooling.roi_align", "sampling_ratio", sampling_ratio, sampling_ratio >= 0, "0 or more")
    check_cells("pooling.roi_align", "the map", (h, w))

    usable = boxes_valid(boxes) & boxes_valid(clip_boxes(boxes, (1, 1)))
    valid = usable if valid is None else valid & usable
    boxes = torch.where(valid[..., None], boxes, 0.0)
    pooled = pool_bins(features, boxes, bins, sampling_ratio)
    pooled = torch.where(valid[..., None, None, None], pooled, 0.0)
    return RoIFeatures(pooled.movedim(-1, -3), valid)


@typed
def assign_levels(
    boxes: Float[Tensor, "*batch 4"],
    *,
    levels: tuple[int, int] = (2, 5),
    canonical_size: float = 224.0,
    canonical_level: int = 4,
) -> Int[Tensor, "*batch"]:
    """Assign each box to the level of a feature pyramid that fits its size.

    The level is `floor(k0 + log2(sqrt(area) / s0))`, clamped to the levels that exist. To pool from
    one level, use `valid = assigned == level`. As in torchvision's `MultiScaleRoIAlign`, 1e-6 is
    added before the floor to absorb rounding errors.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)` in pixels of the network's input.
        levels: Lowest and highest level; level k has stride `2 ** k`.
        canonical_size: Side s0, in pixels, of a box that belongs to the canonical level.
        canonical_level: The canonical level k0.

    Returns:
        The level of each box; the lowest level for a box that is not valid.

    Raises:
        ValueError: The levels are reversed, or the size is not positive.

    Examples:
        >>> assign_levels(torch.tensor([[0.0, 0.0, 224.0, 224.0], [0.0, 0.0, 50.0, 50.0]]))
        tensor([4, 2])

    References:
        FPN, Eq 1.
    """
    low, high = levels
    large = canonical_size > 0
    check("pooling.assign_levels", "levels", levels, low <= high, "(lowest, highest)")
    check("pooling.assign_levels", "canonical_size", canonical_size, large, "one above 0")

    ratio = box_area(boxes).detach().sqrt() / canonical_size
    return (canonical_level + ratio.log2() + 1e-6).floor().clamp(low, high).long()


def pool_bins(features: Tensor, boxes: Tensor, bins: Size, sampling_ratio: int) -> Tensor:
    """Compute RoIAlign as `(*batch, n, bins_y, bins_x, d)`; a reversed box gives mirrored bins."""
    h, w = features.shape[-2:]
    x1, y1, x2, y2 = widened(boxes).unbind(-1)
    across = _bin_weights(x1, x2, bins[1], w, sampling_ratio).to(features.dtype)
    down = _bin_weights(y1, y2, bins[0], h, sampling_ratio).to(features.dtype)
    with full_precision(features):
        # One product pools all boxes of a map, so that the map is not repeated for each box.
        rows = across.flatten(-3, -2)[..., None, :, :] @ features.movedim(-3, -1)
        rows = rows.unflatten(-2, (boxes.shape[-2], bins[1]))
        rows = rows.movedim(-4, -3)  # (*batch, n, h, bins_x, d)
        return (down @ rows.flatten(-2)).unflatten(-1, rows.shape[-2:])


def _bin_weights(start: Tensor, stop: Tensor, bins: int, cells: int, ratio: int) -> Tensor:
    """Compute weights `(*batch, bins, cells)` that average cells on a line over equal bins."""
    most = ratio or math.ceil(cells / bins)
    extent = (stop - start)[..., None, None]
    spanned = extent.detach().abs() * (cells / bins)
    count = (spanned - 1e-4).ceil().clamp(1, most)  # rounding adds no point
    count = torch.full_like(count, most) if ratio else count

    sample = torch.arange(most, dtype=start.dtype, device=start.device)
    bin_ = torch.arange(bins, dtype=start.dtype, device=start.device)[:, None]
    position = start[..., None, None] + extent * ((bin_ + (sample + 0.5) / count) / bins)
    near = (position * cells >= -0.5) & (position * cells <= cells + 0.5) & (sample < count)
    weights = torch.where(near[..., None], interpolation_weights(position, cells), 0.0)
    return weights.sum(-2) / count
