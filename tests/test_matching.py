"""Matches by place and by feature against loops over all pairs; windows that both views contain."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    batches,
    degenerate_boxes,
    disjoint_views,
    feature_pairs,
    flips,
    generators,
    overlapping_views,
    sizes,
    tensors,
    uniform,
    valid_rows,
    views,
)
from densekit import (
    View,
    boxes_image_to_view,
    boxes_view_to_image,
    candidate_regions,
    coordinate_map,
    full_view,
    info_nce,
    intersect_views,
    l2_normalize,
    map_to_rows,
    masked_mean,
    match_by_feature,
    match_by_place,
    matching,
    negative_cosine,
    positive_pairs,
    roi_align,
    sample_view_pairs,
    sample_views,
    take_rows,
)

CLOSE = {"rtol": 0, "atol": 1e-12}
LIMITS = (None, 0.3137, 0.6931, 1.0471)  # no two whole pixels are so far apart


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def centers(view, size):
    """The cells of a map in the image, one row each."""
    return coordinate_map(view, size).flatten(-3, -2)


def all_distances(view1, view2, size1, size2):
    """Each cell of one map with each of the other, in diagonals of the larger cell."""
    apart = torch.cdist(
        centers(view1, size1), centers(view2, size2), compute_mode="donot_use_mm_for_euclid_dist"
    )
    diagonals = []
    for view, (h, w) in ((view1, size1), (view2, size2)):
        extent = view.box[..., 2:] - view.box[..., :2]
        diagonals.append((extent / torch.tensor([w, h])).norm(dim=-1))
    return apart / torch.stack(diagonals).amax(0)[..., None, None]


def assert_matches(got, distances, valid, limit):
    """Every row has the nearest of all its candidates, or none where the limit forbids it."""
    distances = torch.where(valid, distances, torch.inf)
    nearest = distances.amin(-1) if distances.shape[-1] else distances.sum(-1) + torch.inf
    found = nearest < torch.inf if limit is None else nearest <= limit
    assert torch.equal(got.valid, found)
    assert torch.equal(got.indices1, torch.arange(found.shape[-1]).expand(found.shape))
    assert torch.equal(got.indices2 == -1, ~found)
    assert torch.equal(got.distance == torch.inf, ~found)
    torch.testing.assert_close(got.distance[found], nearest[found], **CLOSE)
    if found.any():
        chosen = distances.gather(-1, got.indices2.clamp(min=0)[..., None])[..., 0]
        torch.testing.assert_close(chosen[found], nearest[found], **CLOSE)


def assert_best(got, every, count):
    """The best matches of all: those with the smallest distances, sorted."""
    n = every.distance.shape[-1]
    kept = min(count, n)
    assert torch.equal(got.distance, every.distance.sort(-1).values[..., :kept])
    assert torch.equal(got.distance, every.distance.gather(-1, got.indices1))
    assert torch.equal(got.indices2, every.indices2.gather(-1, got.indices1))
    assert torch.equal(got.valid, got.distance < torch.inf)
    ordered = got.indices1.sort(-1).values
    assert (ordered.diff() > 0).all()  # no row is kept twice


# -------------------------------------------------------------------------------- by place


@given(st.data(), sizes(1, 5), sizes(1, 5), st.sampled_from(LIMITS), st.integers(0, 30))
def test_a_cell_matches_the_nearest_of_all_cells(data, size1, size2, limit, count):
    batch = data.draw(batches(), label="batch")
    pair = data.draw(views(batch, (8, 8))), data.draw(views(batch, (8, 8)))
    used = data.draw(valid_rows(batch), label="valid")
    distances = all_distances(*pair, size1, size2)
    overlap = (intersect_views(*pair).valid & used)[..., None, None]

    got = match_by_place(*pair, size1, size2, used, max_distance=limit)
    assert_matches(got, distances, overlap, limit)
    best = match_by_place(*pair, size1, size2, used, max_distance=limit, best=count)
    assert_best(best, got, count)

    limit = 0.6931 if limit is None else limit
    near = positive_pairs(*pair, size1, size2, used, max_distance=limit)
    assert torch.equal(near, overlap & (distances <= limit))
    back = positive_pairs(*pair[::-1], size2, size1, used, max_distance=limit)
    assert torch.equal(near, back.mT)


@given(disjoint_views(), sizes(1, 5), sizes(1, 5))
def test_views_that_share_nothing_match_nothing(pair, size1, size2):
    for limit in (None, 0.7, 100.0):
        got = match_by_place(*pair, size1, size2, max_distance=limit)
        assert not got.valid.any()
        assert (got.indices2 == -1).all()
    assert not positive_pairs(*pair, size1, size2, max_distance=100.0).any()


@given(overlapping_views(), sizes(1, 5), sizes(1, 5))
def test_a_limit_beyond_everything_is_no_limit(pair, size1, size2):
    assert match_by_place(*pair, size1, size2, max_distance=None).valid.all()
    assert positive_pairs(*pair, size1, size2, max_distance=100.0).all()


@given(views(), sizes(1, 5), generators())
def test_a_view_and_its_mirror_image_match_cell_by_cell(view, size, generator):
    mirrored = View(view.box, flips(generator, *view.flip.shape) ^ view.flip, *view[2:])
    got = match_by_place(view, mirrored, size)
    own = torch.arange(size[0] * size[1]).view(size)
    same = (view.flip == mirrored.flip)[..., None, None]
    want = torch.where(same, own, own.flip(-1)).flatten(-2)
    assert torch.equal(got.indices2, want)
    assert (got.distance < 1e-12).all()
    assert torch.equal(got.indices2, match_by_place(view, mirrored, size, size).indices2)
    if size[0] == size[1]:
        assert torch.equal(got.indices2, match_by_place(view, mirrored, size[0]).indices2)


@given(st.data(), sizes(1, 4))
def test_degenerate_views_match_nothing_and_leave_other_images_alone(data, size):
    good = data.draw(overlapping_views((2,)), label="good")
    bad = data.draw(degenerate_boxes((2,)), label="bad")
    for broken in (0, 1):
        both = [View(*(torch.cat([field, field]) for field in view)) for view in good]
        both[broken] = View(torch.cat([good[broken].box, bad]), *both[broken][1:])
        got, want = match_by_place(*both, size), match_by_place(*good, size)
        assert not got.valid[2:].any()
        assert (got.distance[2:] == torch.inf).all()
        assert all(torch.equal(x[:2], y) for x, y in zip(got, want, strict=True))
        near = positive_pairs(*both, size)
        assert not near[2:].any()
        assert torch.equal(near[:2], positive_pairs(*good, size))
        regions = candidate_regions(*both, 8, window=2, stride=3)
        assert not regions.valid[2:].any()
        assert all(part.isfinite().all() for part in regions[:3])


# ------------------------------------------------------------------------------ by feature


def spread(metric):
    """The distance of each row of one set to each of another, one by one."""
    if metric == "euclidean":
        return lambda x, y: (x[..., :, None, :] - y[..., None, :, :]).norm(dim=-1)
    return lambda x, y: 1 - torch.cosine_similarity(x[..., :, None, :], y[..., None, :, :], dim=-1)


metrics = st.sampled_from(["cosine", "euclidean"])


@given(feature_pairs(), st.data(), metrics, st.sampled_from(LIMITS), st.integers(0, 8))
def test_a_row_matches_the_most_similar_of_all_rows(pair, data, metric, limit, count):
    valid1, valid2 = (data.draw(valid_rows(x.shape[:-1]), label="valid") for x in pair)
    lost, gone = (data.draw(valid_rows(x.shape[:-1]), label="finite") for x in pair)
    rows1 = torch.where((lost | ~valid1)[..., None], pair[0], torch.nan)
    rows2 = torch.where((gone | ~valid2)[..., None], pair[1], torch.inf)
    distances = spread(metric)(*pair)
    usable = (valid1 & lost)[..., :, None] & (valid2 & gone)[..., None, :]

    match = partial(match_by_feature, metric=metric, max_distance=limit)
    got = match(rows1, rows2, valid1, valid2)
    assert_matches(got, distances, usable, limit)
    assert_best(match(rows1, rows2, valid1, valid2, best=count), got, count)
    every = match(*pair)
    assert_matches(every, distances, torch.ones_like(usable), limit)


@given(feature_pairs(), generators())
def test_permuted_rows_of_any_length_are_found_where_they_went(pair, generator):
    rows = torch.cat([pair[0], torch.ones_like(pair[0][..., :1])], -1)  # no two are parallel
    order = torch.randperm(rows.shape[-2], generator=generator)
    lengths = uniform(generator, *rows.shape[:-1], 1, low=0.1, high=10)
    moved = rows[..., order, :]
    assert (match_by_feature(rows, moved * lengths).indices2 == order.argsort()).all()
    got = match_by_feature(rows, moved, metric="euclidean")
    assert (got.indices2 == order.argsort()).all()
    assert (got.distance == 0).all()
    assert torch.equal(take_rows(moved, got.indices2), rows)


@given(overlapping_views(), sizes(1, 5), sizes(1, 5))
def test_cells_whose_features_are_their_places_match_by_place(pair, size1, size2):
    rows = [centers(view, size) for view, size in zip(pair, (size1, size2), strict=True)]
    got = match_by_feature(*rows, metric="euclidean")
    want = match_by_place(*pair, size1, size2, max_distance=None)
    assert torch.equal(got.valid, want.valid)
    apart = (take_rows(rows[0], want.indices1) - take_rows(rows[1], want.indices2)).norm(dim=-1)
    torch.testing.assert_close(got.distance, apart, **CLOSE)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_blocks_change_nothing(monkeypatch, metric):
    rows = [uniform(seeded(i), 2, n, 3) for i, n in enumerate((7, 5))]
    want = match_by_feature(*rows, metric=metric)
    monkeypatch.setattr(matching, "_NUMBERS", 20)  # two rows at a time
    got = match_by_feature(*rows, metric=metric)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_matches_ignore_autocast():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.002]])
    for metric in ("cosine", "euclidean"):
        with torch.autocast("cpu", torch.bfloat16):
            got = match_by_feature(rows, rows, metric=metric)
        assert got.indices2.tolist() == [0, 1]
        assert got.distance.dtype == torch.float32


# --------------------------------------------------------------------------------- regions


@given(st.data(), sizes(3, 8), st.integers(1, 3), st.integers(1, 4))
def test_windows_slide_over_the_first_view_and_are_valid_inside_the_second(
    data, size, window, stride
):
    batch = data.draw(batches(), label="batch")
    pair = data.draw(views(batch, (8, 8))), data.draw(views(batch, (8, 8)))
    used = data.draw(valid_rows(batch), label="valid")
    got = candidate_regions(*pair, size, used, window=window, stride=stride)

    h, w = size
    corners = [
        (x, y) for y in range(0, h - window + 1, stride) for x in range(0, w - window + 1, stride)
    ]
    seen1 = torch.tensor([[x, y, x + window, y + window] for x, y in corners], dtype=torch.float64)
    seen1 = (seen1 / torch.tensor([w, h, w, h])).expand(*batch, -1, 4)
    image = boxes_view_to_image(pair[0], seen1)
    seen2 = boxes_image_to_view(pair[1], image)
    # None is so near to the edge that rounding would decide, unless it touches it.
    inside = ((seen2 > -1e-9) & (seen2 < 1 + 1e-9)).all(-1) & used[..., None]
    assert torch.equal(got.valid, inside)
    for part, want in zip(got[:3], (image, seen1, seen2), strict=True):
        want = torch.where(inside[..., None], want, 0.0)
        torch.testing.assert_close(part, want, rtol=0, atol=1e-9)


def test_all_windows_of_a_view_lie_in_it_and_in_its_mirror_image():
    view = sample_views((427, 640), (500,), scale=(0.01, 1), generator=seeded())  # in float32
    for other in (view, View(view.box, ~view.flip)):
        assert candidate_regions(view, other, 224).valid.all()
        assert candidate_regions(view, other, (224, 160), window=32, stride=24).valid.all()


def test_windows_that_leave_the_second_view_by_a_pixel_are_not_valid():
    view = full_view((224, 224))
    moved = View(torch.tensor([1.0, 0.0, 225.0, 224.0]), view.flip)
    got = candidate_regions(view, moved, 224).valid.view(6, 6)
    assert not got[:, 0].any()
    assert got[:, 1:].all()


@given(st.data(), sizes(4, 8), sizes(4, 8))
def test_pooled_windows_are_the_same_piece_of_the_image(data, size1, size2):
    # Features that are the image coordinates: a window's mean is its center, away from the border.
    pair = data.draw(overlapping_views(()), label="pair")
    maps = [coordinate_map(v, s).movedim(-1, -3) for v, s in zip(pair, (size1, size2), strict=True)]
    regions = candidate_regions(*pair, 8, window=2, stride=1)
    middle = (regions.boxes[..., :2] + regions.boxes[..., 2:]) / 2
    for features, seen, (h, w) in zip(maps, regions[1:3], (size1, size2), strict=True):
        rows = roi_align(features, seen, 1, regions.valid).features.flatten(-3)
        half = torch.tensor([0.5 / w, 0.5 / h], dtype=torch.float64)
        clear = (seen[..., :2] >= half).all(-1) & (seen[..., 2:] <= 1 - half).all(-1)
        torch.testing.assert_close(rows[clear], middle[clear], rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------- take rows


@given(st.data(), st.integers(0, 4), st.integers(0, 4), st.sampled_from([torch.int8, torch.int64]))
def test_rows_are_taken_one_by_one_and_no_index_takes_zeros(data, n, k, dtype):
    batch = data.draw(batches(), label="batch")
    rows = data.draw(tensors((*batch, n, 2))).requires_grad_()
    indices = data.draw(tensors((*batch, k), low=-2, high=n + 2)).floor().to(dtype)
    got = take_rows(rows, indices)
    inside = (indices >= 0) & (indices < n)
    assert got.shape == (*batch, k, 2)
    assert (got[~inside] == 0).all()
    for place in inside.nonzero():
        *image, i = place.tolist()
        assert torch.equal(got[(*image, i)], rows[(*image, int(indices[tuple(place)]))])
    (grad,) = torch.autograd.grad(got.sum(), rows)
    counts = [((indices == i) & inside).sum(-1) for i in range(n)]
    assert torch.equal(grad[..., 0], torch.stack(counts, -1).to(grad) if n else grad[..., 0])


def test_rows_of_any_dtype_are_taken():
    for dtype in (torch.bool, torch.uint8, torch.float16):
        got = take_rows(torch.ones(2, 3).to(dtype), torch.tensor([1, -1]))
        assert got.dtype == dtype
        assert got.sum(-1).tolist() == [3, 0]


# ------------------------------------------------------------------ methods, in a few lines


def densecl(maps, views, valid):
    rows1, rows2 = map(map_to_rows, maps)
    found = match_by_feature(rows1, rows2)
    use = found.valid & valid[:, None]
    return info_nce(rows1, take_rows(rows2, found.indices2), valid=use, temperature=0.2)


def pixpro(maps, views, valid):
    rows1, rows2 = (l2_normalize(map_to_rows(x)) for x in maps)
    near = positive_pairs(*views, (3, 4), (4, 2), valid)
    return -masked_mean(rows1 @ rows2.mT, near)


def vicregl(maps, views, valid):
    rows1, rows2 = map(map_to_rows, maps)
    found = match_by_place(*views, (3, 4), (4, 2), valid, max_distance=None, best=5)
    one, other = take_rows(rows1, found.indices1), take_rows(rows2, found.indices2)
    return masked_mean((one - other).square().mean(-1), found.valid)


def resim(maps, views, valid):
    regions = candidate_regions(*views, 8, valid, window=2, stride=2)
    boxes = regions.boxes1, regions.boxes2
    pooled = [roi_align(x, at, 1, regions.valid) for x, at in zip(maps, boxes, strict=True)]
    rows1, rows2 = (x.features.flatten(-3) for x in pooled)
    return negative_cosine(rows1, rows2, pooled[0].valid & pooled[1].valid)


@pytest.mark.parametrize("method", [densecl, pixpro, vicregl, resim])
def test_a_pair_of_views_that_overlap_too_little_changes_no_method(method):
    pairs = sample_view_pairs(
        (48, 64), (12,), scale=(0.1, 0.6), min_overlap=0.3, attempts=1, generator=seeded()
    )
    assert 0 < pairs.valid.sum() < 12
    maps = [uniform(seeded(i), 12, 5, *size) for i, size in enumerate(((3, 4), (4, 2)))]
    maps = [x.requires_grad_() for x in maps]
    views = pairs.view1, pairs.view2
    total = method(maps, views, pairs.valid)
    kept = [x[pairs.valid] for x in maps]
    some = [View(*(field[pairs.valid] for field in view)) for view in views]
    torch.testing.assert_close(total, method(kept, some, pairs.valid[pairs.valid]), **CLOSE)
    (grad,) = torch.autograd.grad(total, maps[:1])
    assert (grad[~pairs.valid] == 0).all()
    assert grad.any()


# ---------------------------------------------------------------------------------- errors


def test_what_makes_no_sense_is_refused():
    view, rows = full_view((8, 8)), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"match_by_place: size1 is \(0, 2\)"):
        match_by_place(view, view, (0, 2))
    for call in (
        partial(match_by_place, view, view, 2),
        partial(match_by_feature, rows, rows),
        partial(positive_pairs, view, view, 2),
    ):
        for limit in (-0.1, float("nan")):
            with pytest.raises(ValueError, match=r"densekit.matching.*: max_distance is .*give 0"):
                call(max_distance=limit)
    with pytest.raises(ValueError, match=r"match_by_feature: best is -1; give 0 or more, or None"):
        match_by_feature(rows, rows, best=-1)
    with pytest.raises(TypeError, match=r"match_by_feature: argument 'metric'"):
        match_by_feature(rows, rows, metric="dot")
    with pytest.raises(TypeError, match=r"match_by_feature: argument 'features2'.*d=3"):
        match_by_feature(rows, torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"match_by_place: argument 'view2.box'"):
        match_by_place(view, full_view((8, 8), (2,)), 2)
    for size, window, stride in ((8, 9, 1), ((8, 4), 5, 1), (8, 0, 1), (8, 2, 0)):
        with pytest.raises(ValueError, match=r"candidate_regions: (size|window|stride) is"):
            candidate_regions(view, view, size, window=window, stride=stride)
    with pytest.raises(TypeError, match=r"take_rows: argument 'indices'"):
        take_rows(rows, torch.zeros(2))
