"""Frames, overlap, sampling and cropping of views, against torchvision where it has the same."""

import copy
import itertools
import math
import pickle
from functools import partial
from unittest import mock

import cv2
import numpy as np
import pytest
import skimage.transform
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats
from strategies import (
    batches,
    boxes,
    boxes_within,
    degenerate_boxes,
    disjoint_views,
    flips,
    generators,
    image_box,
    overlapping_views,
    points_in,
    sizes,
    tensors,
    uniform,
    valid_rows,
    views,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, default_collate
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision import ops
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv
from densekit import (
    View,
    box_area,
    box_containment,
    box_iou,
    boxes_image_to_view,
    boxes_in_view,
    boxes_valid,
    boxes_view_to_image,
    check_views,
    coordinate_map,
    crop_views,
    full_view,
    grid_points,
    gridsample,
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

CLOSE = {"rtol": 0, "atol": 1e-12}  # float64 coordinates of at most 8: 1000 roundings or so
UNIT = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
AXES = st.sampled_from([-1, -2])  # left to right, top to bottom


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------ the record


@given(views())
def test_a_view_of_two_fields_is_not_mirrored_top_to_bottom(view):
    for short in (View(view.box, view.flip), View(box=view.box, flip=view.flip)):
        assert short.vertical_flip.dtype == torch.bool
        assert short.vertical_flip.shape == view.flip.shape
        assert not short.vertical_flip.any()
    assert View(view.box, view.flip, view.vertical_flip).vertical_flip is view.vertical_flip


def test_a_view_that_is_read_by_numpy_is_not_mirrored_top_to_bottom_either():
    samples = [View(np.arange(4.0), flip) for flip in (np.array(True), True, np.bool_(True))]
    for sample in samples:
        assert not sample.vertical_flip
    assert not default_collate(samples[:1]).vertical_flip.any()
    assert not View(np.zeros((2, 4)), np.array([True, False])).vertical_flip.any()


def carried_by_a_loader(view):
    loader = DataLoader([View(*x) for x in zip(*view, strict=True)], batch_size=4)
    return next(iter(loader))


def mapped_by_vmap(view):
    axes = View(0, 0)  # as a tree of axes
    return torch.vmap(lambda x: x, in_dims=(axes,), out_dims=axes)(view)


def pinned(view):
    with mock.patch.object(torch.Tensor, "pin_memory", lambda x, *_: x):  # it wants a GPU
        return pin_memory(view)


def exported(view):
    class Mirror(torch.nn.Module):
        def forward(self, view):
            return view._replace(vertical_flip=~view.vertical_flip)

    program = torch.export.export(Mirror(), (view,)).module()
    return program(program(view))


@pytest.mark.parametrize(
    "carry",
    [
        lambda view: tree_map(torch.clone, view),
        lambda view: view._replace(box=view.box),
        lambda view: View._make(view),
        lambda view: pickle.loads(pickle.dumps(view)),
        copy.deepcopy,
        carried_by_a_loader,
        mapped_by_vmap,
        pinned,
        exported,
    ],
)
def test_a_view_stays_whole_wherever_records_are_carried(carry):
    view = View(uniform(seeded(), 4, 4), *flips(seeded(1), 2, 4))
    got = carry(view)
    assert type(got) is View
    assert all(map(torch.equal, got, view))


def test_views_are_made_inside_a_compiled_graph():
    def halves(view):
        left = View(view.box * torch.tensor([1, 1, 0.5, 1]), view.flip)
        return coordinate_map(left, (2, 3)), tree_map(lambda x: x[0], view)

    view = View(boxes_within(seeded(), image_box((8, 8), (4,))), *flips(seeded(1), 2, 4))
    got = torch.compile(halves, fullgraph=True, backend="aot_eager")(view)
    torch.testing.assert_close(got, halves(view))
    assert type(got[1]) is View


# ---------------------------------------------------------------------------------- frames


@given(st.data())
def test_points_return_from_the_view_frame(data):
    view = data.draw(views(), label="view")
    points = data.draw(points_in(image_box((8, 8), view.flip.shape)), label="points")
    torch.testing.assert_close(view_to_image(view, image_to_view(view, points)), points, **CLOSE)


@given(st.data())
def test_points_return_from_the_image_frame(data):
    view = data.draw(views(), label="view")
    points = data.draw(points_in(UNIT.expand(*view.flip.shape, 4)), label="points")
    # Divided by an extent of 0.25 pixels or more.
    back = image_to_view(view, view_to_image(view, points))
    torch.testing.assert_close(back, points, **CLOSE)


@given(st.data())
def test_points_of_a_crop_fill_the_unit_square(data):
    view = data.draw(views(), label="view")
    inside = image_to_view(view, data.draw(points_in(view.box), label="points"))
    assert ((inside >= -1e-12) & (inside <= 1 + 1e-12)).all()


def mirrored(view, axis):
    """The same crop with the other flip along x (axis -1) or y (axis -2)."""
    if axis == -1:
        return view._replace(flip=~view.flip)
    return view._replace(vertical_flip=~view.vertical_flip)


def mirrored_boxes(boxes, axis):
    """Boxes in the frame of a view, in that of the mirrored view."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    parts = (1 - x2, y1, 1 - x1, y2) if axis == -1 else (x1, 1 - y2, x2, 1 - y1)
    return torch.stack(parts, -1)


@given(st.data(), AXES)
def test_a_flip_maps_x_or_y_to_one_minus_it(data, axis):
    view = data.draw(views(), label="view")
    points = data.draw(points_in(image_box((8, 8), view.flip.shape)), label="points")
    moved, kept = (0, 1) if axis == -1 else (1, 0)
    plain = image_to_view(view, points)
    other = image_to_view(mirrored(view, axis), points)
    torch.testing.assert_close(other[..., moved], 1 - plain[..., moved], rtol=0, atol=1e-11)
    assert torch.equal(other[..., kept], plain[..., kept])


@given(views())
def test_the_corners_of_the_crop_are_the_corners_of_the_unit_square(view):
    mapped = boxes_image_to_view(view, view.box[..., None, :])
    torch.testing.assert_close(mapped, UNIT.expand_as(mapped), **CLOSE)


@given(st.data())
def test_boxes_return_and_are_never_reversed(data):
    view = data.draw(views(), label="view")
    count = data.draw(st.integers(0, 4), label="count")
    inside = data.draw(boxes((*view.flip.shape, count)), label="boxes")
    mapped = boxes_image_to_view(view, inside)
    assert boxes_valid(mapped).all()
    torch.testing.assert_close(boxes_view_to_image(view, mapped), inside, **CLOSE)


@given(st.data())
def test_a_box_that_is_not_valid_stays_so_in_the_other_frame(data):
    view = data.draw(views(), label="view")
    bad = data.draw(degenerate_boxes((*view.flip.shape, 3)), label="boxes")
    assert not boxes_valid(boxes_image_to_view(view, bad)).any()
    assert not boxes_valid(boxes_view_to_image(view, bad)).any()


@given(st.data())
def test_a_box_and_its_corners_are_carried_alike(data):
    view = data.draw(views(), label="view")
    inside = data.draw(boxes((*view.flip.shape, 3)), label="boxes")
    corners = inside[..., [0, 1, 2, 1, 0, 3, 2, 3]].unflatten(-1, (4, 2))
    mapped = image_to_view(view, corners.flatten(-3, -2)).unflatten(-2, (3, 4))
    want = torch.cat([mapped.amin(-2), mapped.amax(-2)], -1)
    assert torch.equal(boxes_image_to_view(view, inside), want)


@given(st.data())
def test_a_degenerate_view_leaves_points_as_they_are(data):
    box = data.draw(degenerate_boxes(), label="box")
    view = View(box, *flips(seeded(), 2, *box.shape[:-1]))
    points = data.draw(points_in(image_box((8, 8), box.shape[:-1])), label="points")
    points.requires_grad_()
    box.requires_grad_()
    for move in (image_to_view, view_to_image):
        moved = move(view, points)
        assert torch.equal(moved, points)
        grads = torch.autograd.grad(moved.sum(), [points, box])
        assert torch.equal(grads[0], torch.ones_like(points))
        assert torch.equal(grads[1], torch.zeros_like(box))


def test_half_a_pixel_is_where_the_convention_puts_it():
    # A 4-pixel crop seen at 2 cells: the first cell covers two pixels, its center is their edge.
    view = View(torch.tensor([2.0, 0.0, 6.0, 4.0]), torch.tensor(False))
    assert coordinate_map(view, (2, 2))[0, 0].tolist() == [3.0, 1.0]
    flipped = View(view.box, torch.tensor(True))
    assert coordinate_map(flipped, (2, 2))[0, 0].tolist() == [5.0, 1.0]


# ------------------------------------------------------------------------- coordinate maps


@given(st.data())
def test_coordinate_map_matches_a_loop_over_cells(data):
    view = data.draw(views((2,)), label="view")
    h, w = data.draw(sizes(high=5), label="size")
    got = coordinate_map(view, (h, w))
    for b in range(2):
        x1, y1, x2, y2 = view.box[b].tolist()
        for i in range(h):
            for j in range(w):
                share = (j + 0.5) / w
                share = 1 - share if view.flip[b] else share
                down = (i + 0.5) / h
                down = 1 - down if view.vertical_flip[b] else down
                want = [x1 + share * (x2 - x1), y1 + down * (y2 - y1)]
                assert got[b, i, j].tolist() == pytest.approx(want, rel=0, abs=1e-12)


@given(st.data())
def test_the_coordinate_map_lies_strictly_inside_the_crop(data):
    view = data.draw(views(), label="view")
    points = coordinate_map(view, data.draw(sizes(), label="size")).flatten(-3, -2)
    assert (points > view.box[..., None, :2]).all()
    assert (points < view.box[..., None, 2:]).all()


@given(st.data())
def test_sampling_the_coordinate_map_returns_the_image_point_in_both_views(data):
    # Flips by pixel index beside resizes by edges fail here by half a pixel.
    pair = data.draw(overlapping_views(), label="views")
    maps = data.draw(st.tuples(sizes(2), sizes(2)), label="maps")
    points = grid_points(intersect_views(*pair).box, data.draw(sizes(1, 4), label="grid"))
    for view, size in zip(pair, maps, strict=True):
        local = image_to_view(view, points)
        sampled = gridsample(coordinate_map(view, size).movedim(-1, -3), local)
        # Bilinear interpolation is exact between cell centers; nearer the edge than half a cell
        # the outermost center is repeated, so the clamped point comes back.
        half = torch.tensor([0.5 / size[1], 0.5 / size[0]], dtype=torch.float64)
        want = view_to_image(view, local.maximum(half).minimum(1 - half))
        torch.testing.assert_close(sampled, want, **CLOSE)
        inside = ((local > half) & (local < 1 - half)).all(-1)
        torch.testing.assert_close(sampled[inside], points[inside], **CLOSE)


@given(degenerate_boxes())
def test_the_coordinate_map_of_a_degenerate_view_is_finite(box):
    view = View(box, *flips(seeded(), 2, *box.shape[:-1]))
    assert coordinate_map(view, (2, 3)).isfinite().all()


# --------------------------------------------------------------------------------- overlap


@given(overlapping_views())
def test_the_overlap_is_the_same_region_in_all_three_frames(pair):
    overlap = intersect_views(*pair)
    assert overlap.valid.all()
    for view, box in zip(pair, (overlap.box1, overlap.box2), strict=True):
        assert boxes_valid(box).all()
        assert ((box >= 0) & (box <= 1)).all()
        back = boxes_view_to_image(view, box[..., None, :])[..., 0, :]
        torch.testing.assert_close(back, overlap.box, **CLOSE)
        area = box_area(box) * box_area(view.box)
        torch.testing.assert_close(area, box_area(overlap.box), rtol=1e-10, atol=1e-12)


@given(overlapping_views())
def test_the_overlap_fraction_is_torchvisions_iou(pair):
    want = ops.box_iou(*(view.box.reshape(-1, 4) for view in pair)).diagonal()
    fraction = intersect_views(*pair).iou
    torch.testing.assert_close(fraction.flatten(), want, rtol=1e-12, atol=0)


@given(st.one_of(overlapping_views(), disjoint_views()))
def test_the_overlap_is_symmetric(pair):
    forth, back = intersect_views(*pair), intersect_views(*pair[::-1])
    assert torch.equal(forth.box, back.box)
    assert torch.equal(forth.box1, back.box2)
    assert torch.equal(forth.box2, back.box1)
    torch.testing.assert_close(forth.iou, back.iou, rtol=1e-12, atol=0)
    assert torch.equal(forth.valid, back.valid)


@given(overlapping_views(), AXES)
def test_a_flip_of_one_view_mirrors_its_overlap_box_only(pair, axis):
    view1, view2 = pair
    plain, flipped = intersect_views(*pair), intersect_views(mirrored(view1, axis), view2)
    assert torch.equal(plain.box, flipped.box)
    assert torch.equal(plain.box2, flipped.box2)
    torch.testing.assert_close(flipped.box1, mirrored_boxes(plain.box1, axis), **CLOSE)


def assert_nothing_shared(overlap):
    assert not overlap.valid.any()
    for part in overlap[:4]:
        assert torch.equal(part, torch.zeros_like(part))


@given(disjoint_views())
def test_disjoint_views_are_not_valid_and_all_zero(pair):
    assert_nothing_shared(intersect_views(*pair))


@given(st.data())
def test_a_degenerate_view_overlaps_nothing_and_has_finite_gradients(data):
    batch = data.draw(batches(), label="batch")
    good = data.draw(views(batch), label="good")
    box = data.draw(degenerate_boxes(batch), label="bad").requires_grad_()
    for pair in ((good, good._replace(box=box)), (good._replace(box=box), good)):
        overlap = intersect_views(*pair)
        assert_nothing_shared(overlap)
        total = sum(part.sum() for part in overlap[:4])
        assert torch.equal(torch.autograd.grad(total, box)[0], torch.zeros_like(box))


# -------------------------------------------------------------------------------- sampling


@st.composite
def samplings(draw):
    """Arguments of `sample_views` with wide and narrow ranges, down to a single value."""
    low = draw(st.floats(0.01, 1.0))
    scale = (low, draw(st.floats(low, 1.0)))
    low = draw(st.floats(0.2, 3.0))
    ratio = (low, draw(st.floats(low, 5.0)))
    return {"scale": scale, "ratio": ratio, "generator": draw(generators())}


@given(st.data())
def test_sampled_boxes_are_whole_pixels_inside_the_image(data):
    size, batch = data.draw(sizes(), label="size"), data.draw(batches(), label="batch")
    view = sample_views(size, batch, **data.draw(samplings(), label="options"))
    assert view.box.shape == (*batch, 4)
    assert view.flip.shape == batch
    assert torch.equal(view.box, view.box.round())
    assert boxes_valid(view.box).all()
    assert (view.box[..., :2] >= 0).all()
    assert (view.box[..., 2] <= size[1]).all()
    assert (view.box[..., 3] <= size[0]).all()


@given(st.data())
def test_inner_views_are_whole_pixels_inside_their_outer_view(data):
    outer = data.draw(views(size=(8, 8)), label="outer")
    batch = data.draw(batches(), label="batch")
    inner = sample_inner_views(outer, batch, **data.draw(samplings(), label="options"))
    assert inner.box.shape == (*batch, *outer.box.shape)
    assert inner.flip.shape == inner.box.shape[:-1]
    assert torch.equal(inner.box, inner.box.round())
    low, high = outer.box[..., :2], outer.box[..., 2:]
    has_pixel = (high.floor() > low.ceil()).all(-1).expand(inner.flip.shape)
    assert torch.equal(boxes_valid(inner.box), has_pixel)
    inside = (inner.box[..., :2] >= low) & (inner.box[..., 2:] <= high)
    assert inside[has_pixel].all()


@given(st.data())
def test_inner_views_of_a_square_may_be_all_of_it(data):
    side = data.draw(st.integers(1, 8))
    corner = torch.tensor(data.draw(st.tuples(*[st.integers(-5, 5)] * 2))).double()
    outer = View(torch.cat([corner, corner + side]), torch.tensor(True))
    inner = sample_inner_views(outer, (3,), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert torch.equal(inner.box, outer.box.expand(3, 4))


@given(st.data())
def test_inner_views_are_sampled_as_views_of_the_crop(data):
    size, options = data.draw(sizes(), label="size"), data.draw(samplings(), label="options")
    corner = torch.tensor([3.0, 5.0])
    outer = View(torch.cat([corner, corner + torch.tensor(size[::-1])]), torch.tensor(True))
    generator = options.pop("generator")
    state = generator.get_state()
    inner = sample_inner_views(outer, (4,), **options, generator=generator)
    want = sample_views(size, (4,), **options, generator=generator.set_state(state))
    assert torch.equal(inner.box, want.box + corner.repeat(2))
    assert torch.equal(inner.flip, want.flip)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inner_views_of_a_box_that_is_none_are_not_valid(bad):
    outer = View(torch.tensor([[0.0, 0.0, bad, 8.0], [4.0, 0.0, 2.0, 8.0]]), torch.ones(2).bool())
    assert not boxes_valid(sample_inner_views(outer).box).any()


@given(st.data())
def test_sampled_area_and_ratio_are_in_range_up_to_rounding(data):
    # No ratio at which a crop of a square image could fail to fit, so no central crop.
    side = data.draw(st.integers(20, 60), label="side")
    least = data.draw(st.floats(0.1, 0.5), label="scale")
    low = data.draw(st.floats(0.5, 1.0), label="ratio")
    scale, ratio = (least, 0.5), (low, 2.0)
    generator = data.draw(generators(), label="generator")
    view = sample_views((side, side), (16,), scale=scale, ratio=ratio, generator=generator)
    w, h = (view.box[:, 2:] - view.box[:, :2]).double().unbind(-1)
    # Each side moves by half a pixel at most, and a bit for float32.
    off = 0.5 + 1e-3
    assert ((w + off) * (h + off) >= scale[0] * side**2).all()
    assert ((w - off) * (h - off) <= scale[1] * side**2).all()
    assert ((w + off) / (h - off) >= ratio[0]).all()
    assert ((w - off) / (h + off) <= ratio[1]).all()


def torchvision_boxes(size, scale, ratio, count):
    image = torch.empty(0, *size)
    torch.manual_seed(0)
    crops = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    top, left, h, w = torch.tensor(crops, dtype=torch.float64).unbind(-1)
    return torch.stack([left, top, left + w, top + h], -1)


def statistics_of(box):
    x1, y1, x2, y2 = box.double().unbind(-1)
    w, h = x2 - x1, y2 - y1
    return {"area": w * h, "ratio": w / h, "x": x1, "y": y1, "right": x2, "bottom": y2}


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((480, 640), (0.2, 1.0), (3 / 4, 4 / 3)),
        ((427, 640), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((100, 300), (0.5, 1.0), (0.5, 2.0)),  # some ten draws fail: the central crop shows
    ],
)
@pytest.mark.parametrize("per_image", [False, True])
def test_views_have_the_distribution_of_random_resized_crop(size, scale, ratio, per_image):
    reference = statistics_of(torchvision_boxes(size, scale, ratio, 3000))
    count = 20_000
    if per_image:  # sizes of two kinds, interleaved; only those of the first kind are compared
        both = torch.tensor([size, (size[1], size[0])]).repeat(count, 1)
        box = sample_views(both, scale=scale, ratio=ratio, generator=seeded()).box[::2]
    else:
        box = sample_views(size, (count,), scale=scale, ratio=ratio, generator=seeded()).box
    for name, values in statistics_of(box).items():
        # Six statistics in six cases at 1e-4 each: a chance of 0.4 % to fail, once, for a
        # correct sampler; a distance of 0.043 between the two distributions is found.
        assert stats.ks_2samp(values, reference[name]).pvalue > 1e-4, name


def test_areas_and_ratios_have_the_distribution_that_the_docstring_states():
    # So small a scale that each first draw fits, so large an image that rounding is nothing.
    size, scale, ratio = (8000, 8000), (0.01, 0.2), (0.5, 2.0)
    got = statistics_of(
        sample_views(size, (20_000,), scale=scale, ratio=ratio, generator=seeded()).box
    )
    share = got["area"] / (size[0] * size[1])
    assert stats.kstest(share, stats.uniform(0.01, 0.19).cdf).pvalue > 1e-4
    log2 = got["ratio"].log2()
    assert stats.kstest(log2, stats.uniform(-1, 2).cdf).pvalue > 1e-4
    assert abs(stats.spearmanr(share, log2).statistic) < 4 / math.sqrt(20_000)


def test_area_ratio_place_and_flip_are_independent():
    # So small a scale that each first draw fits: place and size do not know each other either.
    count, size = 20_000, 8000
    view = sample_views((size, size), (count,), scale=(0.01, 0.2), generator=seeded())
    x1, y1, x2, y2 = view.box.double().unbind(-1)
    w, h = x2 - x1, y2 - y1
    draws = {"area": w * h, "ratio": w / h, "x": x1 / (size - w), "y": y1 / (size - h)}
    draws["flip"] = view.flip.double()
    for one, other in itertools.combinations(draws, 2):
        correlation = stats.spearmanr(draws[one], draws[other]).statistic
        assert abs(correlation) < 4 / math.sqrt(count), (one, other)


def test_the_place_is_uniform_over_whole_pixels():
    # A quarter of a 4 x 4 image is 2 x 2 pixels: nine places of 1000 views each, and 4 sigma.
    view = sample_views((4, 4), (9000,), scale=(0.25, 0.25), ratio=(1.0, 1.0), generator=seeded())
    assert torch.equal(view.box[:, 2:] - view.box[:, :2], torch.full((9000, 2), 2.0))
    places, counts = view.box[:, :2].unique(dim=0, return_counts=True)
    assert len(places) == 9
    assert ((counts - 1000).abs() < 4 * math.sqrt(9000 * 8 / 81)).all()


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["flip", "vertical_flip"])
def test_flips_have_their_probability(probability, name):
    count = 20_000
    view = sample_views((8, 8), (count,), **{name: probability}, generator=seeded())
    share = getattr(view, name).double().mean()
    assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / count)


def test_vertical_flips_are_independent_and_change_nothing_else():
    count = 20_000
    plain = sample_views((48, 64), (count,), generator=seeded())
    view = sample_views((48, 64), (count,), vertical_flip=0.5, generator=seeded())
    assert not plain.vertical_flip.any()
    assert torch.equal(view.box, plain.box)
    assert torch.equal(view.flip, plain.flip)
    others = statistics_of(view.box) | {"flip": view.flip}
    for name, other in others.items():
        correlation = stats.spearmanr(view.vertical_flip, other).statistic
        assert abs(correlation) < 4 / math.sqrt(count), name
    pairs = sample_view_pairs((48, 64), (count,), vertical_flip=0.5, generator=seeded())
    both = (pairs.view1.vertical_flip & pairs.view2.vertical_flip).double().mean()
    assert abs(both - 0.25) < 4 * math.sqrt(0.25 * 0.75 / count)


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (2, 640), (640, 2), (3, 31), (33, 5)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (2.0, 2.5), (0.3, 0.4)])
def test_extreme_images_get_torchvisions_central_crop(size, ratio):
    scale = (0.9, 1.0)  # such a crop cannot fit: torchvision falls back as well
    reference = torchvision_boxes(size, scale, ratio, 3)
    box = sample_views(size, (3,), scale=scale, ratio=ratio, generator=seeded()).box
    assert torch.equal(box.double(), reference)


@pytest.mark.parametrize(
    ("size", "ratio", "want"),
    [((1, 9), (0.3, 0.4), [4, 0, 5, 1]), ((9, 1), (2.5, 3.0), [0, 4, 1, 5])],
)
def test_the_central_crop_keeps_a_pixel_where_torchvisions_rounds_to_none(size, ratio, want):
    assert not boxes_valid(torchvision_boxes(size, (0.9, 1.0), ratio, 1)).any()
    box = sample_views(size, scale=(0.9, 1.0), ratio=ratio, generator=seeded()).box
    assert box.tolist() == want


def test_a_generator_decides_the_views():
    first, again, other = (sample_views((48, 64), (4,), generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first.box, again.box)
    assert torch.equal(first.flip, again.flip)
    assert not torch.equal(first.box, other.box)


def test_the_global_generator_serves_without_one():
    torch.manual_seed(3)
    first = sample_views((48, 64), (4,))
    torch.manual_seed(3)
    assert torch.equal(first.box, sample_views((48, 64), (4,)).box)


@given(st.data())
def test_sizes_of_single_images_stand_behind_the_batch(data):
    shape = data.draw(st.sampled_from([(), (3,), (2, 2), (0,)]), label="images")
    batch = data.draw(st.sampled_from([(), (2,), (0,)]), label="batch")
    generator = data.draw(generators(), label="generator")
    size = torch.randint(1, 9, (*shape, 2), generator=generator)
    view = sample_views(size, batch, generator=generator)
    assert view.flip.shape == (*batch, *shape)
    assert (view.box[..., 2] <= size[..., 1]).all()
    assert (view.box[..., 3] <= size[..., 0]).all()


def test_one_size_for_all_is_one_size_for_each():
    same = sample_views((48, 64), (5,), generator=seeded())
    each = sample_views(torch.tensor([[48, 64]] * 5), generator=seeded())
    assert torch.equal(same.box, each.box)
    assert torch.equal(same.flip, each.flip)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.5, 0.2)}, r"scale is \(0.5, 0.2\)"),
        ({"scale": (0.0, 1.0)}, r"scale is \(0.0, 1.0\)"),
        ({"ratio": (2.0, 1.0)}, r"ratio is \(2.0, 1.0\)"),
        ({"ratio": (1.0, math.inf)}, r"ratio is \(1.0, inf\)"),
        ({"scale": (math.nan, 1.0)}, r"scale is \(nan, 1.0\)"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"flip": math.nan}, "flip is nan"),
        ({"vertical_flip": -0.5}, "vertical_flip is -0.5"),
    ],
)
@pytest.mark.parametrize("sample", [sample_views, sample_view_pairs])
def test_sampling_refuses_ranges_that_make_no_sense(sample, options, message):
    with pytest.raises(ValueError, match=message):
        sample((8, 8), **options)


@pytest.mark.parametrize("sample", [sample_views, sample_view_pairs, full_view])
@pytest.mark.parametrize("size", [(0, 8), (8, -1)])
def test_an_image_without_pixels_is_refused(sample, size):
    with pytest.raises(ValueError, match="size is"):
        sample(size)


def test_sizes_must_be_whole_numbers():
    with pytest.raises(TypeError, match=r"argument 'size'.*float32"):
        sample_views(torch.tensor([8.0, 8.0]))


# ----------------------------------------------------------------------------- view pairs


@pytest.mark.parametrize(
    ("size", "scale", "share"),
    [
        ((480, 640), 0.2, (0.0035, 0.0045)),
        ((427, 640), 0.2, (0.0105, 0.0115)),
        ((480, 640), 0.08, (0.0285, 0.0295)),
    ],
)
def test_independent_pairs_are_disjoint_as_often_as_measured(size, scale, share):
    count = 100_000
    pairs = sample_view_pairs(size, (count,), scale=(scale, 1.0), generator=seeded())
    empty = (~pairs.valid).double().mean().item()
    # The published shares are rounded to a tenth of a percent; four sigma around that.
    low, high = (math.sqrt(p * (1 - p) / count) for p in share)
    assert share[0] - 4 * low <= empty <= share[1] + 4 * high


def test_without_a_minimum_the_two_views_are_independent():
    pairs = sample_view_pairs((48, 64), (20_000,), generator=seeded())
    one, two = statistics_of(pairs.view1.box), statistics_of(pairs.view2.box)
    for name in one:
        assert stats.ks_2samp(one[name], two[name]).pvalue > 1e-4, name
        assert abs(stats.spearmanr(one[name], two[name]).statistic) < 4 / math.sqrt(20_000), name
    both = (pairs.view1.flip & pairs.view2.flip).double().mean()
    assert abs(both - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 20_000)


@given(st.data())
def test_valid_pairs_overlap_as_much_as_was_asked(data):
    size, batch = data.draw(sizes(), label="size"), data.draw(batches(), label="batch")
    least = data.draw(st.floats(0, 1), label="min_overlap")
    options = data.draw(samplings(), label="options")
    attempts = data.draw(st.integers(1, 4), label="attempts")
    pairs = sample_view_pairs(size, batch, min_overlap=least, attempts=attempts, **options)
    fraction = box_iou(pairs.view1.box, pairs.view2.box)
    assert torch.equal(pairs.valid, (fraction >= least) & (fraction > 0))
    assert pairs.valid.shape == batch


def test_pairs_are_the_first_that_is_enough_or_the_best_of_all():
    size, count, attempts, least = (48, 64), 500, 3, 0.5
    options = {"scale": (0.1, 0.5), "vertical_flip": 0.5}
    pairs = sample_view_pairs(
        size, (count,), min_overlap=least, attempts=attempts, generator=seeded(), **options
    )
    drawn = sample_views(size, (2, attempts, count), generator=seeded(), **options)
    fraction = box_iou(drawn.box[0], drawn.box[1])
    kinds = set()
    for i in range(count):
        tries = fraction[:, i].tolist()
        enough = [a for a in range(attempts) if tries[a] >= least]
        pick = enough[0] if enough else tries.index(max(tries))
        kinds.add((bool(enough), pick))
        assert torch.equal(pairs.view1.box[i], drawn.box[0, pick, i])
        assert torch.equal(pairs.view2.box[i], drawn.box[1, pick, i])
        assert torch.equal(pairs.view1.flip[i], drawn.flip[0, pick, i])
        assert torch.equal(pairs.view2.flip[i], drawn.flip[1, pick, i])
        assert torch.equal(pairs.view1.vertical_flip[i], drawn.vertical_flip[0, pick, i])
        assert torch.equal(pairs.view2.vertical_flip[i], drawn.vertical_flip[1, pick, i])
        assert pairs.valid[i] == bool(enough)
    assert kinds == {(enough, pick) for enough in (True, False) for pick in range(attempts)}


def test_an_overlap_that_cannot_be_reached_ends_and_is_not_valid():
    pairs = sample_view_pairs(
        (480, 640), (64,), min_overlap=1.0, attempts=5, scale=(0.01, 0.02), generator=seeded()
    )
    assert not pairs.valid.any()
    assert boxes_valid(pairs.view1.box).all()
    assert boxes_valid(pairs.view2.box).all()


def test_more_attempts_reach_more():
    reached = [
        sample_view_pairs(
            (48, 64), (2000,), min_overlap=0.5, attempts=attempts, generator=seeded()
        ).valid.sum()
        for attempts in (1, 2, 8)
    ]
    assert reached[0] < reached[1] < reached[2]


@pytest.mark.parametrize("options", [{"min_overlap": 1.5}, {"min_overlap": -0.1}, {"attempts": 0}])
def test_pairs_refuse_what_makes_no_sense(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"views.sample_view_pairs: {name} is {value}; give"):
        sample_view_pairs((8, 8), **options)


def test_pairs_take_one_size_for_each_image():
    size = torch.tensor([[8, 4], [3, 9], [1, 1]])
    pairs = sample_view_pairs(size, (50,), min_overlap=0.3, generator=seeded())
    assert pairs.valid.shape == (50, 3)
    for view in (pairs.view1, pairs.view2):
        assert (view.box[..., 2] <= size[:, 1]).all()
        assert (view.box[..., 3] <= size[:, 0]).all()


def test_full_view_is_the_whole_image():
    view = full_view((3, 5), (2, 0))
    assert view.box.shape == (2, 0, 4)
    image = torch.rand(1, 2, 3, 5)
    assert torch.equal(crop_views(image, full_view((3, 5), (1,)), (3, 5)), image)
    assert full_view((3, 5)).box.tolist() == [0, 0, 5, 3]


def test_a_number_is_a_batch_of_one_axis_and_a_square_map():
    for function in (full_view, sample_views, sample_view_pairs):
        options = {} if function is full_view else {"generator": seeded()}
        got = function((5, 7), 3, **options)
        options = {} if function is full_view else {"generator": seeded()}
        want = function((5, 7), (3,), **options)
        assert all(map(torch.equal, tree_leaves(got), tree_leaves(want)))
    view = full_view((5, 7), 3)
    assert torch.equal(coordinate_map(view, 4), coordinate_map(view, (4, 4)))


@given(batches(), batches(), generators())
def test_each_image_of_its_own_size_has_its_own_full_view(batch, shape, generator):
    images = torch.randint(1, 2**24, (*shape, 2), generator=generator)
    view = full_view(images, batch)
    assert view.flip.shape == (*batch, *shape)
    assert not view.flip.any()
    height, width = images.expand(*batch, *shape, 2).unbind(-1)
    nothing = torch.zeros_like(width)
    assert torch.equal(view.box.long(), torch.stack([nothing, nothing, width, height], -1))
    if not (batch or shape):
        assert torch.equal(view.box, full_view((int(height), int(width))).box)


# -------------------------------------------------------------------------------- cropping


@st.composite
def crops(draw):
    """An image and a whole-pixel box that shares a pixel with it and may reach over its border.

    (With a box that ends left of or above the image torchvision's slices count from the end; with
    a crop one pixel wide torch's antialiasing repeats the first row, seen in torch 2.15.)
    """
    h, w = draw(sizes(high=12))
    image = draw(tensors((2, h, w), 0.0, 1.0))
    left, top = draw(st.integers(-4, w - 1)), draw(st.integers(-4, h - 1))
    width, height = draw(st.integers(max(1, 1 - left), 16)), draw(st.integers(max(1, 1 - top), 16))
    axes = draw(st.sampled_from([(), (-1,), (-2,), (-1, -2)]))
    out = (draw(st.integers(1, 8)), draw(st.integers(2, 8)))
    return image, (top, left, height, width), axes, out


@given(crops())
def test_crops_of_whole_pixels_are_torchvisions(case):
    image, (top, left, height, width), axes, out = case
    want = tv.resized_crop(image, top, left, height, width, list(out), antialias=True).flip(axes)
    box = torch.tensor([left, top, left + width, top + height], dtype=torch.float64)
    got = crop_views(image, View(box, torch.tensor(-1 in axes), torch.tensor(-2 in axes)), out)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@given(st.data())
def test_bicubic_crops_of_whole_pixels_inside_the_image_are_torchvisions(data):
    h, w = data.draw(sizes(2, 12), label="size")  # torch repeats a row of a single pixel
    image = data.draw(tensors((2, h, w), 0.0, 1.0), label="image")
    left, top = data.draw(st.integers(0, w - 2)), data.draw(st.integers(0, h - 2))
    x2, y2 = data.draw(st.integers(left + 2, w)), data.draw(st.integers(top + 2, h))
    box, flip = torch.tensor([left, top, x2, y2], dtype=torch.float64), data.draw(st.booleans())
    out = data.draw(sizes(2, 8), label="out")
    cubic = tv.InterpolationMode.BICUBIC
    want = tv.resized_crop(image, top, left, y2 - top, x2 - left, list(out), cubic, antialias=True)
    want = want.flip(-1) if flip else want
    got = crop_views(image, View(box, torch.tensor(flip)), out, interpolation="bicubic")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@given(st.data())
def test_a_list_of_images_of_any_sizes_is_cropped_one_by_one(data):
    shapes = data.draw(st.lists(sizes(2, 4), min_size=1, max_size=5), label="sizes")
    images = [data.draw(tensors((2, *size)), label="image") for size in shapes]
    drawn = [data.draw(views((), size), label="view") for size in shapes]
    view = View(*map(torch.stack, zip(*drawn, strict=True)))
    alone = [crop_views(*pair, (3, 2)) for pair in zip(images, drawn, strict=True)]
    torch.testing.assert_close(crop_views(images, view, (3, 2)), torch.stack(alone), **CLOSE)


@st.composite
def boxes_anywhere(draw, size):
    """Boxes with whole or fractional corners, inside the image or not, or one pixel wide."""
    h, w = size
    kind = draw(st.sampled_from(["whole", "inside", "across", "pixel", "sliver", "not valid"]))
    if kind == "not valid":
        return draw(degenerate_boxes(()))
    if kind in ("pixel", "sliver"):
        x, y = draw(st.integers(0, w - 1)), draw(st.integers(0, h - 1))
        side = 1 if kind == "pixel" else 1 / 64
        return torch.tensor([x, y, x + side, y + side], dtype=torch.float64)
    frame = image_box(size)
    if kind == "across":
        frame = frame + torch.tensor([-w, -h, w, h])
    whole = kind == "whole" or draw(st.booleans())
    return boxes_within(draw(generators()), frame, whole)


@given(st.data())
def test_all_ways_to_crop_agree(data):
    size, channels = data.draw(sizes(1, 12), label="size"), data.draw(st.integers(0, 3))
    count = data.draw(st.integers(1, 3), label="count")
    out = data.draw(sizes(1, 16), label="out")
    cubic = data.draw(st.booleans(), label="cubic")
    shape = (count, channels, *size)
    images = data.draw(tensors(shape, 0.0, 1.0, dtype=torch.float32), label="images")
    if data.draw(st.booleans(), label="channels last"):
        images = images.contiguous(memory_format=torch.channels_last)
    boxes = [data.draw(boxes_anywhere(size), label="box") for _ in range(count)]
    view = View(torch.stack(boxes).float(), *flips(data.draw(generators()), 2, count))
    crop = partial(crop_views, size=out, interpolation="bicubic" if cubic else "bilinear")

    got = crop(images, view)
    assert got.shape == (count, channels, *out)
    assert got.is_contiguous()
    assert torch.equal(crop(list(images), view), got)
    for image, *one, alone in zip(images, *view, got, strict=True):
        assert torch.equal(crop(image, View(*one)), alone)
    dense = torch.vmap(crop)(images, view)  # products over the whole image
    close = {"rtol": 0, "atol": 3e-5}
    torch.testing.assert_close(got, dense, **close)
    leaves = images.clone().requires_grad_(), view.box.clone().requires_grad_()
    torch.testing.assert_close(crop(leaves[0], view._replace(box=leaves[1])), dense, **close)


def test_all_ways_to_crop_agree_far_from_the_corner():
    images, low = torch.rand(2, 1, 40, 3000, generator=seeded()), torch.tensor([2900.0, 3])
    boxes = torch.stack([torch.cat([low, low + 30]), torch.cat([low + 0.3, low + 30.6])])
    view = View(boxes, torch.tensor([False, True]))
    want = crop_views(images.double(), View(boxes.double(), view.flip), 128).float()
    crop = partial(crop_views, size=128)
    for way in (crop, torch.vmap(crop)):
        torch.testing.assert_close(way(images, view), want, rtol=0, atol=3e-5)


@given(st.data())
def test_crops_of_whole_pixels_are_twice_differentiable(data):
    size = data.draw(sizes(1, 4), label="size")
    box = data.draw(boxes((), size, whole_pixels=True), label="box")
    image = data.draw(tensors((1, *size)), label="image").requires_grad_()
    other = data.draw(tensors((1, 2, 3)), label="weights")

    def score(image):
        return (crop_views(image, View(box, torch.tensor(True)), (2, 3)).square() * other).sum()

    (grad,) = torch.autograd.grad(score(image), image, create_graph=True)
    torch.testing.assert_close(grad.detach(), torch.func.grad(score)(image.detach()))
    assert torch.autograd.grad(grad.sum(), image)[0].isfinite().all()


def test_a_traced_crop_reads_no_box():
    images, view = torch.rand(2, 3, 8, 9, generator=seeded()), sample_views((8, 9), (2,))
    graph = make_fx(lambda images, *view: crop_views(images, View(*view), 4))(images, *view)
    other = sample_views((8, 9), (2,))
    torch.testing.assert_close(graph(images, *other), crop_views(images, other, 4))


WRONG_IMAGES = [
    (torch.full((3, 8, 8), 200, dtype=torch.uint8), "dtype torch.uint8.*Convert integers first"),
    (torch.zeros(1, 8, 8), "the number of channels is 3 in images.0. and 1 in images.1."),
    (torch.zeros(3, 8, 8, dtype=torch.float64), "the dtype is torch.float32 in"),
    (torch.zeros(3, 8, 8, device="meta"), "the device is cpu in images.0. and meta in"),
    (torch.zeros(8, 8), "has shape .8, 8."),
    ("image.png", "argument 'images' should be .* 'image.png' of type str.* was given"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_IMAGES)
def test_every_image_of_a_list_is_checked(wrong, message):
    view = View(torch.tensor([[0.0, 0, 2, 2]] * 2), torch.tensor([False, True]))
    with pytest.raises(TypeError, match=f"densekit.views.crop_views: .*{message}"):
        crop_views([torch.rand(3, 8, 8), wrong], view, 2)


@pytest.mark.parametrize("count", [0, 3])
def test_a_list_of_images_needs_a_view_each(count):
    view = View(torch.tensor([[0.0, 0, 2, 2]] * 2), torch.tensor([False, True]))
    with pytest.raises(TypeError, match=f"there are {count} images and views of shape"):
        crop_views([torch.rand(3, 4, 4)] * count, view, 2)


def test_crops_of_photographic_size_are_torchvisions_in_float32():
    images = torch.rand(4, 3, 120, 90, generator=seeded())
    view = sample_views((120, 90), (4,), generator=seeded())
    got = crop_views(images, view, 56)
    for image, box, flip, crop in zip(images, view.box, view.flip, got, strict=True):
        x1, y1, x2, y2 = (int(x) for x in box)
        want = tv.resized_crop(image, y1, x1, y2 - y1, x2 - x1, [56, 56], antialias=True)
        want = want.flip(-1) if flip else want
        torch.testing.assert_close(crop, want, rtol=0, atol=1e-5)


def loop_crop(line, start, stop, out):
    """The docstring in plain Python: a triangle around each center, over the pixels touched."""
    step = (stop - start) / out
    reach = max(step, 1.0)
    result = []
    for i in range(out):
        center = start + (i + 0.5) * step
        total = value = 0.0
        for k in range(math.floor(start), math.ceil(stop)):
            weight = max(0.0, 1 - abs(k + 0.5 - center) / reach)
            total += weight
            value += weight * (line[k] if 0 <= k < len(line) else 0.0)
        result.append(value / total)
    return result


@given(st.data())
def test_crops_that_end_inside_a_pixel_match_a_loop(data):
    length, out = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8), label="out")
    line = data.draw(tensors((length,)), label="line")
    start = data.draw(st.floats(-3, length + 1), label="start")
    stop = start + data.draw(st.floats(0.25, 8), label="extent")
    want = torch.tensor(loop_crop(line.tolist(), start, stop, out), dtype=torch.float64)
    off = torch.tensor(False)
    across = View(torch.tensor([start, 0, stop, 1], dtype=torch.float64), off)
    down = View(torch.tensor([0, start, 1, stop], dtype=torch.float64), off)
    torch.testing.assert_close(crop_views(line[None, None], across, (1, out))[0, 0], want)
    torch.testing.assert_close(crop_views(line[None, :, None], down, (out, 1))[0, :, 0], want)


@given(st.data())
def test_a_constant_image_stays_constant(data):
    size = data.draw(sizes(), label="size")
    view = data.draw(views(size=size), label="view")
    images = torch.full((*view.flip.shape, 2, *size), 0.7, dtype=torch.float64)
    got = crop_views(images, view, data.draw(sizes(), label="out"))
    torch.testing.assert_close(got, torch.full_like(got, 0.7), **CLOSE)


@given(st.data())
def test_enlarging_an_image_of_its_own_coordinates_gives_the_coordinate_map(data):
    view = data.draw(views(size=(8, 8)), label="view")
    out = data.draw(sizes(8, 12), label="out")  # no side of the box is longer: pure bilinear
    batch = view.flip.shape
    pixels = coordinate_map(View(image_box((8, 8), batch), torch.zeros_like(view.flip)), (8, 8))
    got = crop_views(pixels.movedim(-1, -3), view, out).movedim(-3, -1)
    want = coordinate_map(view, out)
    # A point between the centers of two touched pixels is interpolated; beyond them it is the
    # nearest center.
    corners = view.box[..., None, None, :]
    low, high = corners[..., :2].floor() + 0.5, corners[..., 2:].ceil() - 0.5
    torch.testing.assert_close(got, want.maximum(low).minimum(high), rtol=0, atol=1e-10)


@given(st.data())
def test_shrinking_by_a_whole_factor_keeps_coordinates_away_from_the_edge(data):
    # Triangles a whole number of pixels wide reproduce straight lines exactly.
    factor, out = data.draw(st.integers(1, 3), label="factor"), 5
    side = factor * out
    start = uniform(data.draw(generators(), label="generator"), 2) * 3
    view = View(torch.cat([start, start + side]), data.draw(st.booleans().map(torch.tensor)))
    canvas = full_view((side + 4, side + 4))
    pixels = coordinate_map(View(canvas.box.double(), canvas.flip), (side + 4, side + 4))
    got = crop_views(pixels.movedim(-1, -3), view, out).movedim(-3, -1)
    inner = slice(1, -1)  # the triangle of the outermost output is cut at the crop
    want = coordinate_map(view, (out, out))
    torch.testing.assert_close(got[inner, inner], want[inner, inner], rtol=0, atol=1e-10)


@given(st.data())
def test_cropping_moves_with_the_image(data):
    generator = data.draw(generators(), label="generator")
    image = uniform(generator, 2, 6, 6)
    box = boxes_within(generator, image_box((6, 6)))
    flip = flips(generator, 2)
    right, down = data.draw(st.integers(0, 3), label="right"), data.draw(st.integers(0, 3))
    moved = torch.nn.functional.pad(image, (right, 0, down, 0))
    shift = torch.tensor([right, down, right, down], dtype=torch.float64)
    out = data.draw(sizes(), label="out")
    torch.testing.assert_close(
        crop_views(moved, View(box + shift, *flip), out),
        crop_views(image, View(box, *flip), out),
        rtol=0,
        atol=1e-10,
    )


@given(st.data())
def test_a_flipped_view_is_the_mirrored_crop(data):
    view = data.draw(views(size=(6, 7)), label="view")
    images = data.draw(tensors((*view.flip.shape, 1, 6, 7)), label="images")
    out = data.draw(sizes(), label="out")
    axis = data.draw(AXES, label="axis")
    other = crop_views(images, mirrored(view, axis), out).flip(axis)
    torch.testing.assert_close(crop_views(images, view, out), other, **CLOSE)


@given(st.data())
def test_what_lies_outside_the_crop_never_shows(data):
    view = data.draw(views((), size=(8, 8)), label="view")
    image = data.draw(tensors((1, 8, 8)), label="image")
    x1, y1, x2, y2 = view.box.tolist()
    other = image + 1
    inside = (
        slice(None),
        slice(math.floor(y1), math.ceil(y2)),
        slice(math.floor(x1), math.ceil(x2)),
    )
    other[inside] = image[inside]
    out = data.draw(sizes(), label="out")
    assert torch.equal(crop_views(image, view, out), crop_views(other, view, out))


@given(st.data())
def test_a_degenerate_view_is_black_with_zero_gradients(data):
    box = data.draw(degenerate_boxes(), label="box").requires_grad_()
    batch = box.shape[:-1]
    images = data.draw(tensors((*batch, 1, 3, 4)), label="images").requires_grad_()
    got = crop_views(images, View(box, *flips(seeded(), 2, *batch)), (2, 5))
    assert torch.equal(got, torch.zeros_like(got))
    for grad in torch.autograd.grad(got.sum(), [images, box]):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_a_crop_outside_the_image_is_black():
    view = View(torch.tensor([10.0, 10.0, 12.0, 12.0]), torch.tensor(False))
    assert (crop_views(torch.ones(3, 4, 4), view, 5) == 0).all()


def test_an_image_smaller_than_the_crop_is_enlarged():
    image = torch.rand(3, 1, 1, generator=seeded())
    got = crop_views(image, full_view((1, 1)), (4, 6))
    torch.testing.assert_close(got, image.expand(3, 4, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_crops_of_half_images_are_rounded_crops_of_float_images(dtype):
    images = torch.rand(2, 3, 20, 30, generator=seeded()).to(dtype)
    view = sample_views((20, 30), (2,), generator=seeded())
    got = crop_views(images, view, 9)
    assert torch.equal(got, crop_views(images.float(), view, 9).to(dtype))


def test_cropping_ignores_autocast():
    images, view = torch.rand(2, 3, 20, 30, generator=seeded()), full_view((20, 30), (2,))
    with torch.autocast("cpu", torch.bfloat16):
        got = crop_views(images, view, 9)
    assert torch.equal(got, crop_views(images, view, 9))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_images_of_whole_numbers_are_refused(dtype):
    with pytest.raises(TypeError, match="crop_views: argument 'images' should be Float"):
        crop_views(torch.zeros(1, 3, 4, 4, dtype=dtype), full_view((4, 4), (1,)), 2)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_whose_channels_come_last_are_refused(channels):
    images = torch.zeros(2, 8, 9, channels)
    message = rf"images.*shape .*8, 9, {channels}.*channels seem to come last.*movedim\(-1, -3\)"
    for wrong in (images, list(images)):
        with pytest.raises(TypeError, match=f"densekit.views.crop_views: .*{message}"):
            crop_views(wrong, full_view((8, 9), (2,)), 4)
    right = images.movedim(-1, -3)
    assert crop_views(right, full_view((8, 9), (2,)), 4).shape == (2, channels, 4, 4)


def test_narrow_images_of_up_to_four_channels_are_cropped():
    for channels, width in itertools.product(range(5), range(1, 5)):
        image = torch.rand(channels, 6, width)
        assert torch.equal(crop_views(image, full_view((6, width)), (6, width)), image)


def test_one_view_for_each_image():
    with pytest.raises(TypeError, match=r"crop_views: argument 'view.box'"):
        crop_views(torch.zeros(2, 3, 4, 4), full_view((4, 4), (3,)), 2)


@pytest.mark.parametrize("size", [0, (0, 4), (4, -1)])
def test_a_size_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match=r"densekit.views.crop_views: size is"):
        crop_views(torch.zeros(3, 4, 4), full_view((4, 4)), size)


def test_a_map_without_cells_is_refused():
    with pytest.raises(ValueError, match=r"densekit.views.coordinate_map: size is"):
        coordinate_map(full_view((4, 4)), (0, 3))


@pytest.mark.parametrize(
    ("function", "width", "name"),
    [
        (image_to_view, 2, "points"),
        (view_to_image, 2, "points"),
        (boxes_image_to_view, 4, "boxes"),
        (boxes_view_to_image, 4, "boxes"),
    ],
)
def test_maps_between_frames_refuse_what_does_not_fit(function, width, name):
    view = full_view((4, 4), (2,))
    for bad in (torch.zeros(3, 5, width), torch.zeros(2, width), torch.zeros(2, 5, 3)):
        with pytest.raises(TypeError, match=f"{function.__name__}: argument '{name}'"):
            function(view, bad)


def test_views_of_other_batches_do_not_meet():
    with pytest.raises(TypeError, match=r"intersect_views: argument 'view2.box'"):
        intersect_views(full_view((4, 4), (2,)), full_view((4, 4), (3,)))


# --------------------------------------------------------------------------- boxes in a view


@st.composite
def views_and_boxes(draw):
    """Views, and boxes in, across and beside them."""
    view = draw(views())
    around = image_box((8, 8), (*view.flip.shape, draw(st.integers(0, 4))))
    return view, boxes_within(draw(generators()), around + torch.tensor([-2.0, -2.0, 2.0, 2.0]))


@given(views_and_boxes(), st.floats(0.01, 1))
def test_boxes_in_a_view_are_mapped_and_cut_off_at_its_border(case, min_share):
    view, regions = case
    got = boxes_in_view(view, regions, min_share=min_share)
    mapped = boxes_image_to_view(view, regions)
    want = mapped.clamp(0, 1).where((got.share > 0)[..., None], 0.0)
    torch.testing.assert_close(got.boxes, want, **CLOSE)
    crop = view.box[..., None, :].expand_as(regions)
    torch.testing.assert_close(got.share, box_containment(regions, crop), **CLOSE)
    # The area that is left, in pixels, over the area there was.
    kept = box_area(got.boxes) * box_area(crop) / box_area(regions)
    torch.testing.assert_close(got.share, kept, rtol=0, atol=1e-10)
    clear = (got.share - min_share).abs() > 1e-5
    assert torch.equal(got.valid[clear], (got.share >= min_share)[clear])


@given(st.data())
def test_boxes_inside_the_crop_are_kept_whole(data):
    view = data.draw(views(), label="view")
    crop = view.box[..., None, :].expand(*view.flip.shape, 3, 4)
    for inside in (crop, boxes_within(data.draw(generators()), crop, False)):
        got = boxes_in_view(view, inside)
        assert got.valid.all()
        assert (got.share == 1).all()
        torch.testing.assert_close(got.boxes, boxes_image_to_view(view, inside), **CLOSE)


@given(disjoint_views(), st.sampled_from([1e-9, 1e-6, 0.5, 1.0]))
def test_boxes_outside_the_crop_are_not_valid(pair, min_share):
    got = boxes_in_view(pair[0], pair[1].box[..., None, :], min_share=min_share)
    assert (got.share == 0).all()
    assert not got.valid.any()
    assert not boxes_valid(got.boxes).any()


@given(views_and_boxes(), st.floats(0.01, 1), AXES)
def test_a_flipped_view_shows_the_boxes_mirrored(case, min_share, axis):
    view, regions = case
    got = boxes_in_view(view, regions, min_share=min_share)
    other = boxes_in_view(mirrored(view, axis), regions, min_share=min_share)
    want = mirrored_boxes(other.boxes, axis).where((got.share > 0)[..., None], 0.0)
    torch.testing.assert_close(got.boxes, want, **CLOSE)
    assert torch.equal(got.share, other.share)
    assert torch.equal(got.valid, other.valid)


@given(st.data(), st.sampled_from([1e-9, 0.5, 1.0]))
def test_boxes_and_views_that_enclose_nothing_show_nothing(data, min_share):
    view, regions = data.draw(views_and_boxes(), label="case")
    asked = data.draw(valid_rows(regions.shape[:-1]), label="valid")
    got = boxes_in_view(view, regions, asked, min_share=min_share)
    assert not got.valid[~asked].any()
    everything = boxes_in_view(view, regions, min_share=min_share)
    assert torch.equal(got.valid, everything.valid & asked)
    bad = boxes_in_view(view, data.draw(degenerate_boxes(regions.shape[:-1])), min_share=min_share)
    assert not bad.valid.any()
    assert (bad.boxes == 0).all()
    nowhere = view._replace(box=data.draw(degenerate_boxes(view.flip.shape), label="view"))
    assert not boxes_in_view(nowhere, regions, min_share=min_share).valid.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_takes_no_box_that_fills_its_view(dtype):
    low = uniform(seeded(), 500, 2, high=100, dtype=dtype)
    crop = torch.cat([low, uniform(seeded(1), 500, 2, low=400, high=500, dtype=dtype)], -1)
    # Carried to another scale and back, some reach out of the crop by the last digit.
    regions = (crop / 3 * 3)[:, None]
    assert (box_containment(regions[:, 0], crop) < 1).any()
    got = boxes_in_view(View(crop, flips(seeded(), 500)), regions)
    assert got.valid.all()
    torch.testing.assert_close(got.boxes, UNIT.to(dtype).expand(500, 1, 4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("min_share", [0.0, -0.5, 1.1, math.nan])
def test_a_share_outside_its_range_is_refused(min_share):
    with pytest.raises(ValueError, match=f"densekit.views.boxes_in_view: min_share is {min_share}"):
        boxes_in_view(full_view((4, 4)), torch.zeros(2, 4), min_share=min_share)


def test_boxes_of_other_batches_are_not_in_view():
    with pytest.raises(TypeError, match="boxes_in_view: argument 'boxes'"):
        boxes_in_view(full_view((4, 4), (2,)), torch.zeros(3, 5, 4))
    with pytest.raises(TypeError, match="boxes_in_view: argument 'valid'"):
        boxes_in_view(full_view((4, 4)), torch.zeros(5, 4), torch.ones(4).bool())


# -------------------------------------------------------------------------- units of the crops


@given(st.data())
def test_crops_given_as_a_corner_and_a_size_are_the_same_crops(data):
    view = data.draw(views(), label="view")
    corner, far = view.box[..., :2], view.box[..., 2:]
    got = view_from_xywh(torch.cat([corner, far - corner], -1), *view[1:])
    torch.testing.assert_close(got, view, **CLOSE)
    bad = data.draw(degenerate_boxes(), label="not valid")
    extent = bad[..., 2:] - bad[..., :2]
    assert not boxes_valid(view_from_xywh(torch.cat([bad[..., :2], extent], -1)).box).any()


@given(st.data())
def test_crops_in_units_of_the_image_are_its_crops(data):
    batch = data.draw(batches(), label="batch")
    shape = data.draw(st.sampled_from([batch[k:] for k in range(len(batch) + 1)]), label="sizes")
    size = torch.randint(1, 9, (*shape, 2), generator=data.draw(generators()))
    whole = full_view(size.expand(*batch, 2))
    shares = data.draw(boxes(batch, size=(1, 1), whole_pixels=False), label="boxes")
    got = view_from_relative(shares, size, whole.flip, ~whole.flip)
    want = boxes_view_to_image(View(whole.box.double(), whole.flip), shares[..., None, :])
    torch.testing.assert_close(got.box, want[..., 0, :], **CLOSE)
    assert torch.equal(got.vertical_flip, ~whole.flip)
    if not shape:
        same = view_from_relative(shares, tuple(size.tolist()))
        assert torch.equal(same.box, got.box)
        assert not torch.stack(same[1:]).any()


def crops_of(box, size):
    """The docstring of `views_valid` in plain Python."""
    (x1, y1, x2, y2), (h, w) = box, size
    if not all(map(math.isfinite, box)):
        return False
    inside = x1 >= -0.01 and y1 >= -0.01 and x2 <= w + 0.01 and y2 <= h + 0.01
    large = x2 - x1 >= 0.99 and y2 - y1 >= 0.99
    relative = all(0 <= side <= 1 for side in box) and min(size) > 16
    return inside and large and not relative


@given(st.data())
def test_a_view_is_valid_where_it_crops_its_image(data):
    size = torch.randint(1, 7, (20, 2), generator=data.draw(generators(), label="sizes"))
    size = size * data.draw(st.sampled_from([1, 9]), label="scale")
    kinds = [
        sample_views(size, generator=data.draw(generators())).box.double(),
        data.draw(boxes((20,), whole_pixels=False), label="anywhere"),
        data.draw(boxes((20,), whole_pixels=True), label="whole pixels"),
        data.draw(boxes((20,), size=(1, 1)), label="relative"),
        data.draw(degenerate_boxes((20,)), label="degenerate"),
        full_view(size).box.double() + data.draw(tensors((20, 4), -0.02, 0.02), label="rounded"),
    ]
    box = torch.stack(kinds)
    view = View(box, flips(seeded(), 6, 20))
    want = [
        [crops_of(*pair) for pair in zip(row, size.tolist(), strict=True)] for row in box.tolist()
    ]
    assert views_valid(view, size).tolist() == want
    one = tuple(size[0].tolist())
    assert views_valid(index_views(view, (..., 0)), one).tolist() == [row[0] for row in want]
    assert views_valid(full_view(size), size).all()

    if not torch.tensor(want).all():
        line = [all(row) for row in want].index(False)
        first = want[line].index(False)
        with pytest.raises(
            ValueError, match=rf"check_views: the view at \[{line}, {first}\] has the"
        ):
            check_views(view, size)
    good = view.box[torch.tensor(want)]
    check_views(View(good, good[:, 0] > 0), size.expand(6, 20, 2)[torch.tensor(want)])


CROPS = sample_views((480, 640), (50,), generator=seeded()).box
CONFUSED = {
    "view_from_relative": (CROPS / torch.tensor([640.0, 480, 640, 480]), (480, 640)),
    "view_from_xywh": (torch.cat([CROPS[:, :2], CROPS[:, 2:] - CROPS[:, :2]], -1), (480, 640)),
    r"fit the size \(w, h\), so give sizes as \(h, w\)": (CROPS, (640, 480)),
    "reversed or empty": (CROPS[:, [2, 1, 0, 3]], (480, 640)),
    "reaches outside the image": (CROPS, (224, 224)),
    "finite numbers": (CROPS.where(CROPS > 0, torch.nan), (480, 640)),
    "smaller than a pixel": (CROPS / 500, (480, 640)),
}


@pytest.mark.parametrize("sentence", CONFUSED)
def test_the_error_of_a_wrong_view_says_what_it_may_be(sentence):
    wrong, size = CONFUSED[sentence]
    with pytest.raises(ValueError, match=f"densekit.views.check_views: the view at .*{sentence}"):
        check_views(View(wrong, wrong[:, 0] > 0), size)
    check_views(View(CROPS, CROPS[:, 0] > 0), (480, 640))


def test_the_whole_image_in_unit_coordinates_is_no_crop():
    view = View(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor(False))
    assert not views_valid(view, (480, 640))
    for small in ((1, 1), (16, 200), (3, 2)):
        assert views_valid(view, small)  # a crop of one pixel
    with pytest.raises(ValueError, match=r"check_views: the view has .*view_from_relative"):
        check_views(view, (480, 640))


@pytest.mark.parametrize("function", [views_valid, check_views])
def test_sizes_that_do_not_fit_the_views_are_refused(function):
    view = full_view((4, 4), (2, 3))
    with pytest.raises(
        TypeError, match=rf"{function.__name__}: argument 'size' .*\(2, 2\).*\(2, 3\)"
    ):
        function(view, torch.tensor([[4, 4], [4, 4]]))
    with pytest.raises(ValueError, match=rf"{function.__name__}: size is \(0, 4\)"):
        function(view, (0, 4))


def test_a_compiled_graph_checks_no_values():
    def step(view):
        check_views(view, (4, 4))
        return view.box + 1

    view = full_view((4, 4), (2,))
    got = torch.compile(step, fullgraph=True, backend="eager")(view)
    assert torch.equal(got, view.box + 1)


# ---------------------------------------------------------------------------- views in hand


@given(views(), st.integers(1, 4))
def test_stacked_views_come_apart_again(view, count):
    others = [view._replace(box=view.box + k, flip=view.flip ^ bool(k % 2)) for k in range(count)]
    both = stack_views(others)
    assert both.flip.shape == (count, *view.flip.shape)
    for k, (one, other) in enumerate(zip(unstack_views(both), others, strict=True)):
        for part in (one, index_views(both, k)):
            assert type(part) is View
            assert all(map(torch.equal, part, other))
    assert all(map(torch.equal, stack_views(unstack_views(both)), both))


INDICES = [
    *(0, -1, slice(1, None), slice(None), (1, 2), (slice(None), 0), (..., 1), (None, 0)),
    *(torch.tensor([2, 0, 0]), torch.tensor([True, False, True]), [0, 2], torch.tensor(1)),
    *((torch.tensor([0, 2]), torch.tensor([1, 1])), torch.ones(3, 4, dtype=torch.bool)),
]


@pytest.mark.parametrize("index", INDICES)
def test_an_index_takes_the_same_views_of_each_field(index):
    view = View(uniform(seeded(), 3, 4, 4), *flips(seeded(1), 2, 3, 4))
    got = index_views(view, index)
    assert torch.equal(got.flip, view.flip[index])
    assert torch.equal(got.vertical_flip, view.vertical_flip[index])
    for k in range(4):
        assert torch.equal(got.box[..., k], view.box[..., k][index])


def test_an_index_never_reaches_into_the_boxes():
    for index in ((0, 0), 2, (slice(None), 0)):
        with pytest.raises(IndexError):
            index_views(full_view((4, 4), (2,)), index)


def test_single_views_and_views_of_other_shapes_are_refused():
    view = full_view((4, 4))
    with pytest.raises(TypeError, match=r"unstack_views: argument 'view' is a single view"):
        unstack_views(view)
    with pytest.raises(TypeError, match=r"pair_views: argument 'views' is a single view"):
        pair_views(view)
    with pytest.raises(ValueError, match=r"stack_views: there are no views"):
        stack_views([])
    with pytest.raises(TypeError, match=r"stack_views: argument 'views'"):
        stack_views([view, full_view((4, 4), (2,))])
    with pytest.raises(TypeError, match=r"stack_views: argument 'views'"):
        stack_views(full_view((4, 4), (2,)))  # a record, which is a tuple of its fields


def test_views_move_to_a_device_whole():
    moved = views_to(full_view((4, 4), (2,)), "meta")
    assert [x.device.type for x in moved] == ["meta"] * 3


@given(st.data())
def test_views_are_paired_as_by_two_loops(data):
    count = data.draw(st.integers(1, 4), label="count")
    batch = data.draw(st.sampled_from([(), (3,), (0,)]), label="batch")
    several = data.draw(views((count, *batch), size=(8, 8)), label="views")
    anchors = data.draw(st.sampled_from([None, *range(1, count + 1)]), label="anchors")
    least = data.draw(st.sampled_from([0.0, 0.1, 0.5]), label="min_overlap")
    pairs = pair_views(several, anchors, min_overlap=least)

    found = 0
    single = unstack_views(several)
    for i in range(count if anchors is None else anchors):
        for j in range(i + 1 if anchors is None else 0, count):
            if i == j:
                continue
            assert (pairs.index1[found], pairs.index2[found]) == (i, j)
            for view, want in ((pairs.view1, single[i]), (pairs.view2, single[j])):
                assert all(map(torch.equal, index_views(view, found), want))
            overlap = intersect_views(single[i], single[j])
            assert torch.equal(pairs.valid[found], overlap.valid & (overlap.iou >= least))
            found += 1
    assert pairs.valid.shape == (found, *batch)
    assert pairs.index1.shape == pairs.index2.shape == (found,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": 0}, "anchors is 0 and there are 3 views"),
        ({"anchors": 4}, "anchors is 4 and there are 3 views"),
        ({"min_overlap": 1.5}, "min_overlap is 1.5"),
    ],
)
def test_pairs_of_views_that_there_are_not_are_refused(options, message):
    with pytest.raises(ValueError, match=f"densekit.views.pair_views: {message}"):
        pair_views(full_view((4, 4), (3, 2)), **options)


# --------------------------------------------------------------------------------- matrices

CENTERS = st.sampled_from(["integer", "half"])


def apply(matrix, points):
    """Points `(*batch, n, 2)` moved by matrices `(*batch, 3, 3)`."""
    moved = torch.nn.functional.pad(points, (0, 1), value=1.0) @ matrix.mT
    return moved[..., :2] / moved[..., 2:]


@given(views(), sizes(), CENTERS, st.floats(0.1, 10), st.booleans())
def test_a_view_returns_from_its_matrix_whatever_the_factor(view, size, centers, factor, negative):
    matrix = view_to_matrix(view, size, pixel_centers=centers)
    factor = -factor if negative else factor
    got = view_from_matrix(factor * matrix, size, pixel_centers=centers)
    assert got.valid.all()
    torch.testing.assert_close(got.view, view, **CLOSE)


@given(views(), sizes(), CENTERS)
def test_the_matrix_takes_the_coordinate_map_to_the_centers_of_the_pixels(view, size, centers):
    matrix = view_to_matrix(view, size, pixel_centers=centers)
    center = 0.0 if centers == "integer" else 0.5  # of the first pixel
    points = coordinate_map(view, size).flatten(-3, -2) - 0.5 + center
    i, j = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    want = (torch.stack([j, i], -1) + center).flatten(0, 1).double()
    got = apply(matrix, points)
    torch.testing.assert_close(got, want.expand_as(got), rtol=0, atol=1e-11)


@given(views(), sizes(), CENTERS)
def test_the_matrix_is_the_map_of_points_times_the_size(view, size, centers):
    matrix = view_to_matrix(view, size, pixel_centers=centers)
    shift = 0.5 if centers == "integer" else 0.0
    points = coordinate_map(view, (3, 2)).flatten(-3, -2) + 1.0
    want = image_to_view(view, points) * torch.tensor(size[::-1]) - shift
    torch.testing.assert_close(apply(matrix, points - shift), want, rtol=0, atol=1e-11)


def ramp(size):
    """An image of the coordinates of its own pixels' centers, `(h, w, 2)`."""
    whole = full_view(size)
    return coordinate_map(whole._replace(box=whole.box.double()), size)


def warped_by_scipy(image, inverse, out):
    turned = inverse[[1, 0]][:, [1, 0, 2]].numpy()  # of (row, column)
    planes = [
        ndimage.affine_transform(plane, turned, output_shape=out, order=1, mode="nearest")
        for plane in image.unbind(-1)
    ]
    return torch.from_numpy(np.stack(planes, -1))


def warped_by_skimage(image, inverse, out):
    planes = [
        skimage.transform.warp(plane.numpy(), inverse.numpy(), output_shape=out, mode="edge")
        for plane in image.unbind(-1)
    ]
    return torch.from_numpy(np.stack(planes, -1))


def warped_by_opencv(image, inverse, out):
    planes = [
        cv2.warpPerspective(
            plane.float().numpy(),
            inverse.inverse().numpy(),
            out[::-1],
            borderMode=cv2.BORDER_REPLICATE,
        )
        for plane in image.unbind(-1)
    ]
    return torch.from_numpy(np.stack(planes, -1))


def warped_by_pil(image, inverse, out):
    data = inverse[:2].flatten().tolist()
    planes = [
        Image.fromarray(plane.float().numpy()).transform(
            out[::-1], Image.Transform.AFFINE, data, Image.Resampling.BILINEAR
        )
        for plane in image.unbind(-1)
    ]
    return torch.from_numpy(np.stack(list(map(np.asarray, planes)), -1))


@pytest.mark.parametrize(
    ("warp", "centers", "close"),
    [
        (warped_by_scipy, "integer", 1e-9),
        (warped_by_skimage, "integer", 1e-9),
        (warped_by_opencv, "integer", 0.05),  # it rounds places to 1/32 of a pixel
        (warped_by_pil, "half", 1e-3),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_other_libraries_warp_by_the_matrix_to_the_coordinate_map(warp, centers, close, seed):
    size, out = (40, 56), (24, 20)
    generator = seeded(seed)
    box = boxes_within(generator, torch.tensor([2.0, 2, 54, 38], dtype=torch.float64))
    view = View(box, *flips(generator, 2))
    matrix = view_to_matrix(view, out, pixel_centers=centers)
    got = warp(ramp(size), torch.linalg.inv(matrix), out).double()
    torch.testing.assert_close(got, coordinate_map(view, out), rtol=0, atol=close)


@st.composite
def turned_matrices(draw, view, size):
    """Matrices of views with a rotation, a shear, a perspective or a number that makes no sense."""
    matrix = view_to_matrix(view, size, pixel_centers="half")
    batch = view.flip.shape
    angle = uniform(draw(generators()), *batch, low=0.1, high=3.0)
    unit = torch.eye(3, dtype=torch.float64).expand(*batch, 3, 3).clone()
    kind = draw(st.sampled_from(["rotation", "shear x", "shear y", "perspective", *NO_NUMBERS]))
    if kind == "rotation":
        unit[..., 0, 0], unit[..., 1, 1] = angle.cos(), angle.cos()
        unit[..., 0, 1], unit[..., 1, 0] = -angle.sin(), angle.sin()
    elif kind == "perspective":
        unit[..., 2, draw(st.integers(0, 1))] = angle / 10
    elif kind.startswith("shear"):
        unit[..., *((0, 1) if kind == "shear x" else (1, 0))] = angle / 10
    bad = unit @ matrix
    if kind in NO_NUMBERS:
        place = draw(st.integers(0, 1)), draw(st.integers(0, 2))
        bad = bad.clone()
        bad[..., *place] = NO_NUMBERS[kind]
        bad = torch.zeros_like(bad) if kind == "zeros" else bad
    return bad


NO_NUMBERS = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "zeros": 0.0}


@given(st.data(), CENTERS)
def test_what_a_view_cannot_hold_is_not_valid_and_has_no_gradient(data, centers):
    view = data.draw(views(), label="view")
    size = data.draw(sizes(), label="size")
    bad = data.draw(turned_matrices(view, size), label="matrix").requires_grad_()
    got = view_from_matrix(bad, size, pixel_centers=centers)
    assert not got.valid.any()
    assert (got.view.box == 0).all()
    assert not torch.stack(got.view[1:]).any()
    assert (torch.autograd.grad(got.view.box.sum(), bad)[0] == 0).all()


def test_half_a_turn_is_both_flips_and_a_quarter_is_none():
    # Rotations of an image of 4 x 6 pixels about its center, in whole pixels.
    half = torch.tensor([[-1.0, 0.0, 5.0], [0.0, -1.0, 3.0], [0.0, 0.0, 1.0]])
    got = view_from_matrix(half, (4, 6), pixel_centers="integer")
    assert got.valid
    assert got.view.box.tolist() == [0, 0, 6, 4]
    assert got.view.flip
    assert got.view.vertical_flip
    image = torch.rand(3, 4, 6, generator=seeded())
    assert torch.equal(crop_views(image, got.view, (4, 6)), image.rot90(2, (-2, -1)))
    quarter = torch.tensor([[0.0, -1.0, 3.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert not view_from_matrix(quarter, (6, 4), pixel_centers="integer").valid


@given(degenerate_boxes(), CENTERS)
def test_a_view_that_is_not_valid_has_a_matrix_that_is_not(box, centers):
    box.requires_grad_()
    matrix = view_to_matrix(
        View(box, *flips(seeded(), 2, *box.shape[:-1])), 3, pixel_centers=centers
    )
    assert (matrix == 0).all()
    assert (torch.autograd.grad(matrix.sum(), box)[0] == 0).all()
    assert not view_from_matrix(matrix.detach(), 3, pixel_centers=centers).valid.any()


def test_matrices_refuse_what_makes_no_sense():
    view = full_view((4, 4))
    with pytest.raises(ValueError, match=r"view_to_matrix: size is 0"):
        view_to_matrix(view, 0, pixel_centers="half")
    with pytest.raises(ValueError, match=r"view_from_matrix: size is \(0, 4\)"):
        view_from_matrix(torch.eye(3), (0, 4), pixel_centers="half")
    with pytest.raises(TypeError, match=r"view_from_matrix: argument 'matrix'.*\(2, 3\)"):
        view_from_matrix(torch.eye(3)[:2], 4, pixel_centers="half")
    with pytest.raises(TypeError, match=r"view_from_matrix: argument 'pixel_centers'.*'corner'"):
        view_from_matrix(torch.eye(3), 4, pixel_centers="corner")
