"""Features of regions: RoIAlign of boxes, levels of a feature pyramid, sums over soft masks."""

import math
from typing import NamedTuple

import torch
from einops import einsum
from densekit.boxes import box_area, boxes_valid
from densekit.numerics import full_precision, interpolation_weights, safe_divide, widened
from densekit.typing import Bool, Float, Int, Size, Tensor, typed

__all__ = ["RoIFeatures", "assign_levels", "pool_masks", "roi_align"]


class RoIFeatures(NamedTuple):
    """Features pooled from boxes.

    Attributes:
        features: One small map for each box; zeros where not valid.
        valid: True for a box that was asked for and encloses an area.
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
    """Embed k regions as sums of features, weighted by soft masks.

    `e_k = sum_n m_nk f_n`, as the paper has it; with `average` divided by the region's mass,
    `sum_n m_nk`.

    Args:
        features: Features of n cells or points.
        masks: Weight of each cell in each region, not negative.
        valid: Cells to use; all when left out.
        average: Divide by the mass of the region. A region without mass is zero.

    Returns:
        One row of features a region, in at least float32 (a sum of half precision overflows).

    Examples:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
        >>> pool_masks(features, torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
        tensor([[1.0000, 0.5000],
                [2.0000, 2.5000]])

    References:
        DenseSiam, Eq 4 (masks softmax(z'), features gridsample(f(x))).
    """
    dtype = torch.promote_types(torch.promote_types(features.dtype, masks.dtype), torch.float32)
    values, weights = features.to(dtype), masks.to(dtype)
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

    Each box is split into equal bins, and a bin is the mean of the bilinear features at regular
    points inside it. For upright boxes the weights are separable: two small matrix products a box,
    made in float32 and rounded to the dtype of the features. Deterministic on every device,
    differentiable twice, in the boxes too. A NaN in a map reaches all of its boxes. Time and memory
    grow with the boxes times the map's height: made for few boxes a map, or small maps.

    Args:
        features: One feature map for each batch entry.
        boxes: n boxes `(x1, y1, x2, y2)` of each map, in the map's frame: [0, 1] across it; divide
            boxes in pixels by the image's width and height. Parts outside by more than half a cell
            count as zero.
        size: Bins `(bins_y, bins_x)`; a number S for S x S.
        valid: Boxes to use, where their number differs from image to image; all when left out.
        sampling_ratio: Points of a bin along each axis; 0 for as many as cells lie along the bin,
            rounded up (a box larger than the map takes no more than one of its size).

    Returns:
        The pooled maps, of the features' dtype and channels-last in memory, and which are valid. A
        box that is reversed, empty or not finite is not valid; where not valid, features and all
        gradients are zero.

    Raises:
        TypeError: The leading axes, or those of `valid`, do not fit.
        ValueError: The size is not positive, the ratio negative, or the map has no cell.

    Examples:
        >>> features = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
        >>> roi_align(features, torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]]), 1)
        RoIFeatures(features=tensor([[[[1.5000]]],
        <BLANKLINE>
        <BLANKLINE>
                [[[0.0000]]]]), valid=tensor([ True, False]))

    References:
        Mask R-CNN, Sec 3; torchvision's `roi_align` with `aligned=True`; DUPR, Eq 3 and 4.
    """
    bins = (size, size) if isinstance(size, int) else size
    h, w = features.shape[-2:]
    if min(bins) < 1 or sampling_ratio < 0 or h * w == 0:
        raise ValueError(
            f"densekit.pooling.roi_align: size is {size}, sampling_ratio {sampling_ratio} and the "
            f"map {h} x {w}; give at least one bin, 0 or more points, and a map with cells."
        )
    valid = boxes_valid(boxes) if valid is None else valid & boxes_valid(boxes)
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

    `floor(k0 + log2(sqrt(area) / s0))`, kept within the levels there are. Pool from each level
    with `valid = assigned == level`.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)` in pixels of the network's input.
        levels: Lowest and highest level; level k has stride `2 ** k`.
        canonical_size: Side s0 of the box, in pixels, that belongs to the canonical level.
        canonical_level: That level k0.

    Returns:
        The level of each box; the lowest one for a box that is not valid.

    Raises:
        ValueError: The levels are reversed, or the size is not positive.

    Examples:
        >>> assign_levels(torch.tensor([[0.0, 0.0, 224.0, 224.0], [0.0, 0.0, 50.0, 50.0]]))
        tensor([4, 2])

    References:
        FPN, Eq 1; torchvision's `MultiScaleRoIAlign` (whose 1e-6 against rounding is kept).
    """
    low, high = levels
    if low > high or not canonical_size > 0:
        raise ValueError(
            f"densekit.pooling.assign_levels: levels are {levels} and canonical_size "
            f"{canonical_size}; give lowest <= highest and a size above 0."
        )
    ratio = box_area(boxes).detach().sqrt() / canonical_size
    return (canonical_level + ratio.log2() + 1e-6).floor().clamp(low, high).long()


def pool_bins(features: Tensor, boxes: Tensor, bins: Size, sampling_ratio: int) -> Tensor:
    """RoIAlign as `(*batch, n, bins_y, bins_x, d)`; a reversed box gives its bins mirrored."""
    (h, w), n = features.shape[-2:], boxes.shape[-2]
    x1, y1, x2, y2 = widened(boxes).unbind(-1)
    across = _bin_weights(x1, x2, bins[1], w, sampling_ratio).to(features.dtype)
    down = _bin_weights(y1, y2, bins[0], h, sampling_ratio).to(features.dtype)
    with full_precision(features):
        # All boxes of a map in one product, so that no map is repeated for each of its boxes.
        rows = across.flatten(-3, -2)[..., None, :, :] @ features.movedim(-3, -1)
        rows = rows.unflatten(-2, (n, bins[1])).movedim(-4, -3)  # (*batch, n, h, bins_x, d)
        return (down @ rows.flatten(-2)).unflatten(-1, rows.shape[-2:])


def _bin_weights(start: Tensor, stop: Tensor, bins: int, cells: int, ratio: int) -> Tensor:
    """Weights `(*batch, bins, cells)` that average a line of cells over equal bins of a span."""
    start, extent = start[..., None, None], (stop - start)[..., None, None]
    most = ratio or math.ceil(cells / bins)
    spanned = extent.detach().abs() * (cells / bins)
    count = (spanned - 1e-4).ceil().clamp(1, most)  # whole cells stay whole, whatever the rounding
    count = torch.full_like(count, most) if ratio else count
    sample = torch.arange(most, dtype=start.dtype, device=start.device)
    bin_ = torch.arange(bins, dtype=start.dtype, device=start.device)[:, None]
    position = start + extent * ((bin_ + (sample + 0.5) / count) / bins)
    near = (position * cells >= -0.5) & (position * cells <= cells + 0.5) & (sample < count)
    weights = torch.where(near[..., None], interpolation_weights(position, cells), 0.0)
    return weights.sum(-2) / count
