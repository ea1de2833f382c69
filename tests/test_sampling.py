"""Points, and features at points and of patches: the same piece of the image in both views."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from strategies import (
    batches,
    boxes,
    degenerate_boxes,
    disjoint_views,
    feature_maps,
    flips,
    generators,
    overlapping_views,
    sizes,
    tensors,
    uniform,
    valid_rows,
)
from torchvision import ops
import densekit as dk
from densekit import (
    View,
    boxes_image_to_view,
    boxes_valid,
    coordinate_map,
    full_view,
    grid_pairs,
    grid_points,
    gridsample,
    gridsample_pairs,
    hard_points,
    image_to_view,
    intersect_views,
    patch_pairs,
    sample_points,
    view_to_image,
)

CLOSE = {"rtol": 0, "atol": 1e-12}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------- grids


@given(boxes(), sizes())
def test_every_center_lies_strictly_inside(box, size):
    points = grid_points(box, size)
    assert points.shape == (*box.shape[:-1], size[0] * size[1], 2)
    assert (points > box[..., None, :2]).all()
    assert (points < box[..., None, 2:]).all()


def test_seven_cells_over_20_to_160_end_at_150():
    points = grid_points(torch.tensor([20.0, 20.0, 160.0, 160.0]), 7)
    assert points[:7, 0].tolist() == [30, 50, 70, 90, 110, 130, 150]


@given(boxes(), sizes())
def test_box_k_and_point_k_are_the_same_cell_row_by_row(box, size):
    h, w = size
    points, (x1, y1, x2, y2) = grid_points(box, size), box.unbind(-1)
    for k in range(h * w):
        i, j = divmod(k, w)
        x = x1 + (x2 - x1) * (j + 0.5) / w
        y = y1 + (y2 - y1) * (i + 0.5) / h
        torch.testing.assert_close(points[..., k, :], torch.stack([x, y], -1), **CLOSE)


@given(st.data())
def test_point_k_of_a_grid_over_the_view_falls_on_token_k_of_the_map(data):
    # A grid with the map's own cells, over the whole view: features come back unmixed, in the
    # order of `flatten`, so tokens and labels that are flattened row by row belong to the points.
    maps = data.draw(feature_maps(data.draw(batches(), label="batch")), label="features")
    h, w = maps.shape[-2:]
    box = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64).expand(*maps.shape[:-3], 4)
    got = gridsample(maps, grid_points(box, (h, w)))
    torch.testing.assert_close(got, maps.flatten(-2).mT, **CLOSE)


@given(degenerate_boxes())
def test_the_grid_of_a_degenerate_box_is_finite_with_zero_gradients(box):
    box.requires_grad_()
    points = grid_points(box, 2)
    assert points.isfinite().all()
    assert torch.equal(torch.autograd.grad(points.sum(), box)[0], torch.zeros_like(box))


def test_a_number_is_a_square_grid():
    box = torch.tensor([0.0, 0.0, 3.0, 5.0])
    assert torch.equal(grid_points(box, 4), grid_points(box, (4, 4)))


# ------------------------------------------------------------------------------ grid pairs


@given(overlapping_views(), sizes(1, 4))
def test_a_pair_is_one_image_point(pair, size):
    got = grid_pairs(*pair, size)
    assert got.valid.all()
    torch.testing.assert_close(view_to_image(pair[0], got.points1), got.points, **CLOSE)
    torch.testing.assert_close(view_to_image(pair[1], got.points2), got.points, **CLOSE)


@given(overlapping_views(), sizes(1, 4))
def test_paired_points_lie_strictly_inside_both_views(pair, size):
    got = grid_pairs(*pair, size)
    box = intersect_views(*pair).box[..., None, :]
    assert ((got.points > box[..., :2]) & (got.points < box[..., 2:])).all()
    for points in (got.points1, got.points2):
        assert ((points > 0) & (points < 1)).all()


@given(overlapping_views(), sizes(2), sizes(2))
def test_two_views_of_a_smooth_image_give_the_same_features(pair, size1, size2):
    # Features that are the image coordinates: interpolation is exact away from the border.
    maps = [coordinate_map(v, s).movedim(-1, -3) for v, s in zip(pair, (size1, size2), strict=True)]
    got = gridsample_pairs(*maps, *pair, 3)
    points = grid_pairs(*pair, 3)
    inside = torch.ones_like(points.points1[..., 0], dtype=torch.bool)
    for local, (h, w) in ((points.points1, size1), (points.points2, size2)):
        half = torch.tensor([0.5 / w, 0.5 / h], dtype=torch.float64)
        inside &= ((local >= half) & (local <= 1 - half)).all(-1)
    torch.testing.assert_close(got.features1[inside], points.points[inside], **CLOSE)
    torch.testing.assert_close(got.features2[inside], points.points[inside], **CLOSE)


@given(overlapping_views(), st.data())
def test_gridsample_pairs_is_grid_pairs_and_two_gridsamples(pair, data):
    batch = pair[0].flip.shape
    maps = [data.draw(feature_maps(batch, 3), label="features") for _ in range(2)]
    size = data.draw(sizes(1, 4), label="size")
    got, points = gridsample_pairs(*maps, *pair, size), grid_pairs(*pair, size)
    assert torch.equal(got.features1, gridsample(maps[0], points.points1))
    assert torch.equal(got.features2, gridsample(maps[1], points.points2))
    assert torch.equal(got.valid, points.valid)


@given(st.data(), sizes(1, 3))
def test_the_rows_of_pairs_that_are_not_to_be_used_are_not_valid(data, size):
    batch = data.draw(batches(), label="batch")
    apart, together = (data.draw(x(batch)) for x in (disjoint_views, overlapping_views))
    used = data.draw(valid_rows(batch), label="valid")
    maps = [data.draw(feature_maps(batch, 2), label="features") for _ in range(2)]
    for pair, overlap in ((together, True), (apart, False)):
        for sample in (
            partial(grid_pairs, *pair),
            partial(gridsample_pairs, *maps, *pair),
            partial(patch_pairs, *maps, *pair),
        ):
            got, every = sample(size, used), sample(size)
            assert (every.valid == overlap).all()
            assert torch.equal(got.valid, every.valid & used[..., None])
            assert got.valid.shape == (*batch, size[0] * size[1])
            assert all(torch.equal(x, y) for x, y in zip(got[:-1], every[:-1], strict=True))


@given(overlapping_views(), sizes(1, 4))
def test_the_pairs_of_exchanged_views_are_exchanged(pair, size):
    forth, back = grid_pairs(*pair, size), grid_pairs(*pair[::-1], size)
    assert torch.equal(forth.points, back.points)
    assert torch.equal(forth.points1, back.points2)
    assert torch.equal(forth.points2, back.points1)


@given(disjoint_views(), st.data())
def test_views_without_overlap_give_finite_features_that_are_not_valid(pair, data):
    batch = pair[0].flip.shape
    maps = [data.draw(feature_maps(batch, 2), label="features").requires_grad_() for _ in range(2)]
    got = gridsample_pairs(*maps, *pair, 2)
    assert not got.valid.any()
    assert got.features1.isfinite().all()
    assert got.features2.isfinite().all()
    assert all(part.isfinite().all() for part in grid_pairs(*pair, 2)[:3])
    for grad in torch.autograd.grad((got.features1 + got.features2).sum(), maps):
        assert grad.isfinite().all()


@given(st.data())
def test_degenerate_views_give_finite_pairs(data):
    bad = data.draw(degenerate_boxes((4,)), label="bad")
    good = View(data.draw(boxes((4,)), label="good"), *flips(seeded(), 2, 4))
    maps = data.draw(feature_maps((4,), 2), label="features")
    for pair in ((good, good._replace(box=bad)), (good._replace(box=bad), good)):
        got, points = gridsample_pairs(maps, maps, *pair, 2), grid_pairs(*pair, 2)
        assert not got.valid.any()
        assert all(part.isfinite().all() for part in (*got[:2], *points[:3]))


def test_maps_of_one_cell_pair():
    view = full_view((4, 4), (2,))
    maps = torch.rand(2, 5, 1, 1, generator=seeded())
    got = gridsample_pairs(maps, maps, view, view._replace(flip=~view.flip), 7)
    assert torch.equal(got.features1, maps.flatten(-2).mT.expand(2, 49, 5))
    assert torch.equal(got.features2, got.features1)


# ------------------------------------------------------------------------------ gridsample


def torch_gridsample(features, points):
    """torch's sampler on one batch axis."""
    d, h, w = features.shape[-3:]
    n = points.shape[-2]
    got = F.grid_sample(
        features.reshape(-1, d, h, w),
        2 * points.reshape(-1, 1, n, 2) - 1,
        padding_mode="border",
        align_corners=False,
    )
    return got[:, :, 0].mT.reshape(*points.shape[:-1], d)


@given(st.data())
def test_gridsample_is_torchs(data):
    maps = data.draw(feature_maps(data.draw(batches(), label="batch")), label="features")
    count = data.draw(st.integers(1, 6), label="count")
    shape = (*maps.shape[:-3], count, 2)
    points = data.draw(tensors(shape, -0.5, 1.5), label="points")
    got = gridsample(maps, points)
    if maps.numel():  # torch's sampler refuses an empty batch of points
        torch.testing.assert_close(got, torch_gridsample(maps, points), **CLOSE)
    assert got.shape == (*shape[:-1], maps.shape[-3])


@given(st.data())
def test_gridsample_has_torchs_gradients(data):
    maps = data.draw(feature_maps((2,)), label="features").requires_grad_()
    points = data.draw(tensors((2, 4, 2), -0.5, 1.5), label="points").requires_grad_()
    weight = data.draw(tensors((2, 4, maps.shape[1])), label="weight")
    got = torch.autograd.grad((gridsample(maps, points) * weight).sum(), [maps, points])
    want = torch.autograd.grad((torch_gridsample(maps, points) * weight).sum(), [maps, points])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("length", [3, 4, 7])
def test_the_slope_at_a_cell_center_is_that_of_the_map(length):
    # Where a K x K grid falls on a K x K map, every point is a kink of the interpolation.
    points = torch.tensor([[(j + 0.5) / length, 0.5] for j in range(1, length - 1)])
    points = points.double().requires_grad_()
    for slope in (0.0, 1.0, -2.0):
        ramp = 3 + slope * torch.arange(length, dtype=torch.float64).expand(1, 2, length)
        (grad,) = torch.autograd.grad(gridsample(ramp, points).sum(), points)
        want = torch.tensor([slope * length, 0.0], dtype=torch.float64)
        torch.testing.assert_close(grad, want.expand_as(grad), **CLOSE)


@given(feature_maps((2,)), generators())
def test_samples_stay_between_the_least_and_the_largest_feature(maps, generator):
    got = gridsample(maps, uniform(generator, 2, 5, 2, low=-1, high=2))
    low, high = maps.flatten(-2).aminmax(dim=-1)
    assert (got >= low[:, None] - 1e-12).all()
    assert (got <= high[:, None] + 1e-12).all()


@given(feature_maps((), size=(3, 4)))
def test_points_outside_repeat_the_outermost_cells(maps):
    points = torch.tensor([[-5.0, -5], [5, -5], [-5, 5], [5, 5], [torch.inf, -torch.inf]])
    got = gridsample(maps, points.double())
    cells = [maps[:, 0, 0], maps[:, 0, -1], maps[:, -1, 0], maps[:, -1, -1], maps[:, 0, -1]]
    assert torch.equal(got, torch.stack(cells))


def test_infinite_points_are_far_outside_the_map():
    features = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    points = torch.tensor([[math.inf, -math.inf], [-math.inf, math.inf]], requires_grad=True)
    got = gridsample(features, points)
    assert got.tolist() == [[1.0], [2.0]]
    assert (torch.autograd.grad(got.sum(), points)[0] == 0).all()


@given(feature_maps((2,)))
def test_points_that_are_nan_count_as_zero_without_gradient(maps):
    maps.requires_grad_()
    points = torch.full((2, 3, 2), torch.nan, dtype=torch.float64, requires_grad=True)
    got = gridsample(maps, points)
    assert torch.equal(got, maps[:, :, 0, 0][:, None].expand_as(got))
    grads = torch.autograd.grad(got.sum(), [maps, points])
    assert grads[0].isfinite().all()
    assert torch.equal(grads[1], torch.zeros_like(points))


@given(st.data())
def test_a_map_of_one_cell_is_constant(data):
    maps = data.draw(feature_maps((2,), size=(1, 1)), label="features")
    points = data.draw(tensors((2, 4, 2)), label="points").requires_grad_()
    got = gridsample(maps, points)
    torch.testing.assert_close(got, maps.flatten(-2).mT.expand_as(got), **CLOSE)
    assert (torch.autograd.grad(got.sum(), points)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_are_sampled_where_float_points_say(dtype):
    # At the cell centers the cells come back; positions in bfloat16 are off by a fifth of a cell.
    maps = torch.arange(100.0)[None, None].to(dtype)
    points = torch.tensor([[(j + 0.5) / 100, 0.5] for j in range(100)])
    got = gridsample(maps, points)
    assert got.dtype == dtype
    torch.testing.assert_close(got[:, 0].float(), torch.arange(100.0), rtol=0, atol=1e-2)


def test_sampling_twice_is_differentiable_twice():
    maps = uniform(seeded(), 2, 3, 4, 5).requires_grad_()
    points = uniform(seeded(1), 2, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(gridsample, (maps, points))
    assert torch.autograd.gradgradcheck(gridsample, (maps, points))


@pytest.mark.parametrize("size", [(0, 3), (3, 0), (0, 0)])
def test_a_map_without_cells_is_refused(size):
    with pytest.raises(
        ValueError, match=f"densekit.sampling.gridsample: the map is {size[0]} x {size[1]}"
    ):
        gridsample(torch.zeros(2, *size), torch.zeros(1, 2))
    maps, view = torch.zeros(2, *size), full_view((4, 4))
    with pytest.raises(ValueError, match=r"densekit.sampling.gridsample"):
        gridsample_pairs(maps, maps, view, view)


@pytest.mark.parametrize("size", [0, (0, 3), (2, -1)])
def test_a_grid_without_points_is_refused(size):
    view = full_view((4, 4))
    for call in (
        lambda: grid_points(view.box, size),
        lambda: grid_pairs(view, view, size),
        lambda: gridsample_pairs(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), view, view, size),
    ):
        with pytest.raises(ValueError, match="size is"):
            call()


def test_maps_that_do_not_belong_together_are_refused():
    view, maps = full_view((4, 4), (2,)), torch.zeros(2, 3, 5, 5)
    with pytest.raises(TypeError, match=r"'features2' should be .* d=3.*\(2, 4, 5, 5\)"):
        gridsample_pairs(maps, torch.zeros(2, 4, 5, 5), view, view)
    with pytest.raises(TypeError, match=r"gridsample_pairs: argument 'view2.box'"):
        gridsample_pairs(maps, maps, view, full_view((4, 4), (3,)))
    with pytest.raises(TypeError, match="gridsample: argument 'points'"):
        gridsample(maps, torch.zeros(3, 1, 2))
    with pytest.raises(TypeError, match=r"gridsample: argument 'features'.*int64"):
        gridsample(maps.long(), torch.zeros(2, 1, 2))


# --------------------------------------------------------------------------- random points


@given(boxes(), st.integers(0, 9), generators())
def test_random_points_lie_inside(box, count, generator):
    points = sample_points(box, count, generator=generator)
    assert points.shape == (*box.shape[:-1], count, 2)
    assert ((points >= box[..., None, :2]) & (points <= box[..., None, 2:])).all()


def test_random_points_are_uniform():
    box = torch.tensor([[2.0, -3.0, 6.0, 5.0], [0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    x, y = sample_points(box, 10_000, generator=seeded())[0].unbind(-1)
    assert stats.kstest(x, stats.uniform(2, 4).cdf).pvalue > 1e-4
    assert stats.kstest(y, stats.uniform(-3, 8).cdf).pvalue > 1e-4
    assert abs(stats.spearmanr(x, y).statistic) < 4 / math.sqrt(10_000)


def test_a_generator_decides_the_points():
    box = torch.tensor([0.0, 0.0, 4.0, 4.0])
    first, again, other = (sample_points(box, 5, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@given(degenerate_boxes(), generators())
def test_random_points_of_a_degenerate_box_are_not_nan(box, generator):
    assert not sample_points(box, 5, generator=generator).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_random_points_of_an_infinite_box_are_not_nan(dtype):
    box = torch.tensor([-torch.inf, -torch.inf, torch.inf, torch.inf], dtype=dtype)
    # Half precision draws an exact zero about once in 1000.
    assert not sample_points(box, 20_000, generator=seeded()).isnan().any()


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match=r"densekit.sampling.sample_points: count is -1"):
        sample_points(torch.zeros(4), -1)


# ----------------------------------------------------------------------------- hard points


@st.composite
def choices(draw):
    batch = draw(batches())
    m, n = draw(st.integers(1, 8)), draw(st.integers(0, 8))
    generator = draw(generators())
    candidates = uniform(generator, *batch, m, 2)
    return candidates, uniform(generator, *batch, m), uniform(generator, *batch, n, 2)


@given(choices())
def test_beta_zero_keeps_the_uniform_points(choice):
    assert torch.equal(hard_points(*choice, beta=0), choice[2])


@given(choices())
def test_beta_one_takes_the_hardest_first(choice):
    candidates, dissimilarity, rest = choice
    rest = rest[..., : candidates.shape[-2], :]
    got = hard_points(candidates, dissimilarity, rest, beta=1)
    order = dissimilarity.argsort(-1, descending=True)[..., : rest.shape[-2], None]
    assert torch.equal(got, candidates.gather(-2, order.expand(*order.shape[:-1], 2)))


@given(choices(), st.floats(0, 1))
def test_the_hard_come_first_and_uniform_points_fill_the_rest(choice, beta):
    candidates, dissimilarity, rest = choice
    rest = rest[..., : candidates.shape[-2], :]
    count = round(beta * rest.shape[-2])
    got = hard_points(candidates, dissimilarity, rest, beta=beta)
    assert got.shape == rest.shape
    hardest = hard_points(candidates, dissimilarity, rest, beta=1)
    assert torch.equal(got[..., :count, :], hardest[..., :count, :])
    assert torch.equal(got[..., count:, :], rest[..., count:, :])


def test_nan_counts_as_least_and_infinity_as_most():
    candidates = torch.arange(8.0).unflatten(0, (4, 2))
    dissimilarity = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0])
    got = hard_points(candidates, dissimilarity, torch.zeros(4, 2), beta=1.0)
    assert torch.equal(got, candidates[[2, 3, 1, 0]])


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_a_share_outside_its_range_is_refused(beta):
    with pytest.raises(ValueError, match=f"densekit.sampling.hard_points: beta is {beta}"):
        hard_points(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2, 2), beta=beta)


def test_too_few_candidates_are_refused():
    with pytest.raises(ValueError, match="4 hard points, but there are 3 candidates"):
        hard_points(torch.zeros(3, 2), torch.zeros(3), torch.zeros(4, 2), beta=1.0)


def test_one_dissimilarity_for_each_candidate():
    with pytest.raises(TypeError, match=r"hard_points: argument 'dissimilarity'.*m=3"):
        hard_points(torch.zeros(3, 2), torch.zeros(2), torch.zeros(4, 2), beta=0.5)


@given(overlapping_views((2,)), generators())
def test_random_points_of_the_overlap_can_be_carried_into_both_views(pair, generator):
    overlap = intersect_views(*pair)
    points = sample_points(overlap.box, 4, generator=generator)
    for view in pair:
        local = image_to_view(view, points)
        assert ((local >= -1e-12) & (local <= 1 + 1e-12)).all()
    assert boxes_valid(overlap.box).all()


# ------------------------------------------------------------------------------ patch pairs

FLIPS = [(a, b) for a in (False, True) for b in (False, True)]


def with_flips(pair, flips_):
    """The same crops, all mirrored left to right or none."""
    return [
        v._replace(flip=torch.full_like(v.flip, flip)) for v, flip in zip(pair, flips_, strict=True)
    ]


def fine_size(view, shared, count):
    """A map so fine that `count` points across the shared box stay half a cell inside it."""
    extent = [(box[..., 2:] - box[..., :2]) for box in (view.box, shared)]
    share = (extent[0] / extent[1]).reshape(-1, 2)
    w, h = (count * torch.cat([share, torch.ones(1, 2)])).ceil().amax(0).long().tolist()
    return h + 1, w + 2


@st.composite
def paired_maps(draw, pair, channels=2):
    """A feature map for each of two views, of two sizes."""
    return [draw(feature_maps(pair[0].flip.shape, channels)) for _ in range(2)]


@given(overlapping_views(), sizes(1, 3), st.integers(1, 2))
def test_a_pair_of_patches_is_one_piece_of_the_image_in_the_order_of_the_image(pair, size, ratio):
    shared = intersect_views(*pair).box
    fine = [fine_size(v, shared, ratio * max(size)) for v in pair]
    for flips_ in FLIPS:
        views = with_flips(pair, flips_)
        maps = [coordinate_map(v, s).movedim(-1, -3) for v, s in zip(views, fine, strict=True)]
        got = patch_pairs(*maps, *views, size, sampling_ratio=ratio)
        assert got.valid.all()
        # The mean of a patch's coordinates is its center.
        torch.testing.assert_close(got.features1, grid_points(shared, size), rtol=0, atol=1e-11)
        torch.testing.assert_close(got.features2, grid_points(shared, size), rtol=0, atol=1e-11)


def mirrored(view, features):
    """The same crop and its map, mirrored not at all, along one axis, or along both."""
    other = view._replace(flip=~view.flip)
    yield view, features
    yield other, features.flip(-1)
    yield view._replace(vertical_flip=~view.vertical_flip), features.flip(-2)
    yield other._replace(vertical_flip=~view.vertical_flip), features.flip(-1, -2)


@given(overlapping_views(), st.data(), sizes(1, 4), st.integers(1, 3))
def test_mirroring_the_pixels_of_a_view_with_its_flip_changes_nothing(pair, data, size, ratio):
    maps = data.draw(paired_maps(pair), label="features")
    want = patch_pairs(*maps, *pair, size, sampling_ratio=ratio)
    view2, features2 = data.draw(st.sampled_from(list(mirrored(pair[1], maps[1]))))
    for view1, features1 in mirrored(pair[0], maps[0]):
        got = patch_pairs(features1, features2, view1, view2, size, sampling_ratio=ratio)
        torch.testing.assert_close(got, want, **CLOSE)


@given(overlapping_views(), st.data(), sizes(1, 4), st.integers(0, 3))
def test_the_patches_of_exchanged_views_are_exchanged(pair, data, size, ratio):
    maps = data.draw(paired_maps(pair), label="features")
    forth = patch_pairs(*maps, *pair, size, sampling_ratio=ratio)
    back = patch_pairs(*maps[::-1], *pair[::-1], size, sampling_ratio=ratio)
    assert torch.equal(forth.features1, back.features2)
    assert torch.equal(forth.features2, back.features1)
    assert torch.equal(forth.valid, back.valid)


@given(overlapping_views(), st.data(), st.integers(1, 3))
def test_the_place_of_the_views_in_the_image_does_not_matter(pair, data, ratio):
    maps = data.draw(paired_maps(pair), label="features")
    shift = data.draw(tensors((2,), -50, 50), label="shift").repeat(2)
    moved = [v._replace(box=v.box + shift) for v in pair]
    got = patch_pairs(*maps, *moved, 3, sampling_ratio=ratio)
    want = patch_pairs(*maps, *pair, 3, sampling_ratio=ratio)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


# A box of a whole number of cells is a jump of the adaptive ratio: boxes are fractional here.
@given(overlapping_views((2,), whole_pixels=False), st.data(), sizes(1, 4), st.integers(0, 3))
def test_patches_are_torchvisions_roi_align_mirrored(pair, data, size, ratio):
    maps = data.draw(paired_maps(pair), label="features")
    shared = intersect_views(*pair).box[:, None]
    got = patch_pairs(*maps, *pair, size, sampling_ratio=ratio)
    for view, features, rows in zip(pair, maps, got[:2], strict=True):
        h, w = features.shape[-2:]
        cells = boxes_image_to_view(view, shared) * torch.tensor([w, h, w, h])
        want = ops.roi_align(features, list(cells), size, sampling_ratio=ratio or -1, aligned=True)
        want = torch.where(view.flip[:, None, None, None], want.flip(-1), want)
        want = torch.where(view.vertical_flip[:, None, None, None], want.flip(-2), want)
        torch.testing.assert_close(rows, want.flatten(-2).mT, **CLOSE)


@given(overlapping_views(), st.data(), sizes(1, 4))
def test_patches_of_one_point_are_features_at_the_grid(pair, data, size):
    maps = data.draw(paired_maps(pair), label="features")
    got = patch_pairs(*maps, *pair, size, sampling_ratio=1)
    torch.testing.assert_close(got, gridsample_pairs(*maps, *pair, size), **CLOSE)


@given(disjoint_views(), st.data(), st.integers(0, 2))
def test_views_without_overlap_give_finite_patches_that_are_not_valid(pair, data, ratio):
    maps = [x.requires_grad_() for x in data.draw(paired_maps(pair), label="features")]
    corners = [v.box.clone().requires_grad_() for v in pair]
    views = [v._replace(box=box) for box, v in zip(corners, pair, strict=True)]
    got = patch_pairs(*maps, *views, 2, sampling_ratio=ratio)
    assert not got.valid.any()
    assert got.features1.isfinite().all()
    assert got.features2.isfinite().all()
    total = (got.features1 + got.features2).sum()
    for grad in torch.autograd.grad(total, [*maps, *corners]):
        assert grad.isfinite().all()


@given(st.data(), st.integers(0, 2))
def test_degenerate_views_give_finite_patches_and_leave_other_images_alone(data, ratio):
    bad = data.draw(degenerate_boxes((2,)), label="bad")
    good = data.draw(overlapping_views((2,)), label="good")
    spoiled = [v._replace(box=bad) for v in good]
    both = [View(*map(torch.cat, zip(*x, strict=True))) for x in zip(good, spoiled, strict=True)]
    other = both[1]._replace(box=torch.cat([good[1].box, good[1].box]))
    maps = [data.draw(feature_maps((4,), 2), label="features") for _ in range(2)]
    want = patch_pairs(*(x[:2] for x in maps), *good, 2, sampling_ratio=ratio)
    for second in (both[1], other):
        leaves = [x.clone().requires_grad_() for x in (*maps, both[0].box, second.box)]
        views = [both[0]._replace(box=leaves[2]), second._replace(box=leaves[3])]
        got = patch_pairs(*leaves[:2], *views, 2, sampling_ratio=ratio)
        assert got.valid.all(-1).tolist() == [True, True, False, False]
        assert all(part.isfinite().all() for part in got[:2])
        torch.testing.assert_close(got.features1[:2], want.features1, **CLOSE)
        torch.testing.assert_close(got.features2[:2], want.features2, **CLOSE)
        for grad in torch.autograd.grad((got.features1 + got.features2).sum(), leaves):
            assert grad.isfinite().all()


@pytest.mark.parametrize("ratio", [0, 1, 2])
def test_gradients_reach_the_maps_and_the_crops(ratio):
    maps = [uniform(seeded(k), 2, *size).requires_grad_() for k, size in ((0, (4, 5)), (1, (3, 6)))]
    corners = [
        torch.tensor(c, dtype=torch.float64, requires_grad=True)
        for c in ([0.0, 1.1, 6.2, 7.3], [1.7, 0.4, 7.9, 5.6])
    ]

    def patches(map1, map2, box1, box2):
        views = View(box1, torch.tensor(True)), View(box2, torch.tensor(False))
        return patch_pairs(map1, map2, *views, (2, 3), sampling_ratio=ratio)[:2]

    assert torch.autograd.gradcheck(patches, (*maps, *corners))


def test_patches_ignore_autocast_and_a_number_is_a_square():
    view = full_view((8, 8), (2,))
    other = View(view.box - 2, ~view.flip)
    maps = torch.rand(2, 3, 5, 5, generator=seeded())
    want = patch_pairs(maps, maps, view, other, (7, 7), sampling_ratio=2)
    with torch.autocast("cpu", torch.bfloat16):
        got = patch_pairs(maps, maps, view, other)
    assert got.features1.shape == (2, 49, 3)
    assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))


@pytest.mark.parametrize("size", [0, (0, 3), (2, -1)])
def test_no_patches_are_refused(size):
    view, maps = full_view((4, 4)), torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match=r"densekit.sampling.patch_pairs: size is .*one patch"):
        patch_pairs(maps, maps, view, view, size)


def test_patches_of_what_does_not_fit_are_refused():
    view, maps = full_view((4, 4), (2,)), torch.zeros(2, 3, 5, 5)
    with pytest.raises(ValueError, match=r"patch_pairs: sampling_ratio is -1; give"):
        patch_pairs(maps, maps, view, view, sampling_ratio=-1)
    for pair in ((maps, maps[..., :0]), (maps[..., :0, :], maps)):
        with pytest.raises(ValueError, match=r"patch_pairs: the .* map is .* with cells"):
            patch_pairs(*pair, view, view)
    with pytest.raises(TypeError, match=r"'features2' should be .* d=3.*\(2, 4, 5, 5\)"):
        patch_pairs(maps, torch.zeros(2, 4, 5, 5), view, view)
    with pytest.raises(TypeError, match=r"patch_pairs: argument 'view2.box'"):
        patch_pairs(maps, maps, view, full_view((4, 4), (3,)))


# ---------------------------------------------------------------------------------- noise

WITH_NOISE = {
    "sample_tokens": (lambda x, **d: dk.sample_tokens(x[..., 0] + 0.1, 3, **d), ()),
    "sample_keys": (lambda x, **d: dk.sample_keys(x, 3, **d), ()),
    "sample_points": (lambda x, **d: dk.sample_points(x[..., 0, :], 5, **d), (2,)),
    "sample_jittered_boxes": (dk.sample_jittered_boxes, (4,)),
    "sample_inner_boxes": (dk.sample_inner_boxes, (4,)),
    "sample_cutout": (dk.sample_cutout, (3,)),
    "sample_surrounding_boxes": (dk.sample_surrounding_boxes, (3,)),
    "sample_boxes": (lambda x, **d: dk.sample_boxes(x, 3, **d).boxes, ()),
    "sample_boxes_at_iou": (lambda x, **d: dk.sample_boxes_at_iou(x, 0.3, **d), (3,)),
    "sample_shift": (lambda x, **d: dk.sample_shift(x, (40, 50), **d), None),
}


@pytest.mark.parametrize("name", WITH_NOISE)
@given(seed=st.integers(0, 2**31 - 1))
def test_a_draw_with_the_generators_numbers_as_noise_is_the_generators(name, seed):
    """So both have the same distribution; vmap and float64 noise draw the same, too."""
    call, last = WITH_NOISE[name]
    low = uniform(seeded(1), 2, 5, 2, high=20)
    boxes = torch.cat([low, low + 1 + uniform(seeded(2), 2, 5, 2, high=9)], -1).float()
    shape = (2, 2) if last is None else (2, 5, *last)
    noise = torch.rand(shape, generator=seeded(seed))
    got = call(boxes, noise=noise)
    if name == "sample_boxes":  # which also draws a number for each row that may be missing
        chosen = noise.argsort(-1, descending=True)[:, :3, None].expand(-1, -1, 4)
        assert torch.equal(got, boxes.gather(1, chosen))
    else:
        assert torch.equal(got, call(boxes, generator=seeded(seed)))
    assert torch.equal(got, call(boxes, noise=noise.double()))
    mapped = torch.vmap(lambda x, y: call(x, noise=y))(boxes, noise)
    torch.testing.assert_close(mapped, got)
    ends = torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64)
    ends = ends[(noise < 0.5).long()]
    assert call(boxes, noise=ends).isfinite().all()


def test_noise_of_another_number_of_points_is_refused():
    with pytest.raises(ValueError, match="sample_points: count is 3, but noise is of 4 points"):
        sample_points(torch.zeros(4), 3, noise=torch.zeros(4, 2))
