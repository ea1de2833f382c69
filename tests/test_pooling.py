"""RoIAlign and levels against torchvision, region embeddings against a loop and the authors'."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    batches,
    boxes_within,
    degenerate_boxes,
    feature_maps,
    generators,
    image_box,
    rois,
    sizes,
    tensors,
    uniform,
    valid_rows,
)
from torchvision import ops
from torchvision.ops.poolers import LevelMapper
from densekit import assign_levels, grid_points, pool_masks, roi_align

CLOSE = {"rtol": 0, "atol": 1e-12}
DATA = Path(__file__).parent / "data"
HALVES = [torch.float16, torch.bfloat16]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ratios(low=0):
    """Points of a bin along each axis; 0 adapts to the box."""
    return st.integers(low, 3)


def at_most(ratio):
    """The largest box that torchvision and densekit sample alike."""
    return {"largest": 2.0 if ratio else 1.0}


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


@st.composite
def boxes_beside(draw, batch):
    """Boxes that share no area with their map: left, right, above or below; some touch it."""
    regions = draw(rois(batch, 4))
    low, high = regions[..., :2], regions[..., 2:]
    beyond = uniform(draw(generators()), *batch, 4, 2).where(draw(valid_rows((*batch, 4, 2))), 0.0)
    start = torch.stack([1 + beyond, -beyond - (high - low)])
    axis, side = (draw(valid_rows((*batch, 4))) for _ in range(2))
    start = torch.where(side[..., None], start[0], start[1])
    moved = torch.stack([axis, ~axis], -1)
    start = torch.where(moved, start, low)
    stop = start + (high - low)
    # A box that ends at 0 ends there, whatever its width is rounded to.
    stop = torch.where(moved & ~side[..., None], stop.clamp(max=0), stop)
    return torch.cat([start, stop], -1)


@given(st.data(), ratios())
def test_boxes_beside_the_map_are_not_valid(data, ratio):
    batch = data.draw(batches(), label="batch")
    leaves = [data.draw(feature_maps(batch)), data.draw(boxes_beside(batch))]
    leaves = [x.requires_grad_() for x in leaves]
    got = roi_align(*leaves, 2, sampling_ratio=ratio)
    assert not got.valid.any()
    assert (got.features == 0).all()
    for grad in torch.autograd.grad(got.features.sum(), leaves):
        assert (grad == 0).all()


def test_boxes_in_pixels_are_not_valid():
    pixels = torch.tensor([[32.0, 48.0, 160.0, 200.0], [1.0, 0.0, 99.0, 80.0]])
    got = roi_align(torch.ones(4, 7, 7), pixels, 2)
    assert got.valid.tolist() == [False, False]
    assert roi_align(torch.ones(4, 7, 7), pixels / 224, 2).valid.all()


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
    regions = torch.stack([centers - 0.2, torch.zeros(4), centers + 0.2, torch.ones(4)], -1)
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
    with pytest.raises(ValueError, match=r"densekit.pooling.roi_align: size is .*at least one bin"):
        roi_align(torch.zeros(1, 2, 2), torch.zeros(1, 4), size)


def test_a_negative_ratio_and_a_map_without_cells_are_refused():
    with pytest.raises(ValueError, match=r"densekit.pooling.roi_align: sampling_ratio is -1"):
        roi_align(torch.zeros(1, 2, 2), torch.zeros(1, 4), 2, sampling_ratio=-1)
    for h, w in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match=f"densekit.pooling.roi_align: the map is {h} x {w}"):
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
    (name,) = options
    with pytest.raises(ValueError, match=f"densekit.pooling.assign_levels: {name} is .*; give"):
        assign_levels(torch.zeros(2, 4), **options)


# ------------------------------------------------------------------------------ soft masks


@st.composite
def pools(draw):
    batch = draw(batches())
    n, k, d = (draw(st.integers(0, 5)) for _ in range(3))
    features = draw(tensors((*batch, n, d)))
    return features, draw(tensors((*batch, n, k), 0.0, 1.0)), draw(valid_rows((*batch, n)))


@given(pools())
def test_a_region_is_the_weighted_sum_of_its_cells(pool):
    features, masks, valid = pool
    want = torch.zeros(*features.shape[:-2], masks.shape[-1], features.shape[-1]).double()
    for cell in range(features.shape[-2]):
        used = masks[..., cell, :] * valid[..., cell, None]
        want = want + torch.einsum("...k,...d->...kd", used, features[..., cell, :])
    torch.testing.assert_close(pool_masks(*pool), want, rtol=1e-12, atol=1e-12)


@given(pools())
def test_the_average_is_the_sum_over_the_mass(pool):
    _, masks, valid = pool
    got = pool_masks(*pool, average=True)
    mass = (masks * valid[..., None]).sum(-2)[..., None]
    torch.testing.assert_close(got * mass, pool_masks(*pool), rtol=1e-12, atol=1e-12)
    assert (got[(mass == 0).expand_as(got)] == 0).all()


@given(pools())
def test_masks_over_all_cells_alike_average_like_a_mean(pool):
    features, masks, _ = pool
    got = pool_masks(features, torch.full_like(masks, 0.3), average=True)
    if features.shape[-2]:
        want = features.mean(-2, keepdim=True).expand_as(got)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(got, torch.zeros_like(got))


@given(pools(), st.booleans())
def test_cells_that_are_not_valid_reach_neither_result_nor_gradient(pool, average):
    features, masks, valid = pool
    poisoned = [torch.where(valid[..., None], x, torch.nan).requires_grad_() for x in pool[:2]]
    got = pool_masks(*poisoned, valid, average=average)
    assert torch.equal(got, pool_masks(features, masks, valid, average=average))
    for grad in torch.autograd.grad(got.sum(), poisoned):
        assert grad.isfinite().all()
        assert (grad[~valid] == 0).all()


def test_a_region_without_mass_is_zero_with_finite_gradients():
    features = torch.rand(3, 2, requires_grad=True)
    masks = torch.zeros(3, 4, requires_grad=True)
    got = pool_masks(features, masks, average=True)
    assert torch.equal(got, torch.zeros(4, 2))
    for grad in torch.autograd.grad(got.sum(), [features, masks]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_of_half_precision_do_not_overflow(dtype, autocast):
    # 49 cells of 3000 each: the sum is above float16's largest number.
    features, masks = torch.full((49, 2), 3000.0, dtype=dtype), torch.ones(49, 1, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = pool_masks(features, masks)
    assert torch.equal(got, 49 * features[:1].float())


@pytest.mark.parametrize("view", ["1", "2"])
def test_region_embeddings_of_the_authors_program(view):
    golden = np.load(DATA / "regionsim_0_B2_N6_C16_identity.npz")
    features, logits = (
        torch.from_numpy(golden[x + view]).double().flatten(2).mT for x in ("f", "z")
    )
    got = pool_masks(features, logits.softmax(-1))
    want = torch.from_numpy(golden[f"e{view}_softmax"])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    if view == "1":  # Eq 4 with the raw logits for masks
        want = torch.from_numpy(golden["e1_raw_paper_eq4"])
        torch.testing.assert_close(pool_masks(features, logits), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("features", "masks", "valid", "name"),
    [
        (torch.zeros(3, 2), torch.zeros(4, 5), None, "masks"),
        (torch.zeros(2, 3, 2), torch.zeros(3, 5), None, "masks"),
        (torch.zeros(3, 2), torch.zeros(3, 5).long(), None, "masks"),
        (torch.zeros(3), torch.zeros(3, 5), None, "features"),
        (torch.zeros(3, 2), torch.zeros(3, 5), torch.ones(4).bool(), "valid"),
        (torch.zeros(3, 2), torch.zeros(3, 5), torch.ones(3), "valid"),
    ],
)
def test_what_does_not_fit_is_refused(features, masks, valid, name):
    with pytest.raises(TypeError, match=f"pool_masks: argument '{name}'"):
        pool_masks(features, masks, valid)
