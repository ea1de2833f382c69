"""Boxes against torchvision, and what makes no sense reported as not valid."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from strategies import (
    batches,
    boxes,
    boxes_around,
    boxes_within,
    degenerate_boxes,
    disjoint_views,
    generators,
    image_box,
    overlapping_views,
    sizes,
    valid_rows,
)
from torchvision import ops
from densekit import (
    box_area,
    box_containment,
    box_iou,
    boxes_valid,
    clip_boxes,
    intersect_boxes,
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
    around = data.draw(boxes_around(data.draw(batches())), label="boxes")
    got = clip_boxes(around, size)
    want = ops.clip_boxes_to_image(around.reshape(-1, 4), size)
    assert torch.equal(got.reshape(-1, 4), want)
    assert torch.equal(clip_boxes(got, size), got)


@given(st.data(), sizes())
def test_clipping_keeps_what_the_image_contains(data, size):
    around = data.draw(boxes_around(data.draw(batches())), label="boxes")
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
