"""Box algebra and RoI pooling. Boxes are `xyxy`, half-open, in continuous pixels."""

import math
from typing import NamedTuple

import torch
from densekit.typing import Bool, Float, Int, Size, Tensor, typed, widen

__all__ = [
    "RoIFeatures",
    "SampledBoxes",
    "assign_levels",
    "box_area",
    "box_containment",
    "box_iou",
    "boxes_valid",
    "clip_boxes",
    "intersect_boxes",
    "roi_align",
    "sample_boxes",
    "sample_boxes_at_iou",
]


class SampledBoxes(NamedTuple):
    """Some boxes of each image.

    Attributes:
        boxes: As many for each image.
        valid: False where the image had no more; a copy of its first box stands there.
    """

    boxes: Float[Tensor, "*batch count 4"]
    valid: Bool[Tensor, "*batch count"]


class RoIFeatures(NamedTuple):
    """Features pooled from boxes.

    Attributes:
        features: One small map for each box; zeros where not valid.
        valid: True for a box that was asked for and encloses an area.
    """

    features: Float[Tensor, "*batch n d bins_y bins_x"]
    valid: Bool[Tensor, "*batch n"]


@typed
def boxes_valid(boxes: Float[Tensor, "*batch 4"]) -> Bool[Tensor, "*batch"]:
    """Tell the boxes that enclose an area from the reversed, empty, infinite and NaN ones.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame.

    Returns:
        True where all four numbers are finite and `x1 < x2` and `y1 < y2`.

    Examples:
        >>> boxes_valid(torch.tensor([[0.0, 0.0, 2.0, 1.0], [2.0, 0.0, 0.0, 1.0]]))
        tensor([ True, False])

    References:
        House convention: what makes no sense is reported through `valid`, never raised.
    """
    return _valid(boxes)


@typed
def box_area(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """Area of each box; zero for a box that is not valid.

    Half precision is widened to float32, where the area of an image does not overflow.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame.

    Returns:
        `(x2 - x1)(y2 - y1)` in the squared unit of the boxes' frame.

    Examples:
        >>> box_area(torch.tensor([[1.0, 1.0, 3.0, 2.0], [2.0, 0.0, 0.0, 1.0]]))
        tensor([2., 0.])

    References:
        torchvision's `box_area`, which gives negative areas to reversed boxes.
    """
    return _area(boxes)


@typed
def intersect_boxes(
    boxes1: Float[Tensor, "*batch 4"], boxes2: Float[Tensor, "*batch 4"]
) -> Float[Tensor, "*batch 4"]:
    """Intersection of two boxes, pair by pair.

    Args:
        boxes1: Boxes `(x1, y1, x2, y2)`.
        boxes2: Boxes in the same frame.

    Returns:
        The box of the points inside both; all zeros where the two share no area or one of them
        is not valid, so that `boxes_valid` of the result tells which exist.

    Examples:
        >>> intersect_boxes(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, -1, 3, 1]))
        tensor([1., 0., 2., 1.])

    References:
        DenseSiam, Sec 3.2 (the intersected region of two views).
    """
    return _intersection(boxes1, boxes2)


@typed
def box_iou(
    boxes1: Float[Tensor, "*batch 4"], boxes2: Float[Tensor, "*batch 4"]
) -> Float[Tensor, "*batch"]:
    """Intersection over union of two boxes, pair by pair.

    Half precision is widened to float32.

    Args:
        boxes1: Boxes `(x1, y1, x2, y2)`.
        boxes2: Boxes in the same frame.

    Returns:
        Area of the intersection over area of the union, in [0, 1]; zero where they share no area
        or one of them is not valid.

    Examples:
        >>> box_iou(torch.tensor([0.0, 0, 2, 1]), torch.tensor([1.0, 0, 3, 1]))
        tensor(0.3333)

    References:
        torchvision's `box_iou` (all pairs; NaN for empty boxes).
    """
    area1, area2, shared = _area(torch.stack([boxes1, boxes2, _intersection(boxes1, boxes2)]))
    union = area1 + area2 - shared
    return torch.where(union > 0, shared / torch.where(union > 0, union, 1.0), 0.0)


@typed
def box_containment(
    boxes1: Float[Tensor, "*batch 4"], boxes2: Float[Tensor, "*batch 4"]
) -> Float[Tensor, "*batch"]:
    """Share of each first box that lies inside the second, pair by pair.

    Half precision is widened to float32.

    Args:
        boxes1: Boxes `(x1, y1, x2, y2)`.
        boxes2: Boxes in the same frame.

    Returns:
        Area of the intersection over the area of the first box, in [0, 1]; zero where they share no
        area or one of them is not valid.

    Examples:
        >>> box_containment(torch.tensor([0.0, 0, 2, 1]), torch.tensor([1.0, 0, 9, 9]))
        tensor(0.5000)

    References:
        D3SSL, Sec 4.1 (proposals that a view contains).
    """
    area, shared = _area(torch.stack([boxes1, _intersection(boxes1, boxes2)]))
    return torch.where(area > 0, shared / torch.where(area > 0, area, 1.0), 0.0)


@typed
def clip_boxes(boxes: Float[Tensor, "*batch 4"], size: Size) -> Float[Tensor, "*batch 4"]:
    """Cut off what lies outside the image.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)` in pixels, or in a frame of which `size` is the extent.
        size: Size `(h, w)` of the image; `(1, 1)` for boxes in the frame of a view.

    Returns:
        The boxes inside the image; one that lies outside is empty, and so not valid.

    Raises:
        ValueError: The size is not positive.

    Examples:
        >>> clip_boxes(torch.tensor([-2.0, 1.0, 3.0, 9.0]), (4, 8))
        tensor([0., 1., 3., 4.])

    References:
        torchvision's `clip_boxes_to_image`.
    """
    if min(size) < 1:
        raise ValueError(f"densekit.boxes.clip_boxes: size is {size}; give a positive (h, w).")
    x1, y1, x2, y2 = boxes.unbind(-1)
    h, w = size
    return torch.stack([x1.clamp(0, w), y1.clamp(0, h), x2.clamp(0, w), y2.clamp(0, h)], -1)


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
            f"densekit.boxes.roi_align: size is {size}, sampling_ratio {sampling_ratio} and the "
            f"map {h} x {w}; give at least one bin, 0 or more points, and a map with cells."
        )
    valid = _valid(boxes) if valid is None else valid & _valid(boxes)
    boxes = torch.where(valid[..., None], boxes, 0.0)
    pooled = _pool_bins(features, boxes, bins, sampling_ratio)
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
            f"densekit.boxes.assign_levels: levels are {levels} and canonical_size "
            f"{canonical_size}; give lowest <= highest and a size above 0."
        )
    ratio = _area(boxes).detach().sqrt() / canonical_size
    return (canonical_level + ratio.log2() + 1e-6).floor().clamp(low, high).long()


@typed
def sample_boxes(
    boxes: Float[Tensor, "*batch n 4"],
    count: int,
    valid: Bool[Tensor, "*batch n"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> SampledBoxes:
    """Draw so many of each image's boxes, without replacement: ragged in, one length out.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame.
        count: How many to draw, K.
        valid: Boxes to draw from; all when left out. One that is reversed, empty or not finite
            is never drawn.
        generator: Source of the random numbers, on the boxes' device.

    Returns:
        The drawn boxes in random order, valid ones first. Where an image has too few the rest are
        copies of its first, so that statistics see real regions only, and are not valid; zeros
        where it has none.

    Raises:
        TypeError: The shapes do not fit.
        ValueError: The count is negative.

    Examples:
        >>> boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 3.0]]])
        >>> sample_boxes(boxes, 2)
        SampledBoxes(boxes=tensor([[[0., 0., 2., 2.],
                 [0., 0., 2., 2.]]]), valid=tensor([[ True, False]]))

    References:
        D3SSL, Sec 4.2 (the K proposals of an image); SoCo, Sec 3.2.
    """
    if count < 0:
        raise ValueError(f"densekit.boxes.sample_boxes: count is {count}; give 0 or more.")
    usable = _valid(boxes) if valid is None else valid & _valid(boxes)
    boxes = torch.nn.functional.pad(torch.where(usable[..., None], boxes, 0.0), (0, 0, 0, count))
    usable = torch.nn.functional.pad(usable, (0, count))
    draws = _rand(boxes, generator=generator).where(usable, -1.0)
    chosen = draws.topk(count).indices
    boxes = boxes.gather(-2, chosen[..., None].expand(*chosen.shape, 4))
    usable = usable.gather(-1, chosen)
    return SampledBoxes(torch.where(usable[..., None], boxes, boxes[..., :1, :]), usable)


@typed
def sample_boxes_at_iou(
    boxes: Float[Tensor, "*batch 4"], iou: float, *, generator: torch.Generator | None = None
) -> Float[Tensor, "*batch 4"]:
    """Draw boxes of the same size whose intersection over union with the given ones is known.

    A box is moved in a random direction; how the loss of overlap divides between x and y is random
    too. Boxes may leave the image.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame.
        iou: The intersection over union, in [0, 1]; at 0 the boxes touch at a corner.
        generator: Source of the random numbers, on the boxes' device.

    Returns:
        Moved boxes, in the same frame.

    Raises:
        ValueError: The IoU is outside [0, 1].

    Examples:
        >>> boxes = torch.tensor([0.2, 0.2, 0.6, 0.6])
        >>> box_iou(boxes, sample_boxes_at_iou(boxes, 0.25))
        tensor(0.2500)

    References:
        DUPR, Fig 5 (RoIs of a given IoU with a ground-truth box).
    """
    if not 0 <= iou <= 1:
        raise ValueError(
            f"densekit.boxes.sample_boxes_at_iou: iou is {iou}; give a number in [0, 1]."
        )
    draws = _rand(boxes, 3, generator=generator)
    shared = 2 * iou / (1 + iou)  # intersection over the area of one box: (1 - |dx|) (1 - |dy|)
    part = draws[..., :1]
    kept = shared ** torch.cat([part, 1 - part], -1)
    shift = torch.where(draws[..., 1:] < 0.5, kept - 1, 1 - kept)
    shift = shift * (boxes[..., 2:] - boxes[..., :2])
    return (boxes + torch.cat([shift, shift], -1)).to(boxes.dtype)


def _interpolation_weights(position: Tensor, cells: int) -> Tensor:
    """Linear interpolation along a line of `cells` cells: the weight of each, for each position.

    Positions run from 0 to 1 across the line. Nearer the end than half a cell, and outside, the
    outermost cell is repeated; slopes are one-sided.
    """
    center = (position * cells - 0.5).clamp(0, cells - 1)[..., None]
    left = center.detach().floor().clamp(max=max(cells - 2, 0))
    index = torch.arange(cells, dtype=position.dtype, device=position.device)
    right = torch.where(index == left + 1, center - left, 0.0)
    return torch.where(index == left, 1 - (center - left), right)


def _pool_bins(features: Tensor, boxes: Tensor, bins: Size, sampling_ratio: int) -> Tensor:
    """RoIAlign as `(*batch, n, bins_y, bins_x, d)`; a reversed box gives its bins mirrored."""
    (h, w), n = features.shape[-2:], boxes.shape[-2]
    x1, y1, x2, y2 = widen(boxes).unbind(-1)
    across = _bin_weights(x1, x2, bins[1], w, sampling_ratio).to(features.dtype)
    down = _bin_weights(y1, y2, bins[0], h, sampling_ratio).to(features.dtype)
    with torch.autocast(features.device.type, enabled=False):
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
    weights = torch.where(near[..., None], _interpolation_weights(position, cells), 0.0)
    return weights.sum(-2) / count


def _rand(boxes: Tensor, *shape: int, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers for each box, in at least float32: the same draws in half precision."""
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    shape = (*boxes.shape[:-1], *shape)
    return torch.rand(shape, generator=generator, dtype=dtype, device=boxes.device)


def _valid(boxes: Tensor) -> Tensor:
    extent = boxes[..., 2:] - boxes[..., :2]  # NaN or infinite when a coordinate is
    return ((extent > 0) & (extent < torch.inf)).all(-1)


def _area(boxes: Tensor) -> Tensor:
    boxes = widen(boxes)
    extent = torch.where(_valid(boxes)[..., None], boxes[..., 2:] - boxes[..., :2], 0.0)
    return extent[..., 0] * extent[..., 1]


def _intersection(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    corner = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    box = torch.cat([corner, torch.minimum(boxes1[..., 2:], boxes2[..., 2:])], -1)
    valid = _valid(torch.stack([boxes1, boxes2, box])).all(0)
    return torch.where(valid[..., None], box, 0.0)
