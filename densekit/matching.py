"""Correspondences of two views: by place, by feature, and by regions that both views contain.

`gridsample_pairs` samples two views at the same places, so its rows are matched already. The
functions here match what two maps hold: their cells, or regions that both views contain.

* DenseCL: `match_by_feature` of the encoder's cells.
* PixPro: `positive_pairs`, all cells that are near to each other.
* VICRegL: `match_by_place` and `match_by_feature(metric="euclidean")`, the `best` matches of each.
* ReSim: `candidate_regions`, pooled with `roi_align`.

Take the matched cells with `take_rows(map_to_rows(maps), indices)`, and give `valid` to the loss.
"""

import math
from typing import Literal, NamedTuple

import torch
from densekit.numerics import (
    check,
    check_size,
    full_precision,
    l2_normalize,
    refuse_maps,
    row_of,
    widened,
)
from densekit.numerics import take_rows as _take_rows
from densekit.typing import Bool, Float, Int, Integer, Shaped, Size, Tensor, typed
from densekit.views import (
    View,
    boxes_image_to_view,
    boxes_view_to_image,
    coordinate_map,
    intersect_views,
)

__all__ = [
    "Matches",
    "PairedBoxes",
    "candidate_regions",
    "match_by_feature",
    "match_by_place",
    "positive_pairs",
    "take_rows",
]

_NUMBERS = 2**27  # of a block of distances, half a gigabyte in float32


class Matches(NamedTuple):
    """Rows of the first view, such as the cells of its map, and their matches in the second view.

    Take the matched rows of both views with `take_rows`.

    Attributes:
        indices1: Index of each row of the first view.
        indices2: Index of its match among the rows of the second view; -1 where there is none.
        distance: How far the two are apart; infinity where there is no match. No gradient flows.
        valid: True where there is a match.
    """

    indices1: Int[Tensor, "*batch k"]
    indices2: Int[Tensor, "*batch k"]
    distance: Float[Tensor, "*batch k"]
    valid: Bool[Tensor, "*batch k"]


class PairedBoxes(NamedTuple):
    """The same regions of an image in the frames of two views; zeros where not valid.

    Attributes:
        boxes: Boxes `(x1, y1, x2, y2)` in the image frame, in pixels.
        boxes1: The same boxes in the frame of the first view, in [0, 1].
        boxes2: The same boxes in the frame of the second view, in [0, 1].
        valid: True for the boxes that both views contain.
    """

    boxes: Float[Tensor, "*batch n 4"]
    boxes1: Float[Tensor, "*batch n 4"]
    boxes2: Float[Tensor, "*batch n 4"]
    valid: Bool[Tensor, "*batch n"]


@typed
def match_by_place(
    view1: View,
    view2: View,
    size1: int | Size,
    size2: int | Size | None = None,
    valid: Bool[Tensor, "*batch"] | None = None,
    *,
    max_distance: float | None = 0.7,
    best: int | None = None,
) -> Matches:
    """Match each cell of one view's map with the cell of the other whose center is nearest.

    Distances are measured in the image, in diagonals of the larger one of the two views' cells.

    Args:
        view1: First views.
        view2: Second views of the same images.
        size1: Size `(h, w)` of the first view's map in cells; a number K means K x K.
        size2: Size of the second view's map; by default that of the first.
        valid: Pairs of views to use, such as those of `sample_view_pairs`; by default all.
        max_distance: The largest distance of a match. With None each cell has a match. Views that
            share no area never match.
        best: Number of matches to keep for each pair of views, the nearest first; all if there are
            fewer. By default each cell of the first view keeps its match, in the order of the
            cells.

    Returns:
        For each cell of the first view its nearest cell of the second. Where two cells are equally
        near, rounding decides.

    Raises:
        TypeError: The leading axes of the two views differ.
        ValueError: A size is not positive, or `max_distance` or `best` is negative.

    Examples:
        >>> flip = torch.tensor(False)
        >>> view1 = View(torch.tensor([0.0, 0.0, 4.0, 1.0]), flip)
        >>> view2 = View(torch.tensor([2.0, 0.0, 6.0, 1.0]), flip)
        >>> match_by_place(view1, view2, (1, 4)).indices2
        tensor([-1, -1,  0,  1])

    References:
        PixPro, Sec 3.1 (0.7); VICRegL, Sec 4.1 (the best of all matches by location); DenseSiam,
        App A, Table A1 (pixel distance).
    """
    _check("match_by_place", max_distance, best)
    size1, size2 = _sizes("match_by_place", size1, size2)
    valid = _used(view1, view2, valid)
    unit = _larger_diagonal(view1, view2, size1, size2)
    gap_x, gap_y = _gaps(view1, view2, size1, size2)
    x = gap_x.min(-1)
    y = gap_y.min(-1)
    distance = torch.hypot(x.values[..., None, :], y.values[..., :, None]).flatten(-2)
    indices = (y.indices[..., :, None] * size2[1] + x.indices[..., None, :]).flatten(-2)
    distance = distance / unit[..., None]
    return _matches(distance, indices, valid[..., None], max_distance, best)


@typed
def positive_pairs(
    view1: View,
    view2: View,
    size1: int | Size,
    size2: int | Size | None = None,
    valid: Bool[Tensor, "*batch"] | None = None,
    *,
    max_distance: float = 0.7,
) -> Bool[Tensor, "*batch n m"]:
    """Find all pairs of cells of two views' maps whose centers are near to each other.

    Distances are measured in the image, in diagonals of the larger one of the two views' cells. A
    cell may have several partners, or none. `match_by_place` finds the nearest one alone.

    Args:
        view1: First views.
        view2: Second views of the same images.
        size1: Size `(h, w)` of the first view's map in cells; a number K means K x K.
        size2: Size of the second view's map; by default that of the first.
        valid: Pairs of views to use, such as those of `sample_view_pairs`; by default all.
        max_distance: The largest distance of a pair.

    Returns:
        True where cell n of the first view and cell m of the second are a pair. Views that share no
        area have none.

    Raises:
        TypeError: The leading axes of the two views differ.
        ValueError: A size is not positive, or `max_distance` is negative.

    Examples:
        >>> view = View(torch.tensor([0.0, 0.0, 4.0, 2.0]), torch.tensor(False))
        >>> positive_pairs(view, view, (1, 2)).tolist()
        [[True, False], [False, True]]

    References:
        PixPro, Sec 3.1.
    """
    _check("positive_pairs", max_distance, None)
    size1, size2 = _sizes("positive_pairs", size1, size2)
    valid = _used(view1, view2, valid)
    unit = _larger_diagonal(view1, view2, size1, size2)
    x, y = _gaps(view1, view2, size1, size2)
    distance = torch.hypot(x[..., None, :, None, :], y[..., :, None, :, None])  # (h1, w1, h2, w2)
    distance = distance.flatten(-2).flatten(-3, -2) / unit[..., None, None]
    return valid[..., None, None] & (distance <= max_distance)


@typed
def match_by_feature(
    features1: Float[Tensor, "*batch n d"],
    features2: Float[Tensor, "*batch m d"],
    valid1: Bool[Tensor, "*batch n"] | None = None,
    valid2: Bool[Tensor, "*batch m"] | None = None,
    *,
    metric: Literal["cosine", "euclidean"] = "cosine",
    max_distance: float | None = None,
    best: int | None = None,
) -> Matches:
    """Match each row of one view with the row of the other that has the most similar features.

    To score the result, compare the indices with the true places: for the rows of
    `gridsample_pairs` or `patch_pairs`, row i belongs to row i. To match the cells of whole maps
    pass `map_to_rows(maps)`. The distances are computed in blocks of at most 2^27 numbers (half a
    gigabyte), or of one row.

    Args:
        features1: Rows to match; one that is not finite has no match.
        features2: Rows to search; one that is not finite is no match.
        valid1: Rows of the first view to match; by default all.
        valid2: Rows of the second view to search; by default all.
        metric: "cosine": the distance is 1 - the cosine. "euclidean": it is the distance of the
            rows, which are not normalized.
        max_distance: The largest distance of a match; by default there is none.
        best: Number of matches to keep for each set of rows, the most similar first; all if there
            are fewer. By default each row of the first view keeps its match, in the order of the
            rows.

    Returns:
        For each row of the first view its most similar row of the second. No gradient flows: take
        the rows, and compute their loss.

    Raises:
        TypeError: The shapes do not match, or rows look like maps.
        ValueError: `max_distance` or `best` is negative.

    Examples:
        >>> match_by_feature(torch.eye(3)[[2, 0]], torch.eye(3)).indices2
        tensor([2, 0])

    References:
        DenseCL, Sec 3.4; VICRegL, Sec 4.1 (the best of all matches, by Euclidean distance);
        DenseSiam, App A, Table A1 (feature similarity); DUPR, Fig 10.
    """
    _check("match_by_feature", max_distance, best)
    refuse_maps("matching.match_by_feature", "features1", features1)
    refuse_maps("matching.match_by_feature", "features2", features2)
    known1 = _known(features1, valid1)
    known2 = _known(features2, valid2)
    dtype = torch.promote_types(features1.dtype, features2.dtype)
    rows1 = _rows(features1, known1, dtype, metric)
    rows2 = _rows(features2, known2, dtype, metric)
    if not rows2.shape[-2]:  # a row that matches nothing
        rows2 = rows2.new_zeros(*rows2.shape[:-2], 1, rows2.shape[-1])
        known2 = known2.new_zeros(*known2.shape[:-1], 1)

    distances = []
    indices = []
    chunk = max(1, _NUMBERS // max(1, math.prod(rows2.shape[:-1])))
    for part in rows1.split(chunk, -2):
        if metric == "cosine":
            with full_precision(part):
                apart = (1 - part @ rows2.mT).clamp(min=0)
        else:
            apart = torch.cdist(part, rows2, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = torch.where(known2[..., None, :], apart, torch.inf).min(-1)
        distances.append(nearest.values)
        indices.append(nearest.indices)
    distance = torch.cat(distances, -1)
    found = known1 & (distance < torch.inf)
    return _matches(distance, torch.cat(indices, -1), found, max_distance, best)


@typed
def candidate_regions(
    view1: View,
    view2: View,
    size: int | Size,
    valid: Bool[Tensor, "*batch"] | None = None,
    *,
    window: int = 48,
    stride: int = 32,
) -> PairedBoxes:
    """Slide a window over the first view, and find the same regions in the second view.

    All pairs of views have the same number of windows, row by row over the first view. To pool the
    features of the regions, call `roi_align(maps, regions.boxes1, 1, regions.valid)` for the first
    view, and the same with `boxes2` for the second. With more than one bin, note that a flip
    mirrors the bins of a region.

    Args:
        view1: First views.
        view2: Second views of the same images.
        size: Size `(h, w)` of the first view in pixels; a number K means K x K.
        valid: Pairs of views to use, such as those of `sample_view_pairs`; by default all.
        window: Side of the square window in pixels of the first view.
        stride: Step from one window to the next in pixels of the first view.

    Returns:
        One box for each window, in the image frame and in the frame of each view. A box is valid
        where the second view contains the whole window.

    Raises:
        TypeError: The leading axes of the two views differ.
        ValueError: The window or the stride is below 1, or the view is smaller than the window.

    Examples:
        >>> view = View(torch.tensor([0.0, 0.0, 8.0, 8.0]), torch.tensor(False))
        >>> half = View(torch.tensor([4.0, 0.0, 8.0, 8.0]), torch.tensor(False))
        >>> regions = candidate_regions(view, half, 8, window=4, stride=4)
        >>> regions.boxes2[regions.valid]
        tensor([[0.0000, 0.0000, 1.0000, 0.5000],
                [0.0000, 0.5000, 1.0000, 1.0000]])

    References:
        ReSim, Sec 3 (windows of 48 and a stride of 32 in views of 224 pixels, for C4); DenseSiam,
        App A, Table A1 (candidate regions).
    """
    h, w = (size, size) if isinstance(size, int) else size
    where = "matching.candidate_regions"
    check(where, "window", window, window >= 1, "1 or more")
    check(where, "stride", stride, stride >= 1, "1 or more")
    check(where, "size", size, min(h, w) >= window, f"{window} or more, to hold a window")
    dtype = view1.box.dtype
    view1 = _widened(view1)
    view2 = _widened(view2)
    used = _used(view1, view2, valid)

    at = {"dtype": view1.box.dtype, "device": view1.box.device}
    x, y = torch.meshgrid(
        torch.arange(0, w - window + 1, stride, **at),
        torch.arange(0, h - window + 1, stride, **at),
        indexing="xy",
    )
    corner = torch.stack([x, y], -1).flatten(0, 1)
    boxes1 = torch.cat([corner, corner + window], -1) / row_of([w, h, w, h], corner)
    boxes1 = boxes1.expand(*view1.flip.shape, *boxes1.shape)
    boxes = boxes_view_to_image(view1, boxes1)
    boxes2 = boxes_image_to_view(view2, boxes)
    inside = ((boxes2 >= -1e-4) & (boxes2 <= 1 + 1e-4)).all(-1)  # rounding may move this much
    inside = inside & used[..., None]

    def kept(found: Tensor) -> Tensor:
        return torch.where(inside[..., None], found, 0.0).to(dtype)

    return PairedBoxes(kept(boxes), kept(boxes1), kept(boxes2.clamp(0, 1)), inside)


@typed
def take_rows(
    rows: Shaped[Tensor, "*batch n d"], indices: Integer[Tensor, "*batch k"]
) -> Shaped[Tensor, "*batch k d"]:
    """Take rows by their indices, such as the matched rows of a view.

    Args:
        rows: Rows of any dtype.
        indices: Indices of the rows to take.

    Returns:
        One row for each index. It is zeros, with zero gradient, where the index is outside [0, n),
        as -1 is, the index of no match.

    Raises:
        TypeError: The leading axes differ.

    Examples:
        >>> take_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, -1]))
        tensor([[3., 4.],
                [0., 0.]])
    """
    n, d = rows.shape[-2:]
    indices = indices.long()
    indices = torch.where((indices >= 0) & (indices < n), indices, n)
    with_zeros = torch.cat([rows, rows.new_zeros(*rows.shape[:-2], 1, d)], -2)
    return _take_rows(with_zeros, indices)


def _check(function: str, max_distance: float | None, best: int | None) -> None:
    near = max_distance is None or max_distance >= 0
    check(f"matching.{function}", "max_distance", max_distance, near, "0 or more, or None")
    few = best is None or best >= 0
    check(f"matching.{function}", "best", best, few, "0 or more, or None")


def _sizes(function: str, size1: int | Size, size2: int | Size | None) -> tuple[Size, Size]:
    """Check the sizes of two maps, and return them as `(h, w)`."""
    size2 = size1 if size2 is None else size2
    check_size(f"matching.{function}", size1, "size1")
    check_size(f"matching.{function}", size2, "size2")
    size1 = (size1, size1) if isinstance(size1, int) else size1
    size2 = (size2, size2) if isinstance(size2, int) else size2
    return size1, size2


def _used(view1: View, view2: View, valid: Tensor | None) -> Tensor:
    """Return which pairs of views share an area and are to be used."""
    overlap = intersect_views(view1, view2).valid
    return overlap if valid is None else overlap & valid


def _matches(
    distance: Tensor,
    indices: Tensor,
    valid: Tensor,
    max_distance: float | None,
    best: int | None,
) -> Matches:
    """Build the record, and keep the best matches of each set."""
    valid = valid.expand(distance.shape)
    if max_distance is not None:
        valid = valid & (distance <= max_distance)
    distance = torch.where(valid, distance, torch.inf)
    indices = torch.where(valid, indices, -1)
    own = torch.arange(distance.shape[-1], device=distance.device).expand(distance.shape)
    if best is None:
        return Matches(own.contiguous(), indices, distance, valid)

    kept = distance.topk(min(best, distance.shape[-1]), largest=False)
    indices = indices.gather(-1, kept.indices)
    return Matches(kept.indices, indices, kept.values, valid.gather(-1, kept.indices))


def _larger_diagonal(view1: View, view2: View, size1: Size, size2: Size) -> Tensor:
    """Return the diagonal of a cell of one map or the other, the larger one, in pixels."""
    diagonals = []
    for view, (h, w) in ((view1, size1), (view2, size2)):
        box = _widened(view).box.detach()
        width, height = (box[..., 2:] - box[..., :2]).unbind(-1)
        diagonals.append(torch.hypot(width / w, height / h))
    return torch.maximum(*diagonals)


def _gaps(view1: View, view2: View, size1: Size, size2: Size) -> tuple[Tensor, Tensor]:
    """Return how far apart the columns of two maps are along x, and their rows along y."""
    places = []
    for view, size in ((view1, size1), (view2, size2)):
        centers = coordinate_map(_widened(view), size).detach()
        places.append((centers[..., 0, :, 0], centers[..., :, 0, 1]))
    (x1, y1), (x2, y2) = places
    gap_x = x1[..., :, None] - x2[..., None, :]
    gap_y = y1[..., :, None] - y2[..., None, :]
    return gap_x.abs(), gap_y.abs()


def _widened(view: View) -> View:
    box, *flips = view  # the compiler of torch 2.8 knows neither `_replace` nor a slice of a record
    return View(widened(box), *flips)


def _known(features: Tensor, valid: Tensor | None) -> Tensor:
    finite = features.isfinite().all(-1)
    return finite if valid is None else finite & valid


def _rows(features: Tensor, known: Tensor, dtype: torch.dtype, metric: str) -> Tensor:
    rows = torch.where(known[..., None], features.detach(), 0.0).to(dtype)
    return l2_normalize(rows) if metric == "cosine" else widened(rows)
