"""Points in regions, and features at points: how the same image point is found in two views."""

from typing import NamedTuple

import torch
from densekit.numerics import (
    check,
    check_cells,
    check_size,
    full_precision,
    interpolation_weights,
    map_to_rows,
    sample_uniform,
    take_rows,
    widened,
)
from densekit.pooling import pool_bins
from densekit.typing import Bool, Float, Size, Tensor, typed
from densekit.views import View, coordinate_map, image_to_view, intersect_views

__all__ = [
    "PairedFeatures",
    "PairedPoints",
    "grid_pairs",
    "grid_points",
    "gridsample",
    "gridsample_pairs",
    "hard_points",
    "patch_pairs",
    "sample_points",
]


class PairedPoints(NamedTuple):
    """The same image points in the frames of two views.

    Attributes:
        points: `(x, y)` in the image frame, in pixels.
        points1: The same points in the frame of the first view, in [0, 1].
        points2: The same points in the frame of the second view, in [0, 1].
        valid: True for all points of two views that share an area, however small, and that the
            argument `valid` allowed. `ViewPairs.valid` is stronger: it asks for enough overlap.
    """

    points: Float[Tensor, "*batch n 2"]
    points1: Float[Tensor, "*batch n 2"]
    points2: Float[Tensor, "*batch n 2"]
    valid: Bool[Tensor, "*batch n"]


class PairedFeatures(NamedTuple):
    """Features of two views at the same image points.

    Attributes:
        features1: Features of the first view, one row for each point.
        features2: Features of the second view; row n belongs to the same image point as row n of
            the first.
        valid: True for all rows of two views that share an area, however small, and that the
            argument `valid` allowed. `ViewPairs.valid` is stronger: it asks for enough overlap.
    """

    features1: Float[Tensor, "*batch n d"]
    features2: Float[Tensor, "*batch n d"]
    valid: Bool[Tensor, "*batch n"]


@typed
def grid_points(
    boxes: Float[Tensor, "*batch 4"], size: int | Size = 7
) -> Float[Tensor, "*batch n 2"]:
    """Compute a regular grid of points inside each box: the centers of its h x w bins, row by row.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame.
        size: Bins `(h, w)`; a number K means K x K.

    Returns:
        `n = h w` points `(x, y)` for each box, strictly inside it, in the boxes' frame. The points
        of a box that is not valid are finite but have no meaning.

    Raises:
        ValueError: The size is not positive.

    Examples:
        >>> grid_points(torch.tensor([0.0, 0.0, 4.0, 8.0]), (2, 1))
        tensor([[2., 2.],
                [2., 6.]])

    References:
        DenseSiam, Sec 3.2, Fig 3 (K = 7: Table 4a).
    """
    check_size("sampling.grid_points", size)
    flip = torch.zeros(boxes.shape[:-1], dtype=torch.bool, device=boxes.device)
    view = View(boxes, flip, flip)
    return coordinate_map(view, size).flatten(-3, -2)


@typed
def sample_points(
    boxes: Float[Tensor, "*batch 4"],
    count: int,
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "*batch n 2"] | None = None,
) -> Float[Tensor, "*batch n 2"]:
    """Sample points uniformly inside each box.

    Args:
        boxes: Boxes `(x1, y1, x2, y2)`, in any frame.
        count: Number of points for each box.
        generator: Source of the random numbers, on the boxes' device.
        noise: Uniform numbers in [0, 1) from which the draw follows; by default they are drawn from
            `generator`.

    Returns:
        `n = count` points `(x, y)` for each box, in the boxes' frame. The points of a box that is
        not finite contain no NaN but have no meaning.

    Raises:
        TypeError: The shapes do not match.
        ValueError: The count is negative, or the noise is of another number of points.

    Examples:
        >>> sample_points(torch.tensor([[0.0, 0.0, 4.0, 8.0]]), 49).shape
        torch.Size([1, 49, 2])

    References:
        DenseSiam, Table A2 (k = 1, beta = 0).
    """
    check("sampling.sample_points", "count", count, count >= 0, "0 or more")
    points = count if noise is None else noise.shape[-2]
    if points != count:
        raise ValueError(
            f"densekit.sampling.sample_points: count is {count}, but noise is of {points} points; "
            "give two numbers for each point."
        )
    draws = sample_uniform((*boxes.shape[:-1], count, 2), boxes, generator=generator, noise=noise)
    boxes = torch.where(boxes.isfinite().all(-1)[..., None], boxes, 0.0)[..., None, :]
    corners = boxes.to(draws).unflatten(-1, (2, 2)).expand(*draws.shape, 2)
    return torch.lerp(corners[..., 0, :], corners[..., 1, :], draws).to(boxes.dtype)


@typed
def hard_points(
    candidates: Float[Tensor, "*batch m 2"],
    dissimilarity: Float[Tensor, "*batch m"],
    uniform: Float[Tensor, "*batch n 2"],
    *,
    beta: float,
) -> Float[Tensor, "*batch n 2"]:
    """Replace the first beta n of n uniform points by the most dissimilar candidates.

    This is how PointRend chooses points: sample `m = k n` candidates and n points with
    `sample_points`, measure the dissimilarity of the two views at the candidates, and call this
    function.

    Args:
        candidates: Points to choose from, in any frame.
        dissimilarity: Dissimilarity of the two views at each candidate; NaN counts as the smallest
            value.
        uniform: Points for the rest of the result, in the same frame.
        beta: Share of the result that is chosen from the candidates, in [0, 1].

    Returns:
        n points: `round(beta n)` candidates, the most dissimilar first, then the last uniform
        points.

    Raises:
        ValueError: `beta` is outside [0, 1], or there are fewer candidates than `round(beta n)`.

    Examples:
        >>> candidates, rest = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.zeros(2, 2)
        >>> hard_points(candidates, torch.tensor([0.1, 0.9]), rest, beta=0.5)
        tensor([[2., 2.],
                [0., 0.]])

    References:
        DenseSiam, App B, Table A2 (k = 3, beta = 0.75 is its "mildly biased").
    """
    check("sampling.hard_points", "beta", beta, 0 <= beta <= 1, "a share in [0, 1]")
    count = round(beta * uniform.shape[-2])
    if count > candidates.shape[-2]:
        raise ValueError(
            f"densekit.sampling.hard_points: beta asks for {count} hard points, but there are "
            f"{candidates.shape[-2]} candidates; sample more candidates or lower beta."
        )
    hardness = torch.where(dissimilarity.isnan(), -torch.inf, dissimilarity)
    hardest = take_rows(candidates, hardness.topk(count).indices)
    return torch.cat([hardest, uniform[..., count:, :]], -2)


@typed
def gridsample(
    features: Float[Tensor, "*batch d h w"], points: Float[Tensor, "*batch n 2"]
) -> Float[Tensor, "*batch n d"]:
    """Sample a feature map at points, with bilinear interpolation between the nearest cell centers.

    Cell centers are at `((j + 0.5)/w, (i + 0.5)/h)` (`align_corners=False`). Between the edge and
    the outermost cell centers, and outside the map, the values of the outermost cells are repeated,
    as with `padding_mode="border"` of `torch.nn.functional.grid_sample`. The function is one matrix
    product with n x hw weights, which are computed in float32 and rounded to the dtype of the
    features. It is deterministic on every device, and twice differentiable with respect to features
    and points. A NaN in a map reaches all points of this map. To resample a whole large map use
    `crop_views`, whose weights are separable.

    Args:
        features: One feature map for each batch entry.
        points: Points `(x, y)` in the frame of the map, in [0, 1] and not [-1, 1] as in
            `grid_sample`; NaN counts as 0, and an infinite coordinate as far outside the map.

    Returns:
        One row of features for each point, in the features' dtype.

    Raises:
        ValueError: The map has no cell.

    Examples:
        >>> features = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
        >>> gridsample(features, torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
        tensor([[1.5000],
                [2.0000]])

    References:
        DenseSiam, Sec 3.2.
    """
    h, w = features.shape[-2:]
    if h * w == 0:
        raise ValueError(
            f"densekit.sampling.gridsample: the map is {h} x {w}; it needs at least one cell."
        )

    points = widened(points)
    points = torch.where(points.isnan(), 0.0, points)
    x = interpolation_weights(points[..., 0], w)
    y = interpolation_weights(points[..., 1], h)
    weights = (y[..., :, None] * x[..., None, :]).flatten(-2).to(features.dtype)
    with full_precision(features):
        return weights @ map_to_rows(features)


@typed
def grid_pairs(
    view1: View,
    view2: View,
    size: int | Size = 7,
    valid: Bool[Tensor, "*batch"] | None = None,
) -> PairedPoints:
    """Compute a regular grid in the region that two views share, in the frames of both views.

    Args:
        view1: First views.
        view2: Second views of the same images.
        size: Grid `(h, w)`; a number K means K x K.
        valid: Pairs of views to use, such as `ViewPairs.valid`, which asks for enough overlap; by
            default all.

    Returns:
        The points of the grid in the image frame and in the frame of each view. Where the views do
        not overlap, `valid` is False, and the points are finite but have no meaning.

    Raises:
        ValueError: The size is not positive.

    Examples:
        >>> view = View(torch.tensor([0.0, 0.0, 4.0, 4.0]), torch.tensor(False))
        >>> pairs = grid_pairs(view, View(view.box, torch.tensor(True)), 1)
        >>> pairs.points, pairs.points2
        (tensor([[2., 2.]]), tensor([[0.5000, 0.5000]]))

    References:
        DenseSiam, Sec 3.2, Fig 3.
    """
    check_size("sampling.grid_pairs", size)
    overlap = intersect_views(view1, view2)
    points = grid_points(overlap.box, size)
    points1 = image_to_view(view1, points)
    points2 = image_to_view(view2, points)
    return PairedPoints(points, points1, points2, _of_rows(points, overlap.valid, valid))


@typed
def gridsample_pairs(
    features1: Float[Tensor, "*batch d h1 w1"],
    features2: Float[Tensor, "*batch d h2 w2"],
    view1: View,
    view2: View,
    size: int | Size = 7,
    valid: Bool[Tensor, "*batch"] | None = None,
) -> PairedFeatures:
    """Sample the features of two views at the same K x K image points of the region they share.

    The function calls `grid_pairs` once and `gridsample` twice. Call those directly to sample
    several maps at the same points.

    Args:
        features1: Feature maps of the first views.
        features2: Feature maps of the second views, of any size.
        view1: First views.
        view2: Second views of the same images.
        size: Grid `(h, w)`; a number K means K x K.
        valid: Pairs of views to use, such as `ViewPairs.valid`, which asks for enough overlap; by
            default all.

    Returns:
        Two rows of features for each image point. Where the views do not overlap, `valid` is False
        and the features are finite; pass `valid` on to the loss.

    Raises:
        TypeError: The maps differ in channels, or the leading axes differ.
        ValueError: The size is not positive, or a map has no cell.

    Examples:
        >>> from densekit import sample_view_pairs
        >>> pairs = sample_view_pairs((480, 640), (2,))
        >>> maps = torch.rand(2, 16, 7, 7)
        >>> gridsample_pairs(maps, maps, pairs.view1, pairs.view2).features1.shape
        torch.Size([2, 49, 16])

    References:
        DenseSiam, Sec 3.2, Fig 3, Table 4a and 4d.
    """
    check_size("sampling.gridsample_pairs", size)
    check_cells("sampling.gridsample_pairs", "the first map", features1.shape[-2:])
    check_cells("sampling.gridsample_pairs", "the second map", features2.shape[-2:])
    pairs = grid_pairs(view1, view2, size, valid)
    return PairedFeatures(
        gridsample(features1, pairs.points1), gridsample(features2, pairs.points2), pairs.valid
    )


@typed
def patch_pairs(
    features1: Float[Tensor, "*batch d h1 w1"],
    features2: Float[Tensor, "*batch d h2 w2"],
    view1: View,
    view2: View,
    size: int | Size = 7,
    valid: Bool[Tensor, "*batch"] | None = None,
    *,
    sampling_ratio: int = 2,
) -> PairedFeatures:
    """Pool the features of the S x S patches of the region that two views share.

    RoIAlign pools the shared region in each view. The patches are in the order of the image, row by
    row, so patch (i, j) of both views is the same piece of the image, even where a view is
    mirrored. `gridsample_pairs` samples the features at the centers of the patches only.

    Args:
        features1: Feature maps of the first views.
        features2: Feature maps of the second views, of any size.
        view1: First views.
        view2: Second views of the same images.
        size: Patches `(rows, columns)`; a number S means S x S.
        valid: Pairs of views to use, such as `ViewPairs.valid`, which asks for enough overlap; by
            default all.
        sampling_ratio: Number of points in a patch along each axis, as in `roi_align`.

    Returns:
        Two rows of features for each patch, `n = S S`. Where the views do not overlap, `valid` is
        False and the features are finite; pass `valid` on to the loss.

    Raises:
        TypeError: The maps differ in channels, or the leading axes differ.
        ValueError: The size is not positive, the ratio is negative, or a map has no cell.

    Examples:
        >>> from densekit import sample_view_pairs
        >>> pairs = sample_view_pairs((480, 640), (2,))
        >>> maps = torch.rand(2, 16, 7, 7)
        >>> patch_pairs(maps, maps, pairs.view1, pairs.view2).features1.shape
        torch.Size([2, 49, 16])

    References:
        DUPR, Sec 3.2, Eq 3 and 4, Table 2a (S = 14 on C4 and 7 on C5).
    """
    bins = (size, size) if isinstance(size, int) else size
    where = "sampling.patch_pairs"
    check(where, "size", size, min(bins) >= 1, "at least one patch")
    check(where, "sampling_ratio", sampling_ratio, sampling_ratio >= 0, "0 or more")
    check_cells(where, "the first map", features1.shape[-2:])
    check_cells(where, "the second map", features2.shape[-2:])

    overlap = intersect_views(view1, view2)
    corners = overlap.box.unflatten(-1, (2, 2))

    def patches(features: Tensor, view: View) -> Tensor:
        seen = image_to_view(view, corners).flatten(-2)  # a flip reverses boxes and patches
        return pool_bins(features, seen[..., None, :], bins, sampling_ratio).flatten(-4, -2)

    rows1 = patches(features1, view1)
    rows2 = patches(features2, view2)
    return PairedFeatures(rows1, rows2, _of_rows(rows1, overlap.valid, valid))


def _of_rows(rows: Tensor, overlap: Tensor, valid: Tensor | None) -> Tensor:
    """Return for each row whether its two views overlap and are to be used."""
    used = overlap if valid is None else overlap & valid
    return used[..., None].expand(rows.shape[:-1]).contiguous()
