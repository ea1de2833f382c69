"""Boxes and RoI pooling against torchvision, and what makes no sense reported as not valid."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from strategies import (
    batches,
    boxes,
    boxes_within,
    degenerate_boxes,
    disjoint_views,
    feature_maps,
    generators,
    image_box,
    overlapping_views,
    sizes,
    tensors,
    uniform,
    valid_rows,
)
from torchvision import ops
from torchvision.ops.poolers import LevelMapper
from densekit import (
    assign_levels,
    box_area,
    box_containment,
    box_iou,
    boxes_valid,
    clip_boxes,
    grid_points,
    intersect_boxes,
    roi_align,
    sample_boxes,
    sample_boxes_at_iou,
)

CLOSE = {"rtol": 0, "atol": 1e-12}
HALVES = [torch.float16, torch.bfloat16]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def box_pairs(draw):
    batch = draw(batches())
    return draw(boxes(batch)), draw(boxes(batch))


@st.composite
def rois(draw, batch, n=None, low=-0.6, high=1.6, largest=2.0):
    """Boxes in the frame of a map; some leave it, by more than half a cell too."""
    n = draw(st.integers(0, 4)) if n is None else n
    draws = uniform(draw(generators()), 2, *batch, n, 2)
    extent = 0.05 + draws[0] * (min(largest, high - low) - 0.05)
    start = low + draws[1] * (high - low - extent)
    return torch.cat([start, start + extent], -1)


def ratios(low=0):
    """Points of a bin along each axis; 0 adapts to the box."""
    return st.integers(low, 3)


def at_most(ratio):
    """The largest box that torchvision and densekit sample alike."""
    return {"largest": 2.0 if ratio else 1.0}


@given(boxes())
def test_boxes_that_enclose_an_area_are_valid(good):
    assert boxes_valid(good).all()


@given(degenerate_boxes())
def test_degenerate_boxes_are_not_valid_and_have_no_area(bad):
    assert not boxes_valid(bad).any()
    assert (box_area(bad) == 0).all()


@given(boxes())
def test_area_is_torchvisions(good):
    torch.testing.assert_close(
        box_area(good).flatten(), ops.box_area(good.reshape(-1, 4)), rtol=1e-12, atol=0
    )


@given(box_pairs())
def test_iou_is_torchvisions(pair):
    want = ops.box_iou(*(x.reshape(-1, 4) for x in pair)).diagonal()
    torch.testing.assert_close(box_iou(*pair).flatten(), want, rtol=1e-12, atol=0)


@given(box_pairs())
def test_intersection_and_iou_are_symmetric(pair):
    assert torch.equal(intersect_boxes(*pair), intersect_boxes(*pair[::-1]))
    torch.testing.assert_close(box_iou(*pair), box_iou(*pair[::-1]), rtol=1e-12, atol=0)


@given(boxes())
def test_a_box_meets_itself(good):
    assert torch.equal(intersect_boxes(good, good), good)
    assert (box_iou(good, good) == 1).all()


@given(box_pairs(), st.data())
def test_a_point_is_in_the_intersection_when_it_is_in_both(pair, data):
    points = data.draw(boxes((5,)), label="points")[:, :2]

    def holds(box):
        box = box[..., None, :]
        return ((box[..., :2] <= points) & (points < box[..., 2:])).all(-1)

    assert torch.equal(holds(intersect_boxes(*pair)), holds(pair[0]) & holds(pair[1]))


@given(overlapping_views())
def test_overlapping_boxes_share_a_valid_box(pair):
    shared = intersect_boxes(pair[0].box, pair[1].box)
    assert boxes_valid(shared).all()
    assert (box_iou(pair[0].box, pair[1].box) > 0).all()


@given(disjoint_views())
def test_disjoint_boxes_share_nothing(pair):
    assert (intersect_boxes(pair[0].box, pair[1].box) == 0).all()
    assert (box_iou(pair[0].box, pair[1].box) == 0).all()


@given(st.data())
def test_a_degenerate_box_shares_nothing_with_any(data):
    batch = data.draw(batches(), label="batch")
    good, bad = data.draw(boxes(batch)), data.draw(degenerate_boxes(batch))
    for pair in ((good, bad), (bad, good), (bad, bad)):
        assert (intersect_boxes(*pair) == 0).all()
        assert (box_iou(*pair) == 0).all()


@given(st.data())
def test_degenerate_boxes_have_zero_gradients(data):
    good, bad = data.draw(boxes((3,))), data.draw(degenerate_boxes((3,)))
    for pair in ((good, bad), (bad, good), (bad, bad)):
        pair = [x.clone().requires_grad_() for x in pair]
        total = intersect_boxes(*pair).sum() + box_iou(*pair).sum() + box_area(pair[0]).sum()
        for box, grad in zip(pair, torch.autograd.grad(total, pair), strict=True):
            assert grad.isfinite().all()
            assert (grad[~boxes_valid(box)] == 0).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_area_and_iou_of_an_image_do_not_overflow_in_half_precision(dtype):
    box = torch.tensor([0.0, 0.0, 2048.0, 1024.0], dtype=dtype)
    assert box_area(box) == 2048 * 1024
    assert box_iou(box, box) == 1
    assert box_area(box).dtype == torch.float32


@pytest.mark.parametrize("function", [box_containment, box_iou, intersect_boxes])
def test_batches_that_differ_are_refused(function):
    with pytest.raises(TypeError, match=r"argument 'boxes2'.*batch=.*shape \(2, 4\)"):
        function(torch.zeros(3, 4), torch.zeros(2, 4))


@pytest.mark.parametrize("function", [boxes_valid, box_area])
@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 5), torch.zeros(4).long(), torch.tensor(1.0), [0, 1]]
)
def test_what_is_no_box_is_refused(function, bad):
    with pytest.raises(TypeError, match=f"{function.__name__}: argument 'boxes'"):
        function(bad)


# -------------------------------------------------------------------------------- RoIAlign


def torchvision_roi_align(features, boxes, size, ratio):
    """torchvision's RoIAlign, for boxes in the frame of the map."""
    d, h, w = features.shape[-3:]
    batch, n = math.prod(features.shape[:-3]), boxes.shape[-2]
    pixels = (boxes * boxes.new_tensor([w, h, w, h])).reshape(batch, n, 4)
    got = ops.roi_align(
        features.reshape(batch, d, h, w),
        list(pixels),
        size,
        sampling_ratio=ratio or -1,
        aligned=True,
    )
    return got.reshape(*boxes.shape[:-1], d, *size)


@given(st.data(), sizes(1, 4), ratios())
def test_a_constant_map_gives_the_constant(data, size, ratio):
    batch = data.draw(batches(), label="batch")
    inside = data.draw(rois(batch, low=0.0, high=1.0), label="boxes")
    h, w = data.draw(sizes(), label="map")
    constant = data.draw(tensors((*batch, 2)), label="constant")[..., None, None]
    got = roi_align(constant.expand(*batch, 2, h, w), inside, size, sampling_ratio=ratio)
    assert got.valid.all()
    want = constant[..., None, :, :, :].expand(*inside.shape[:-1], 2, *size)
    torch.testing.assert_close(got.features, want, **CLOSE)


@given(batches(), sizes(2), sizes(1, 4), ratios(), generators())
def test_a_map_of_coordinates_gives_the_centers_of_the_bins(batch, cells, size, ratio, generator):
    h, w = cells
    whole = image_box((1, 1))
    coordinates = grid_points(whole, cells).mT.unflatten(-1, cells).expand(*batch, 2, h, w)
    half = torch.tensor([0.5 / w, 0.5 / h], dtype=torch.float64)
    inside = boxes_within(generator, torch.cat([half, 1 - half]).expand(*batch, 3, 4))
    got = roi_align(coordinates, inside, size, sampling_ratio=ratio).features
    torch.testing.assert_close(got.flatten(-2).mT, grid_points(inside, size), **CLOSE)


@given(st.data(), st.sampled_from([0, 1]))
def test_the_whole_map_in_bins_of_one_cell_is_the_map(data, ratio):
    maps = data.draw(feature_maps(data.draw(batches(), label="batch")), label="features")
    whole = image_box((1, 1), (*maps.shape[:-3], 1))
    got = roi_align(maps, whole, tuple(maps.shape[-2:]), sampling_ratio=ratio)
    torch.testing.assert_close(got.features[..., 0, :, :, :], maps, **CLOSE)


@given(st.data(), sizes(1, 3), st.integers(2, 4))
def test_the_whole_map_in_bins_of_many_cells_is_average_pooling(data, size, factor):
    cells = (size[0] * factor, size[1] * factor)
    maps = data.draw(feature_maps((2,), size=cells), label="features")
    whole = image_box((1, 1), (2, 1))
    for ratio in (0, factor):
        got = roi_align(maps, whole, size, sampling_ratio=ratio).features[:, 0]
        torch.testing.assert_close(got, F.avg_pool2d(maps, factor), **CLOSE)


@given(st.data(), sizes(1, 3), ratios())
def test_valid_boxes_are_pooled_as_if_alone_and_the_others_are_zero(data, size, ratio):
    batch = data.draw(batches(), label="batch")
    maps, regions = data.draw(feature_maps(batch)), data.draw(rois(batch))
    valid = data.draw(valid_rows(regions.shape[:-1]), label="valid")
    got = roi_align(maps, regions, size, valid, sampling_ratio=ratio)
    everything = roi_align(maps, regions, size, sampling_ratio=ratio)
    assert everything.valid.all()
    assert torch.equal(got.valid, valid)
    assert (got.features[~valid] == 0).all()
    torch.testing.assert_close(got.features[valid], everything.features[valid], **CLOSE)
    for k in range(regions.shape[-2]):
        alone = roi_align(maps, regions[..., k : k + 1, :], size, sampling_ratio=ratio).features
        want = everything.features[..., k : k + 1, :, :, :]
        torch.testing.assert_close(alone, want, **CLOSE)


@given(st.data(), ratios())
def test_permuted_boxes_give_permuted_features(data, ratio):
    maps, regions = data.draw(feature_maps((2,))), data.draw(rois((2,), 5))
    valid = data.draw(valid_rows((2, 5)), label="valid")
    order = torch.randperm(5, generator=data.draw(generators()))
    got = roi_align(maps, regions[:, order], 2, valid[:, order], sampling_ratio=ratio)
    want = roi_align(maps, regions, 2, valid, sampling_ratio=ratio)
    torch.testing.assert_close(got.features, want.features[:, order], **CLOSE)
    assert torch.equal(got.valid, want.valid[:, order])


@given(st.data(), sizes(1, 3), ratios(1))
def test_a_mirrored_and_a_transposed_map_give_the_same_turned_round(data, size, ratio):
    batch = data.draw(batches(), label="batch")
    maps, regions = data.draw(feature_maps(batch)), data.draw(rois(batch))
    want = roi_align(maps, regions, size, sampling_ratio=ratio).features
    x1, y1, x2, y2 = regions.unbind(-1)
    mirrored = torch.stack([1 - x2, y1, 1 - x1, y2], -1)
    got = roi_align(maps.flip(-1), mirrored, size, sampling_ratio=ratio).features
    torch.testing.assert_close(got.flip(-1), want, **CLOSE)
    transposed = torch.stack([y1, x1, y2, x2], -1)
    got = roi_align(maps.mT, transposed, size[::-1], sampling_ratio=ratio).features
    torch.testing.assert_close(got.mT, want, **CLOSE)


@given(st.data(), ratios())
def test_degenerate_boxes_give_zeros_and_no_gradient_and_leave_the_others_alone(data, ratio):
    maps = data.draw(feature_maps((2,)), label="features")
    good = data.draw(rois((2,), 3), label="good")
    bad = (data.draw(degenerate_boxes((2, 3)), label="bad") / 8).requires_grad_()
    weight = data.draw(tensors((2, 6, maps.shape[1], 2, 2)), label="weight")
    asked = data.draw(st.booleans(), label="asked for")

    def pooled(maps, regions, weight):
        leaves = [maps.clone().requires_grad_(), regions]
        valid = torch.ones(regions.shape[:-1], dtype=torch.bool) if asked else None
        got = roi_align(leaves[0], regions, 2, valid, sampling_ratio=ratio)
        return got, torch.autograd.grad((got.features * weight).sum(), leaves)

    both = torch.stack([bad.detach(), good], -2).flatten(-3, -2).requires_grad_()
    got, grads = pooled(maps, both, weight)
    want, alone = pooled(maps, good.requires_grad_(), weight[:, 1::2])
    assert got.valid.tolist() == [[False, True] * 3] * 2
    assert (got.features[:, ::2] == 0).all()
    assert (grads[1][:, ::2] == 0).all()
    torch.testing.assert_close(got.features[:, 1::2], want.features, **CLOSE)
    torch.testing.assert_close(grads[0], alone[0], **CLOSE)
    torch.testing.assert_close(grads[1][:, 1::2], alone[1], **CLOSE)
    _, grads = pooled(maps, bad, weight[:, ::2])
    assert all((grad == 0).all() for grad in grads)


@given(st.data(), ratios())
def test_a_nan_reaches_no_other_image_and_no_box_that_is_not_valid(data, ratio):
    maps = data.draw(feature_maps((2,)), label="features")
    maps[0, :, 0, 0] = torch.nan
    maps.requires_grad_()
    regions = data.draw(rois((2,), 3), label="boxes").requires_grad_()
    valid = torch.tensor([[True, False, True]] * 2)
    got = roi_align(maps, regions, 2, valid, sampling_ratio=ratio)
    grads = torch.autograd.grad(got.features.sum(), [maps, regions])
    clean = [x[1:].detach().requires_grad_() for x in (maps, regions)]
    alone = roi_align(*clean, 2, valid[1:], sampling_ratio=ratio)
    torch.testing.assert_close(got.features[1:], alone.features, **CLOSE)
    for grad, want in zip(grads, torch.autograd.grad(alone.features.sum(), clean), strict=True):
        torch.testing.assert_close(grad[1:], want, **CLOSE)
    assert (got.features[0, 1] == 0).all()
    assert (grads[1][0, 1] == 0).all()
    assert grads[0].isfinite().all()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@given(data=st.data(), size=sizes(1, 5), ratio=ratios())
def test_roi_align_is_torchvisions(dtype, close, data, size, ratio):
    batch = data.draw(batches(), label="batch")
    maps = data.draw(feature_maps(batch, size=data.draw(sizes())), label="features").to(dtype)
    regions = data.draw(rois(batch, **at_most(ratio)), label="boxes").to(dtype)
    got = roi_align(maps, regions, size, sampling_ratio=ratio).features
    assert got.shape == (*regions.shape[:-1], maps.shape[-3], *size)
    assert got.dtype == dtype
    if maps.numel():
        want = torchvision_roi_align(maps, regions, size, ratio)
        torch.testing.assert_close(got, want, rtol=0, atol=close)


@given(st.data(), sizes(1, 3), ratios())
def test_the_gradient_to_the_features_is_torchvisions(data, size, ratio):
    maps = data.draw(feature_maps((2,)), label="features").requires_grad_()
    regions = data.draw(rois((2,), 3, **at_most(ratio)), label="boxes")
    weight = data.draw(tensors((2, 3, maps.shape[1], *size)), label="weight")
    got, want = (
        torch.autograd.grad((pooled * weight).sum(), maps)[0]
        for pooled in (
            roi_align(maps, regions, size, sampling_ratio=ratio).features,
            torchvision_roi_align(maps, regions, size, ratio),
        )
    )
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_the_gradient_to_the_boxes_is_a_finite_difference(ratio):
    maps = uniform(seeded(), 2, 2, 4, 5)
    regions = torch.tensor([[0.11, 0.23, 0.83, 0.71], [-0.37, 0.31, 0.47, 1.29]]).double()
    regions = regions.expand(2, 2, 4).contiguous().requires_grad_()

    def pooled(regions):
        return roi_align(maps, regions, (2, 3), sampling_ratio=ratio).features

    assert torch.autograd.gradcheck(pooled, (regions,))


def test_a_bin_far_outside_is_zero_and_one_near_the_map_repeats_its_edge():
    maps = torch.ones(1, 1, 4)
    # One point a bin, in cells from the left edge: -0.6, -0.4, 4.4, 4.6.
    centers = torch.tensor([-0.6, -0.4, 4.4, 4.6]) / 4
    regions = torch.stack([centers - 0.1, torch.zeros(4), centers + 0.1, torch.ones(4)], -1)
    got = roi_align(maps, regions, 1, sampling_ratio=1)
    assert got.features.flatten().tolist() == [0, 1, 1, 0]
    assert got.valid.all()


def test_a_box_larger_than_the_map_is_sampled_as_densely_as_one_of_its_size():
    maps = uniform(seeded(), 2, 6, 6)
    large = torch.tensor([[-1.0, -1.0, 2.0, 2.0]]).double()
    got = roi_align(maps, large, 2, sampling_ratio=0).features
    assert torch.equal(got, roi_align(maps, large, 2, sampling_ratio=3).features)


def test_a_number_is_a_square_of_bins():
    maps, regions = torch.rand(2, 4, 5), torch.tensor([[0.1, 0.2, 0.7, 0.9]])
    got = roi_align(maps, regions, 3).features
    assert torch.equal(got, roi_align(maps, regions, (3, 3)).features)
    assert torch.equal(got, roi_align(maps, regions, 3, sampling_ratio=2).features)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_maps_are_pooled_where_float_boxes_say(dtype):
    # A box around each cell gives the cell; corners in bfloat16 are off by a fifth of a cell.
    maps = torch.arange(100.0)[None, None].to(dtype)
    edges = torch.arange(101.0) / 100
    regions = torch.stack([edges[:-1], torch.zeros(100), edges[1:], torch.ones(100)], -1)
    got = roi_align(maps, regions, 1, sampling_ratio=1).features
    assert got.dtype == dtype
    torch.testing.assert_close(got.flatten().float(), torch.arange(100.0), rtol=0, atol=1e-2)


def test_pooling_ignores_autocast():
    maps, regions = torch.rand(2, 3, 5, 5), torch.tensor([[[0.1, 0.2, 0.7, 0.9]]] * 2)
    want = roi_align(maps, regions, 2).features
    with torch.autocast("cpu", torch.bfloat16):
        got = roi_align(maps, regions, 2).features
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_no_box_and_no_channel_pool_to_nothing():
    got = roi_align(torch.rand(2, 3, 4, 4), torch.zeros(2, 0, 4), (2, 3))
    assert got.features.shape == (2, 0, 3, 2, 3)
    assert got.valid.shape == (2, 0)
    got = roi_align(torch.rand(2, 0, 4, 4), torch.tensor([[0.0, 0, 1, 1]]).expand(2, 5, 4), (2, 3))
    assert got.features.shape == (2, 5, 0, 2, 3)
    assert got.valid.all()


@pytest.mark.parametrize("size", [0, (0, 2), (2, 0), -1])
def test_a_box_without_bins_is_refused(size):
    with pytest.raises(ValueError, match=r"densekit.boxes.roi_align: size is .*at least one bin"):
        roi_align(torch.zeros(1, 2, 2), torch.zeros(1, 4), size)


def test_a_negative_ratio_and_a_map_without_cells_are_refused():
    with pytest.raises(ValueError, match=r"densekit.boxes.roi_align: .*sampling_ratio -1"):
        roi_align(torch.zeros(1, 2, 2), torch.zeros(1, 4), 2, sampling_ratio=-1)
    for h, w in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match=f"densekit.boxes.roi_align: .*map {h} x {w}"):
            roi_align(torch.zeros(1, h, w), torch.zeros(1, 4), 2)


def test_boxes_and_maps_that_do_not_belong_together_are_refused():
    maps, regions = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4)
    with pytest.raises(TypeError, match=r"roi_align: argument 'boxes'.*batch=.*\(3, 5, 4\)"):
        roi_align(maps, torch.zeros(3, 5, 4), 2)
    with pytest.raises(TypeError, match=r"roi_align: argument 'valid'.*n=5.*\(2, 4\)"):
        roi_align(maps, regions, 2, torch.ones(2, 4).bool())
    with pytest.raises(TypeError, match=r"roi_align: argument 'valid'.*float32"):
        roi_align(maps, regions, 2, torch.ones(2, 5))
    with pytest.raises(TypeError, match=r"roi_align: argument 'features'.*int64"):
        roi_align(maps.long(), regions, 2)


# --------------------------------------------------------------------------- pyramid levels


def torchvision_levels(boxes, low, high, *options):
    return LevelMapper(low, high, *options)([boxes]) + low


@st.composite
def boxes_of_all_sizes(draw, n=8):
    """Boxes from 2 to 4000 pixels a side."""
    generator = draw(generators())
    extent = 2 ** uniform(generator, n, 2, low=1, high=12)
    start = uniform(generator, n, 2, low=-100, high=100)
    return torch.cat([start, start + extent], -1)


@given(boxes_of_all_sizes(), st.integers(-1, 4), st.integers(0, 4))
def test_levels_are_torchvisions(regions, low, more):
    high = low + more
    got = assign_levels(regions, levels=(low, high))
    assert torch.equal(got, torchvision_levels(regions, low, high))
    got = assign_levels(regions, levels=(low, high), canonical_size=100.0, canonical_level=3)
    assert torch.equal(got, torchvision_levels(regions, low, high, 100, 3))
    assert torch.equal(assign_levels(regions), torchvision_levels(regions, 2, 5))


@given(boxes_of_all_sizes(), generators())
def test_a_larger_box_is_never_on_a_lower_level(regions, generator):
    grown = regions + uniform(generator, *regions.shape, high=500) * torch.tensor([-1, -1, 1, 1])
    assert (assign_levels(grown) >= assign_levels(regions)).all()


@given(degenerate_boxes(), st.integers(-3, 6))
def test_degenerate_boxes_are_on_the_lowest_level(bad, low):
    assert (assign_levels(1e4 * bad, levels=(low, low + 3)) == low).all()


def test_levels_change_at_half_and_twice_the_canonical_size():
    sides = torch.tensor([1.0, 111.9, 112, 223.9, 224, 447.9, 448, 5000])
    square = torch.stack([0 * sides, 0 * sides, sides, sides], -1)
    assert assign_levels(square).tolist() == [2, 2, 3, 3, 4, 4, 5, 5]
    shape = assign_levels(torch.tensor([[[0.0, 0.0, 112.0, 448.0]], [[0.0, 0.0, 100.0, 448.0]]]))
    assert shape.tolist() == [[4], [3]]
    rounded = torch.tensor([0.0, 0.0, 224 * (1 - 1e-8), 224.0], dtype=torch.float64)
    assert assign_levels(rounded) == 4


@pytest.mark.parametrize("options", [{"levels": (3, 2)}, {"canonical_size": 0.0}])
def test_levels_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=r"densekit.boxes.assign_levels: levels are .* above 0"):
        assign_levels(torch.zeros(2, 4), **options)


# ------------------------------------------------------------------------ boxes at a given IoU


@given(boxes(), st.floats(0, 1), generators())
def test_a_moved_box_has_the_size_of_the_box_and_the_iou_that_was_asked(good, iou, generator):
    moved = sample_boxes_at_iou(good, iou, generator=generator)
    want = torch.full_like(good[..., 0], iou)
    torch.testing.assert_close(box_iou(good, moved), want, rtol=0, atol=1e-9)
    extent, kept = (x[..., 2:] - x[..., :2] for x in (good, moved))
    torch.testing.assert_close(kept, extent, **CLOSE)


@given(boxes(), generators())
def test_at_iou_one_the_box_stays_and_at_iou_zero_it_touches(good, generator):
    assert torch.equal(sample_boxes_at_iou(good, 1.0, generator=generator), good)
    moved = sample_boxes_at_iou(good, 0.0, generator=generator)
    shift = (moved - good)[..., :2].abs()
    torch.testing.assert_close(shift, good[..., 2:] - good[..., :2], **CLOSE)


def test_boxes_move_in_all_directions_and_divide_the_loss_at_random():
    regions = torch.tensor([[10.0, 20.0, 14.0, 22.0]], dtype=torch.float64).expand(4000, 4)
    moved = sample_boxes_at_iou(regions, 0.4, generator=seeded())
    shift = (moved - regions)[:, :2] / torch.tensor([4.0, 2.0])
    assert (shift != 0).all()
    directions = (shift > 0).long() @ torch.tensor([1, 2])
    assert (directions.bincount(minlength=4) / 4000 - 0.25).abs().max() < 0.03
    part = (1 - shift.abs()).log() / math.log(0.8 / 1.4)
    torch.testing.assert_close(part.sum(-1), torch.ones(4000).double())
    assert stats.kstest(part[:, 0], "uniform").pvalue > 1e-4


def test_a_generator_decides_the_moves():
    regions = torch.tensor([[0.2, 0.2, 0.6, 0.6]]).expand(3, 4)
    first, again, other = (
        sample_boxes_at_iou(regions, 0.5, generator=seeded(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@given(degenerate_boxes(), generators())
def test_degenerate_boxes_stay_degenerate(bad, generator):
    assert not boxes_valid(sample_boxes_at_iou(bad, 0.5, generator=generator)).any()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_boxes_make_the_moves_of_float_boxes(dtype):
    regions = torch.tensor([[2.0, 2.0, 6.0, 4.0]]).expand(9, 4)
    half = sample_boxes_at_iou(regions.to(dtype), 0.5, generator=seeded())
    assert half.dtype == dtype
    assert torch.equal(half, sample_boxes_at_iou(regions, 0.5, generator=seeded()).to(dtype))


@pytest.mark.parametrize("iou", [-0.1, 1.1, math.nan])
def test_an_iou_outside_its_range_is_refused(iou):
    with pytest.raises(ValueError, match=f"densekit.boxes.sample_boxes_at_iou: iou is {iou}"):
        sample_boxes_at_iou(torch.zeros(2, 4), iou)


@pytest.mark.parametrize(("cells", "bins"), [(14, 1), (28, 1), (50, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_of_whole_cells_take_torchvisions_points_whatever_the_rounding(cells, bins, dtype):
    spans = [(a, b) for a in range(cells) for b in range(a + 1, cells + 1) if (b - a) % bins == 0]
    pixels = torch.tensor([[a, 0, b, 9] for a, b in spans], dtype=dtype)
    maps = torch.rand(1, 9, cells, generator=torch.Generator().manual_seed(0)).to(dtype)
    boxes = pixels / torch.tensor([cells, 9, cells, 9], dtype=dtype)
    got = roi_align(maps, boxes, (1, bins), sampling_ratio=0).features
    want = ops.roi_align(maps[None], [pixels], (1, bins), aligned=True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


# -------------------------------------------------------------------- containment and clipping


@given(box_pairs())
def test_the_shares_of_both_boxes_give_their_iou(pair):
    first, second = box_containment(*pair), box_containment(*pair[::-1])
    shared = first * box_area(pair[0])
    torch.testing.assert_close(shared, second * box_area(pair[1]), **CLOSE)
    union = box_area(pair[0]) + box_area(pair[1]) - shared
    torch.testing.assert_close(shared, box_iou(*pair) * union, **CLOSE)
    assert ((first >= 0) & (first <= 1)).all()


@given(st.data())
def test_a_box_contains_what_lies_inside_it_whole(data):
    outer = data.draw(boxes(data.draw(batches())), label="outer")
    inner = boxes_within(data.draw(generators()), outer, False)
    assert (box_containment(inner, outer) == 1).all()
    assert (box_containment(outer, outer) == 1).all()
    want = box_area(inner) / box_area(outer)
    torch.testing.assert_close(box_containment(outer, inner), want, **CLOSE)


@given(disjoint_views())
def test_disjoint_boxes_contain_nothing_of_each_other(pair):
    assert (box_containment(pair[0].box, pair[1].box) == 0).all()


@given(st.data())
def test_degenerate_boxes_contain_nothing_and_have_zero_gradients(data):
    good, bad = data.draw(boxes((3,))), data.draw(degenerate_boxes((3,)))
    for pair in ((good, bad), (bad, good), (bad, bad)):
        pair = [x.clone().requires_grad_() for x in pair]
        got = box_containment(*pair)
        assert (got == 0).all()
        for grad in torch.autograd.grad(got.sum(), pair):
            assert (grad == 0).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_the_share_of_an_image_does_not_overflow_in_half_precision(dtype):
    box = torch.tensor([0.0, 0.0, 2048.0, 1024.0], dtype=dtype)
    half = torch.tensor([0.0, 0.0, 1024.0, 1024.0], dtype=dtype)
    assert box_containment(box, half) == 0.5
    assert box_containment(half, box) == 1
    assert box_containment(box, half).dtype == torch.float32


@given(st.data(), sizes())
def test_clipped_boxes_are_torchvisions(data, size):
    around = data.draw(rois(data.draw(batches()), low=-9.0, high=17.0, largest=20.0), label="boxes")
    got = clip_boxes(around, size)
    want = ops.clip_boxes_to_image(around.reshape(-1, 4), size)
    assert torch.equal(got.reshape(-1, 4), want)
    assert torch.equal(clip_boxes(got, size), got)


@given(st.data(), sizes())
def test_clipping_keeps_what_the_image_contains(data, size):
    around = data.draw(rois(data.draw(batches()), low=-9.0, high=17.0, largest=20.0), label="boxes")
    whole = image_box(size).expand_as(around)
    got = clip_boxes(around, size)
    shared = box_containment(around, whole)
    assert torch.equal(boxes_valid(got), shared > 0)
    torch.testing.assert_close(box_area(got), shared * box_area(around), rtol=0, atol=1e-11)
    inside = boxes_within(data.draw(generators()), whole)
    assert torch.equal(clip_boxes(inside, size), inside)


@given(degenerate_boxes(), sizes())
def test_a_degenerate_box_is_not_valid_after_clipping(bad, size):
    finite = torch.where(bad.isinf(), torch.nan, bad)
    assert not boxes_valid(clip_boxes(finite, size)).any()


def test_an_infinite_box_is_clipped_to_the_image():
    box = torch.tensor([-torch.inf, 1.0, torch.inf, 3.0])
    assert clip_boxes(box, (4, 8)).tolist() == [0, 1, 8, 3]


@pytest.mark.parametrize("size", [(0, 4), (4, -1)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match=r"densekit.boxes.clip_boxes: size is"):
        clip_boxes(torch.zeros(2, 4), size)


# ------------------------------------------------------------------------------- drawing boxes


@st.composite
def ragged_boxes(draw):
    """Boxes of each image, all different, and which of them are asked for."""
    shape = draw(
        st.sampled_from([(4,), (2, 3), (2, 3, 6)])
    )  # no images, no boxes: test_contract.py
    return draw(boxes(shape, whole_pixels=False)), draw(valid_rows(shape))


@given(ragged_boxes(), st.integers(0, 8), generators())
def test_drawn_boxes_are_some_of_the_images_own_each_once(case, count, generator):
    regions, valid = case
    got = sample_boxes(regions, count, valid, generator=generator)
    assert got.boxes.shape == (*regions.shape[:-2], count, 4)
    assert got.boxes.dtype == regions.dtype
    images = math.prod(regions.shape[:-2])
    parts = (x.reshape(images, *x.shape[regions.ndim - 2 :]) for x in (*got, regions, valid))
    for drawn, kept, own, use in zip(*(x.tolist() for x in parts), strict=True):
        some = [box for box, used in zip(own, use, strict=True) if used]
        most = min(count, len(some))
        assert kept == [True] * most + [False] * (count - most)  # the valid ones first
        assert all(box in some for box in drawn[:most])
        assert len({tuple(box) for box in drawn[:most]}) == most
        assert drawn[most:] == [drawn[0] if most else [0, 0, 0, 0]] * (count - most)


@given(st.data(), st.integers(1, 6), generators())
def test_degenerate_boxes_are_never_drawn(data, count, generator):
    good = data.draw(boxes((2, 3)), label="good")
    bad = data.draw(degenerate_boxes((2, 3)), label="bad")
    mixed = torch.stack([bad, good], 2).flatten(1, 2)
    got = sample_boxes(mixed, count, generator=generator)
    assert torch.equal(got.valid.sum(1), torch.tensor([min(count, 3)] * 2))
    assert got.boxes.isfinite().all()
    assert boxes_valid(got.boxes).all()
    nothing = sample_boxes(bad, count, torch.ones(2, 3, dtype=torch.bool), generator=generator)
    assert not nothing.valid.any()
    assert (nothing.boxes == 0).all()


def numbered(*batch, n=5):
    """Boxes whose left side is their number."""
    first = torch.arange(float(n)).expand(*batch, n)
    return torch.stack([first, first, first + 1, first + 1], -1)


def test_without_word_of_what_is_valid_all_boxes_are_drawn_from():
    everything = torch.ones(6, 5, dtype=torch.bool)
    got, want = (sample_boxes(numbered(6), 7, x, generator=seeded()) for x in (None, everything))
    assert torch.equal(got.boxes, want.boxes)
    assert torch.equal(got.valid, want.valid)
    assert torch.equal(got.boxes[:, :5, 0].sort().values, numbered(6)[..., 0])


def test_every_choice_of_boxes_in_every_order_is_as_likely():
    valid = torch.tensor([True, True, False, True, True])
    got = sample_boxes(numbered(20_000), 2, valid.expand(20_000, 5), generator=seeded())
    first, second = got.boxes[..., 0].long().unbind(-1)
    counts = torch.bincount(5 * first + second, minlength=25).view(5, 5)[valid][:, valid]
    assert counts.sum() == 20_000
    assert (counts.diagonal() == 0).all()
    assert stats.chisquare(counts[~torch.eye(4, dtype=torch.bool)]).pvalue > 1e-4


def test_the_boxes_of_one_image_say_nothing_of_another():
    got = sample_boxes(numbered(20_000, 2, n=4), 1, generator=seeded())
    one, other = got.boxes[..., 0, 0].long().unbind(-1)
    assert stats.chisquare(torch.bincount(4 * one + other, minlength=16)).pvalue > 1e-4


def test_a_generator_decides_the_drawn_boxes():
    first, again, other = (
        sample_boxes(numbered(6, n=20), 4, generator=seeded(s)).boxes for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_boxes_are_drawn_as_float_boxes_are(dtype):
    regions = numbered(50, n=9)
    half = sample_boxes(regions.to(dtype), 5, generator=seeded()).boxes
    assert half.dtype == dtype
    assert torch.equal(half, sample_boxes(regions, 5, generator=seeded()).boxes.to(dtype))


@given(ragged_boxes(), st.integers(1, 8), generators())
def test_the_gradient_goes_to_the_boxes_that_were_drawn(case, count, generator):
    regions, valid = case[0].requires_grad_(), case[1]
    got = sample_boxes(regions, count, valid, generator=generator)
    (grad,) = torch.autograd.grad(torch.where(got.valid[..., None], got.boxes, 0.0).sum(), regions)
    assert (grad[~valid] == 0).all()
    assert grad.sum() == 4 * got.valid.sum()
    assert ((grad == 0) | (grad == 1)).all()


def test_fewer_than_no_boxes_are_refused():
    with pytest.raises(ValueError, match=r"densekit.boxes.sample_boxes: count is -1"):
        sample_boxes(torch.zeros(2, 4), -1)


def test_boxes_and_what_is_valid_of_them_fit():
    with pytest.raises(TypeError, match=r"sample_boxes: argument 'valid'"):
        sample_boxes(torch.zeros(2, 3, 4), 1, torch.ones(2, 4, dtype=torch.bool))
