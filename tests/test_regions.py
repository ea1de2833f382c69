"""Region augmentations against slow loops over one image, and the laws their docstrings promise."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from strategies import (
    batches,
    boxes,
    boxes_within,
    degenerate_boxes,
    flips,
    generators,
    image_box,
    sizes,
    tensors,
    uniform,
    valid_rows,
)
import densekit.regions
from densekit import (
    Cutout,
    box_area,
    boxes_to_mask,
    boxes_valid,
    composite,
    fill_mask,
    proposal_cutout,
    sample_cutout,
    sample_inner_boxes,
    sample_jittered_boxes,
    sample_shift,
    sample_surrounding_boxes,
    shift_boxes,
)

CLOSE = {"rtol": 0, "atol": 1e-9}
HALVES = [torch.float16, torch.bfloat16]
LOWER = [*HALVES, torch.float32]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def proposals(draw, batch, size, n=None, whole_pixels=None):
    """Boxes in and around an image: some hold others, are the same, the same turned or moved."""
    n = draw(st.integers(0, 5)) if n is None else n
    whole_pixels = draw(st.booleans()) if whole_pixels is None else whole_pixels
    generator = draw(generators())
    around = image_box(size) + torch.tensor([-1.0, -1.0, 1.0, 1.0])
    own = boxes_within(generator, around.expand(*batch, n, 4), whole_pixels)
    first = boxes_within(generator, around.expand(*batch, 1, 4), whole_pixels).expand_as(own)
    inside = boxes_within(generator, first, whole_pixels)
    extent = first[..., 2:] - first[..., :2]
    turned = torch.cat([first[..., :2], first[..., :2] + extent.flip(-1)], -1)
    kinds = torch.stack([own, own, inside, inside, first, turned, first + 1.0], -2)
    kind = torch.randint(7, own.shape[:-1], generator=generator)
    return kinds.gather(-2, kind[..., None, None].expand(*kind.shape, 1, 4))[..., 0, :]


@st.composite
def cutouts(draw, batch=None, n=None):
    """What `proposal_cutout` takes: small and large rho, cuts at the sides and in between."""
    batch = draw(batches()) if batch is None else batch
    size = draw(sizes(5))
    regions = draw(proposals(batch, size, n))
    generator = draw(generators())
    draws = uniform(generator, *regions.shape[:-1], 3)
    rho, place = draws[..., :1].square(), draws[..., 1:]
    place = torch.where(flips(generator, *place.shape), place, place.round())
    rho = torch.where(uniform(generator, *rho.shape) < 0.1, 0.0, rho)
    return regions, torch.cat([rho, place], -1), size, draw(valid_rows(regions.shape[:-1]))


def large_to_small(regions, draws):
    """The order of one image's turns; ties from left to right, then top to bottom, then draws."""

    def rank(k):
        (x1, y1, x2, y2), (rho, x, y) = regions[k].tolist(), draws[k].tolist()
        return -(x2 - x1) * (y2 - y1), x1, y1, x2, y2, y, x, rho

    return sorted(range(len(regions)), key=rank)


def overlap(box, size):
    """Area that each pixel shares with a box, and the area of the box."""
    x1, y1, x2, y2 = (float(x) for x in box)
    y, x = (np.arange(length) for length in size)
    wide = np.clip(np.minimum(x2, x + 1) - np.maximum(x1, x), 0, None)
    tall = np.clip(np.minimum(y2, y + 1) - np.maximum(y1, y), 0, None)
    shared = tall[:, None] * wide
    return shared, (x2 - x1) * (y2 - y1)


def slow_cutout(regions, draws, size, valid):
    """The docstring, word by word, for one image."""
    mask, cuts = np.zeros(size, dtype=bool), np.zeros((len(regions), 4))
    for k in large_to_small(regions, draws):
        if not valid[k]:
            continue
        (x1, y1, x2, y2), (rho, x, y) = regions[k].tolist(), draws[k].tolist()
        shared, area = overlap(regions[k], size)
        lost = shared[mask].sum() / area
        if lost > rho:
            mask[shared > 0] = False
            lost = 0.0
        side = math.sqrt(max(rho - lost, 0))
        wide, tall = side * (x2 - x1), side * (y2 - y1)
        if side == 0:
            continue
        left, top = x1 + x * (x2 - x1 - wide), y1 + y * (y2 - y1 - tall)
        cuts[k] = left, top, left + wide, top + tall
        for i, j in product(*map(range, size)):
            across = cuts[k][0] <= j and j + 1 <= cuts[k][2]
            mask[i, j] |= across and cuts[k][1] <= i and i + 1 <= cuts[k][3]
    return Cutout(torch.from_numpy(mask), torch.from_numpy(cuts))


def images_of(*arguments):
    """The single images of a batch, whatever its leading axes."""
    batch = arguments[0].shape[:-2]
    return [tuple(x[index] for x in arguments) for index in np.ndindex(batch)]


# ---------------------------------------------------------------------------------- cutout


@given(cutouts((2, 3)))
def test_a_cutout_is_the_docstring_word_by_word(case):
    regions, draws, size, valid = case
    got = proposal_cutout(regions, draws, size, valid)
    assert got.mask.shape == (*regions.shape[:-2], *size)
    assert got.boxes.shape == regions.shape
    for *one, mask, cuts in images_of(regions, draws, valid, got.mask, got.boxes):
        want = slow_cutout(*one[:2], size, one[2])
        assert torch.equal(mask, want.mask)
        torch.testing.assert_close(cuts, want.boxes, **CLOSE)


@given(cutouts((6,), 5))
def test_when_its_turn_is_done_a_proposal_has_lost_at_most_rho(case):
    size = case[2]
    for regions, draws, valid in images_of(*case[:2], case[3]):
        final = proposal_cutout(regions, draws, size, valid)
        turns = [k for k in large_to_small(regions, draws) if valid[k]]
        for turn, k in enumerate(turns):
            so_far = torch.zeros_like(valid)
            so_far[turns[: turn + 1]] = True
            then = proposal_cutout(regions, draws, size, so_far)
            shared, area = overlap(regions[k], size)
            assert shared[then.mask.numpy()].sum() / area <= draws[k, 0] + 1e-9
            assert torch.equal(then.boxes[so_far], final.boxes[so_far])
            # What goes afterwards goes to smaller proposals: it lies in what those cut.
            smaller = np.zeros(size, dtype=bool)
            for other in turns[turn + 1 :]:
                smaller |= overlap(final.boxes[other], size)[0] > 1 - 1e-9
            assert not ((final.mask & ~then.mask).numpy() & (shared > 0) & ~smaller).any()


@given(cutouts())
def test_every_cut_lies_inside_its_proposal_and_keeps_its_aspect_ratio(case):
    regions, draws, size, valid = case
    cuts = proposal_cutout(regions, draws, size, valid).boxes
    cut = boxes_valid(cuts)
    assert (cuts[~cut] == 0).all()
    assert not (cut & ~valid).any()
    inside, around = cuts[cut], regions[cut]
    assert (inside[:, :2] >= around[:, :2] - 1e-9).all()
    assert (inside[:, 2:] <= around[:, 2:] + 1e-9).all()
    small, large = (x[:, 2:] - x[:, :2] for x in (inside, around))
    torch.testing.assert_close(small[:, 0] * large[:, 1], small[:, 1] * large[:, 0], **CLOSE)
    assert (box_area(inside) <= draws[cut][:, 0] * box_area(around) + 1e-9).all()


@given(cutouts())
def test_only_pixels_that_lie_whole_in_a_cut_are_cut(case):
    got = proposal_cutout(*case)
    for mask, cuts in images_of(got.mask, got.boxes):
        whole = [overlap(cut, case[2])[0] > 1 - 1e-9 for cut in cuts]
        assert not (mask.numpy() & ~np.any([np.zeros(case[2], dtype=bool), *whole], 0)).any()


@given(cutouts((2,), 5), generators())
def test_permuted_proposals_give_permuted_cuts(case, generator):
    regions, draws, size, valid = case
    order = torch.randperm(5, generator=generator)
    want = proposal_cutout(regions, draws, size, valid)
    got = proposal_cutout(regions[:, order], draws[:, order], size, valid[:, order])
    assert torch.equal(got.mask, want.mask)
    assert torch.equal(got.boxes, want.boxes[:, order])


@given(st.data(), sizes(4), generators())
def test_the_order_of_proposals_of_the_same_draw_does_not_matter(data, size, generator):
    regions = data.draw(proposals((), size, 5, whole_pixels=True), label="proposals")
    draws = uniform(generator, 3).expand(5, 3)
    shuffled = regions[torch.randperm(5, generator=generator)]
    want, got = (proposal_cutout(x, draws, size) for x in (regions, shuffled))
    assert torch.equal(got.mask, want.mask)
    # Proposals that are alike in everything may exchange their cuts.
    rows = (torch.cat(pair, -1).tolist() for pair in ((shuffled, got.boxes), (regions, want.boxes)))
    assert sorted(next(rows)) == sorted(next(rows))


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
def test_a_proposal_and_the_same_one_turned_are_cut_in_one_order(rho, place):
    pair = torch.tensor([[0.0, 0.0, 4.0, 8.0], [0.0, 0.0, 8.0, 4.0]])
    draws = torch.tensor([rho, place, place]).expand(2, 3)
    want, got = (proposal_cutout(x, draws, (8, 8)) for x in (pair, pair.flip(0)))
    assert torch.equal(got.mask, want.mask)
    assert torch.equal(got.boxes, want.boxes.flip(0))


@given(cutouts(), st.data())
def test_proposals_that_are_not_used_change_nothing(case, data):
    regions, draws, size, valid = case
    bad = data.draw(degenerate_boxes(valid.shape), label="bad")
    nan = torch.full_like(draws, torch.nan)
    want = proposal_cutout(regions, draws, size, valid)
    away = valid[..., None]
    spoiled = torch.where(away, regions, bad)
    cases = [(spoiled, None), (spoiled, valid), (spoiled, torch.ones_like(valid)), (regions, None)]
    for used_boxes, asked in cases:  # of the last one the draws alone are NaN
        got = proposal_cutout(used_boxes, torch.where(away, draws, nan), size, asked)
        assert torch.equal(got.mask, want.mask)
        assert torch.equal(got.boxes, want.boxes)
    assert (want.boxes[~valid] == 0).all()


@given(cutouts((2,), 4), st.integers(1, 9), generators())
def test_rows_that_are_not_used_may_be_added_anywhere(case, more, generator):
    regions, draws, size, valid = case
    images, order = torch.arange(2)[:, None], torch.rand(2, 4 + more, generator=generator).argsort()
    unused = uniform(generator, 2, more, 4, high=9.0)
    longer = (torch.cat([regions, unused], 1), torch.cat([draws, unused[..., :3]], 1))
    used = torch.cat([valid, torch.zeros(2, more, dtype=torch.bool)], 1)
    got = proposal_cutout(*(x[images, order] for x in longer), size, used[images, order])
    want = proposal_cutout(*case)
    assert torch.equal(got.mask, want.mask)
    assert torch.equal(got.boxes[images, order.argsort()][:, :4], want.boxes)
    assert (got.boxes[~used[images, order]] == 0).all()


def test_rows_that_are_not_used_take_no_turn(monkeypatch):
    """Counted in turns, since a time is no test."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return outer(*arguments)

    outer = densekit.regions._outer  # each turn calls it once
    monkeypatch.setattr(densekit.regions, "_outer", counted)
    regions = boxes_within(seeded(), image_box((224, 224), (2, 400)))
    valid = torch.arange(400) % torch.tensor([[100], [200]]) == 0  # 4 and 2 of 400
    proposal_cutout(regions, sample_cutout(regions), (224, 224), valid)
    assert len(calls) == 4


@given(st.data(), sizes(5), st.integers(1, 5), generators())
def test_a_margin_of_the_image_changes_nothing(data, size, n, generator):
    """Of many proposals the state is kept by pixel, of few by the cells between their edges."""
    frame = image_box(size, (2, n))
    regions = boxes_within(generator, frame, whole_pixels=data.draw(st.booleans(), label="whole"))
    draws, valid = uniform(generator, 2, n, 3), data.draw(valid_rows((2, n)), label="valid")
    want = proposal_cutout(regions, draws, size, valid)
    h, w = size
    for margin in (0, 1, 10, 40):  # the mask has cells from 4 n pixels on
        got = proposal_cutout(regions, draws, (h + margin, w + margin), valid)
        torch.testing.assert_close(got.boxes, want.boxes, **CLOSE)
        assert torch.equal(got.mask[:, :h, :w], want.mask)
        assert got.mask.sum() == want.mask.sum()


@given(cutouts((2, 3)))
def test_a_ragged_batch_is_cut_image_by_image(case):
    regions, draws, size, valid = case
    got = proposal_cutout(*case)
    for one, shift, use, mask, cuts in images_of(regions, draws, valid, *got):
        alone = proposal_cutout(one[use], shift[use], size)
        assert torch.equal(mask, alone.mask)
        assert torch.equal(cuts[use], alone.boxes)


@given(st.data(), sizes())
def test_all_of_a_proposal_may_be_cut_or_nothing(data, size):
    regions = data.draw(proposals((2,), size, 1, whole_pixels=True), label="proposals")
    draws = data.draw(tensors((2, 1, 3), 0, 1), label="draws")
    draws[..., 0] = torch.tensor([0.0, 1.0])[:, None]
    got = proposal_cutout(regions, draws, size)
    assert not got.mask[0].any()
    assert (got.boxes[0] == 0).all()
    assert torch.equal(got.mask[1], boxes_to_mask(regions[1], size))
    assert torch.equal(got.boxes[1], regions[1])


def test_a_small_proposal_is_restored_and_a_large_one_is_not():
    regions = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 8.0, 8.0], [2.0, 2.0, 5.0, 5.0]])
    draws = torch.tensor([[0.25, 1.0, 1.0], [0.25, 0.0, 0.0], [5 / 9, 1.0, 1.0]])
    got = proposal_cutout(regions, draws, (8, 8))
    # The largest loses [0, 4] x [0, 4], which the second gets back whole before it loses its
    # own quarter; that is 4 of the 9 pixels of the smallest, which loses one more.
    want = torch.tensor([[2.0, 2, 4, 4], [0, 0, 4, 4], [4, 4, 5, 5]])
    torch.testing.assert_close(got.boxes, want, rtol=0, atol=1e-5)
    assert got.mask[2:4, 2:4].all()
    assert got.mask.sum() <= 5
    # Without the small ones the large one loses a quarter.
    got = proposal_cutout(regions, draws, (8, 8), torch.tensor([False, True, False]))
    assert got.mask[:4, :4].all()
    assert got.mask.sum() == 16


def test_a_pixel_is_restored_when_any_of_it_lies_in_the_proposal():
    regions = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.5, 0.5, 3.5, 3.5]])
    draws = torch.tensor([[0.25, 0.0, 0.0], [0.1, 0.0, 0.0]])
    assert proposal_cutout(regions[:1], draws[:1], (8, 8)).mask.sum() == 16
    assert not proposal_cutout(regions, draws, (8, 8)).mask.any()


def test_equal_areas_are_cut_from_left_to_right():
    # The first is cut whole; the other gets back what it lost, and loses a quarter.
    left, right = [0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]
    draws = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.0, 0.0]])
    got = proposal_cutout(torch.tensor([left, right]), draws, (2, 3))
    assert got.boxes.tolist() == [left, [1.0, 0.0, 2.0, 1.0]]
    assert got.mask.tolist() == [[True, True, False], [True, False, False]]
    got = proposal_cutout(torch.tensor([right, left]), draws, (2, 3))
    assert got.boxes.tolist() == [right, [0.0, 0.0, 1.0, 1.0]]
    assert got.mask.tolist() == [[True, True, True], [False, True, True]]


def test_equal_areas_are_cut_from_left_to_right_before_top_to_bottom():
    regions = torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    draws = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    got = proposal_cutout(regions, draws, (3, 3))
    # The left one loses all of itself, and the upper one gets their common pixel back.
    assert got.mask.int().tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]


def test_no_proposal_cuts_nothing():
    got = proposal_cutout(torch.zeros(2, 0, 4), torch.zeros(2, 0, 3), (3, 5))
    assert got.mask.shape == (2, 3, 5)
    assert got.boxes.shape == (2, 0, 4)
    assert not got.mask.any()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_proposals_are_cut_as_float_proposals(dtype):
    regions = boxes_within(seeded(), image_box((32, 32), (9, 4), torch.float32)).to(dtype)
    draws = sample_cutout(regions, generator=seeded())
    assert draws.dtype == torch.float32
    got, want = (proposal_cutout(x, draws, (32, 32)) for x in (regions, regions.float()))
    assert torch.equal(got.mask, want.mask)
    assert torch.equal(got.boxes, want.boxes)


@given(boxes(), st.floats(0, 1), st.floats(0, 1), generators())
def test_the_draws_of_a_cutout_stay_in_their_ranges(regions, one, other, generator):
    low, high = sorted((one, other))
    some = regions[..., None, :]
    draws = sample_cutout(some, ratio=(low, high), generator=generator)
    assert draws.shape == (*some.shape[:-1], 3)
    assert ((draws[..., 0] >= low) & (draws[..., 0] <= high + 1e-12)).all()
    assert ((draws[..., 1:] >= 0) & (draws[..., 1:] < 1)).all()


def test_the_draws_of_a_cutout_are_uniform_and_independent():
    draws = sample_cutout(torch.zeros(4000, 4).double(), generator=seeded())
    assert stats.kstest(draws[:, 0], stats.uniform(0.2, 0.3).cdf).pvalue > 1e-4
    for k in (1, 2):
        assert stats.kstest(draws[:, k], "uniform").pvalue > 1e-4
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(stats.spearmanr(draws[:, i], draws[:, j]).statistic) < 4 / math.sqrt(4000)


# ---------------------------------------------------------------------------------- jitter


@given(boxes(), st.floats(0, 2), st.floats(0, 0.99), generators())
def test_a_jittered_box_moves_and_grows_no_more_than_was_asked(good, center, size, generator):
    regions = good[..., None, :]
    got = sample_jittered_boxes(regions, center=center, size=size, generator=generator)
    assert boxes_valid(got).all()
    before, after = (x[..., 2:] - x[..., :2] for x in (regions, got))
    moved = ((got[..., :2] + got[..., 2:]) - (regions[..., :2] + regions[..., 2:])).abs() / 2
    assert (moved <= center * before + 1e-9).all()
    assert ((after - before).abs() <= size * before + 1e-9).all()


def test_jitter_is_uniform_along_every_side():
    regions = torch.tensor([[10.0, 20.0, 14.0, 22.0]], dtype=torch.float64).expand(4000, 4)
    got = sample_jittered_boxes(regions, center=0.3, size=0.2, generator=seeded())
    extent = torch.tensor([4.0, 2.0])
    moved = ((got[:, :2] + got[:, 2:]) / 2 - torch.tensor([12.0, 21.0])) / extent / 0.3
    grown = ((got[:, 2:] - got[:, :2]) / extent - 1) / 0.2
    columns = torch.cat([moved, grown], -1)
    for k in range(4):
        assert stats.kstest(columns[:, k], stats.uniform(-1, 2).cdf).pvalue > 1e-4
    limit = 4 / math.sqrt(4000)
    assert np.abs(stats.spearmanr(columns).statistic - np.eye(4)).max() < limit


@pytest.mark.parametrize("dtype", [*LOWER, torch.float64])
def test_a_box_that_is_not_to_be_jittered_stays(dtype):
    regions = boxes_within(seeded(), image_box((300, 300), (500,), torch.float32)).to(dtype)
    got = sample_jittered_boxes(regions, center=0.0, size=0.0)
    close = 2 * torch.finfo(dtype).eps * 300 if dtype in (torch.float32, torch.float64) else 0
    torch.testing.assert_close(got, regions, rtol=0, atol=close)


@given(st.data(), st.floats(0.05, 1), st.floats(0.05, 1), generators())
def test_a_restricted_box_is_inside_and_of_the_scale_that_was_asked(data, one, other, generator):
    size = data.draw(sizes(), label="size")
    regions = data.draw(proposals(data.draw(batches()), size), label="boxes")
    low, high = sorted((one, other))
    got = sample_inner_boxes(regions, scale=(low, high), generator=generator)
    assert (got[..., :2] >= regions[..., :2]).all()
    assert (got[..., 2:] <= regions[..., 2:]).all()
    share = (got[..., 2:] - got[..., :2]) / (regions[..., 2:] - regions[..., :2])
    assert ((share >= low - 1e-9) & (share <= high + 1e-9)).all()


@pytest.mark.parametrize("dtype", LOWER)
@given(st.data(), st.sampled_from([(0.8, 1.0), (1.0, 1.0), (0.1, 0.2), (0.999, 1.0)]))
def test_a_restricted_box_is_inside_in_every_dtype(dtype, data, scale):
    generator = data.draw(generators(), label="generator")
    frame = torch.tensor([-900.0, -3.0, 900.0, 1700.0]).expand(200, 4)
    regions = boxes_within(generator, frame).to(dtype)
    got = sample_inner_boxes(regions, scale=scale, generator=generator)
    assert got.dtype == dtype
    assert (got[:, :2] >= regions[:, :2]).all()
    assert (got[:, 2:] <= regions[:, 2:]).all()
    if scale == (1.0, 1.0):
        assert torch.equal(got, regions)


def test_restricted_boxes_have_uniform_sizes_and_uniform_places():
    regions = torch.tensor([[10.0, 20.0, 14.0, 22.0]], dtype=torch.float64).expand(4000, 4)
    got = sample_inner_boxes(regions, scale=(0.5, 0.9), generator=seeded())
    extent = got[:, 2:] - got[:, :2]
    share = (extent / torch.tensor([4.0, 2.0]) - 0.5) / 0.4
    place = (got[:, :2] - regions[:, :2]) / (torch.tensor([4.0, 2.0]) - extent)
    columns = torch.cat([share, place], -1)
    for k in range(4):
        assert stats.kstest(columns[:, k], "uniform").pvalue > 1e-4
    limit = 4 / math.sqrt(4000)
    assert np.abs(stats.spearmanr(columns).statistic - np.eye(4)).max() < limit


# -------------------------------------------------------------------------- random masks


@given(st.data(), st.floats(0.05, 3), st.floats(0.05, 3), generators())
def test_a_mask_touches_its_proposal_from_outside(data, one, other, generator):
    size = data.draw(sizes(), label="size")
    regions = data.draw(proposals(data.draw(batches()), size), label="boxes")
    ranges = tuple(sorted((one, other)))
    got = sample_surrounding_boxes(regions, ratio=ranges, aspect=ranges, generator=generator)
    gap = torch.maximum(got[..., :2] - regions[..., 2:], regions[..., :2] - got[..., 2:])
    largest = gap.amax(-1)  # above 0 they are apart, below 0 they overlap
    torch.testing.assert_close(largest, torch.zeros_like(largest), **CLOSE)
    wide, tall = (got[..., 2:] - got[..., :2]).unbind(-1)
    share, shape = box_area(got) / box_area(regions), wide / tall
    for found in (share, shape):
        assert ((found >= ranges[0] * (1 - 1e-7)) & (found <= ranges[1] * (1 + 1e-7))).all()


def test_masks_of_no_area_cover_nothing():
    regions = torch.tensor([[1.0, 2.0, 5.0, 4.0]]).expand(50, 1, 4)
    regions = regions.clone().requires_grad_()
    got = sample_surrounding_boxes(regions, ratio=(0.0, 0.0), generator=seeded())
    assert got.isfinite().all()
    got.sum().backward()
    assert regions.grad.isfinite().all()
    assert not boxes_to_mask(got, (8, 8)).any()


def test_masks_lie_in_all_directions_alike():
    regions = torch.tensor([[10.0, 20.0, 14.0, 22.0]], dtype=torch.float64).expand(4000, 4)
    got = sample_surrounding_boxes(regions, generator=seeded())
    x, y = ((got[:, :2] + got[:, 2:]) / 2 - torch.tensor([12.0, 21.0])).unbind(-1)
    assert stats.kstest(torch.atan2(y, x), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-4
    wide, tall = (got[:, 2:] - got[:, :2]).unbind(-1)
    assert stats.kstest(wide * tall / 8, stats.uniform(0.2, 0.4).cdf).pvalue > 1e-4
    span = math.log(16 / 9)
    assert stats.kstest((wide / tall).log(), stats.uniform(-span / 2, span).cdf).pvalue > 1e-4


@pytest.mark.parametrize(
    "function",
    [sample_jittered_boxes, sample_inner_boxes, sample_surrounding_boxes],
    ids=lambda f: f.__name__,
)
class TestDrawnBoxes:
    @given(bad=degenerate_boxes(), generator=generators())
    def test_degenerate_boxes_stay_degenerate(self, function, bad, generator):
        got = function(bad[..., None, :], generator=generator)
        assert not boxes_valid(got).any()

    def test_a_generator_decides(self, function):
        regions = torch.tensor([[2.0, 2.0, 6.0, 6.0]]).expand(3, 4)
        first, again, other = (function(regions, generator=seeded(s)) for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert not torch.equal(first[0], first[1])

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_boxes_are_rounded_float_boxes(self, function, dtype):
        regions = boxes_within(seeded(), image_box((300, 300), (500,), torch.float32)).to(dtype)
        got = function(regions, generator=seeded())
        assert got.dtype == dtype
        want = function(regions.float(), generator=seeded())
        assert torch.equal(got, want.to(dtype))


# ---------------------------------------------------------------------------------- masks


@given(st.data(), sizes())
def test_a_mask_is_true_where_the_center_of_a_pixel_lies_in_a_box(data, size):
    regions = data.draw(proposals(data.draw(batches()), size), label="boxes")
    regions = regions.mul(2).round().div(2) if data.draw(st.booleans()) else regions  # on centers
    valid = data.draw(valid_rows(regions.shape[:-1]), label="valid")
    got = boxes_to_mask(regions, size, valid)
    assert got.shape == (*regions.shape[:-2], *size)
    for one, use, mask in images_of(regions, valid[..., None], got):
        want = np.zeros(size, dtype=bool)
        for (x1, y1, x2, y2), used in zip(one.tolist(), use[:, 0].tolist(), strict=True):
            for i, j in product(*map(range, size)):
                want[i, j] |= used and x1 <= j + 0.5 < x2 and y1 <= i + 0.5 < y2
        assert mask.numpy().tolist() == want.tolist()


@given(st.data(), sizes())
def test_the_mask_of_boxes_is_the_union_of_their_masks(data, size):
    batch = data.draw(batches(), label="batch")
    regions = data.draw(proposals(batch, size), label="boxes")
    union = torch.zeros(*batch, *size, dtype=torch.bool)
    for k in range(regions.shape[-2]):
        union |= boxes_to_mask(regions[..., k : k + 1, :], size)
    assert torch.equal(boxes_to_mask(regions, size), union)


@given(st.data(), sizes())
def test_a_box_of_whole_pixels_covers_its_area_inside_the_image(data, size):
    (box,) = data.draw(proposals((), size, 1, whole_pixels=True), label="box")
    inside = box.maximum(image_box(size) * 0).minimum(image_box(size)[2:].repeat(2))
    assert boxes_to_mask(box[None], size).sum() == box_area(inside)
    assert torch.equal(boxes_to_mask(inside[None], size), boxes_to_mask(box[None], size))


@given(st.data(), sizes())
def test_boxes_that_are_not_valid_cover_nothing(data, size):
    batch = data.draw(batches(), label="batch")
    bad = data.draw(degenerate_boxes((*batch, 3)), label="bad")
    assert not boxes_to_mask(bad, size).any()
    assert not boxes_to_mask(bad, size, torch.ones(*batch, 3, dtype=torch.bool)).any()


@given(st.data(), sizes())
def test_masked_pixels_are_filled_and_the_others_are_not_touched(data, size):
    batch, c = data.draw(batches()), data.draw(st.integers(1, 3))
    images = data.draw(tensors((*batch, c, *size)), label="images")
    mask = flips(data.draw(generators()), *batch, *size)
    colors = data.draw(tensors((c,)), label="fill")
    away = mask[..., None, :, :].expand_as(images)
    for fill, want in ((0.7, torch.full_like(images, 0.7)), (colors, None)):
        got = fill_mask(images, mask, fill=fill)
        want = colors[:, None, None].expand_as(images) if want is None else want
        assert torch.equal(got[~away], images[~away])
        assert torch.equal(got[away], want[away])
    assert torch.equal(fill_mask(images, mask), fill_mask(images, mask, fill=0.0))


def test_a_filled_pixel_has_no_gradient_whatever_it_was():
    images = torch.tensor([[[1.0, torch.nan, torch.inf]]], requires_grad=True)
    fill = torch.tensor([2.0], requires_grad=True)
    got = fill_mask(images, torch.tensor([[False, True, True]]), fill=fill)
    assert got.tolist() == [[[1, 2, 2]]]
    grads = torch.autograd.grad(got.sum(), [images, fill])
    assert grads[0].tolist() == [[[1, 0, 0]]]
    assert grads[1].tolist() == [2]


@pytest.mark.parametrize("dtype", HALVES)
def test_filled_half_images_stay_half(dtype):
    images, mask = torch.rand(3, 2, 2).to(dtype), torch.tensor([[True, False]] * 2)
    for fill in (0.5, torch.full((3,), 0.5)):
        got = fill_mask(images, mask, fill=fill)
        assert got.dtype == dtype
        assert (got[:, :, 0] == 0.5).all()


# ---------------------------------------------------------------------------------- shifts


@given(st.data(), sizes())
def test_a_shift_is_whole_and_keeps_every_box_inside(data, size):
    batch = data.draw(batches(), label="batch")
    regions = boxes_within(
        data.draw(generators()), image_box(size, (*batch, 3)), data.draw(st.booleans())
    )
    valid = data.draw(valid_rows((*batch, 3)), label="valid")
    shift = sample_shift(regions, size, valid, generator=data.draw(generators()))
    assert torch.equal(shift, shift.round())
    moved = shift_boxes(regions, shift)[valid]
    assert (moved[:, :2] >= -1e-12).all()
    assert (moved[:, 2:] <= torch.tensor([size[1], size[0]]) + 1e-12).all()
    assert (shift[~valid.any(-1)] == 0).all()


@given(st.data(), sizes())
def test_only_boxes_that_count_bound_the_shift(data, size):
    regions = boxes_within(data.draw(generators()), image_box(size, (2, 3)))
    valid = data.draw(valid_rows((2, 3)), label="valid")
    bad = data.draw(degenerate_boxes((2, 3)), label="bad")
    outside = data.draw(proposals((2,), size, 3), label="outside") + 100
    seed = data.draw(st.integers(0, 99), label="seed")
    want = sample_shift(regions, size, valid, generator=seeded(seed))
    for others, asked in ((bad, None), (bad, valid), (outside, valid)):
        spoiled = torch.where(valid[..., None], regions, others)
        assert torch.equal(sample_shift(spoiled, size, asked, generator=seeded(seed)), want)


def test_all_shifts_that_fit_occur_alike():
    regions = torch.tensor([[1.5, 2.0, 3.0, 4.0], [2.0, 1.0, 4.5, 3.0]]).expand(4000, 2, 4)
    shift = sample_shift(regions, (5, 7), generator=seeded())
    # The envelope is [1.5, 4.5] x [1, 4]: x from -1 to 2, y from -1 to 1.
    found, counts = shift.unique(dim=0, return_counts=True)
    assert found.tolist() == [[x, y] for x in range(-1, 3) for y in range(-1, 2)]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_there_is_no_shift_along_an_axis_without_room():
    tall = torch.tensor([[2.0, 0.0, 3.0, 5.0]]).expand(99, 1, 4)
    shift = sample_shift(tall, (5, 7), generator=seeded())
    assert (shift[:, 1] == 0).all()
    assert shift[:, 0].unique().tolist() == [-2, -1, 0, 1, 2, 3, 4]
    almost = torch.tensor([[2.0, 0.5, 3.0, 4.75]]).expand(99, 1, 4)
    assert (sample_shift(almost, (5, 7), generator=seeded())[:, 1] == 0).all()
    outside = torch.tensor([[2.0, -0.5, 3.0, 1.0], [2.0, 2.0, 3.0, 3.0]]).expand(99, 2, 4)
    shift = sample_shift(outside, (5, 7), generator=seeded())
    assert (shift[:, 1] == 0).all()
    assert shift[:, 0].unique().tolist() == [-2, -1, 0, 1, 2, 3, 4]


def test_a_generator_decides_the_shift_and_each_image_has_its_own():
    regions = torch.tensor([[1.0, 1.0, 2.0, 2.0]]).expand(9, 1, 4)
    first, again, other = (
        sample_shift(regions, (99, 99), generator=seeded(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 9


@given(st.data(), sizes())
def test_a_shift_and_its_opposite_bring_boxes_back(data, size):
    batch = data.draw(batches(), label="batch")
    regions = data.draw(proposals(batch, size), label="boxes")
    shift = data.draw(tensors((*batch, 2), -9, 9), label="shift")
    moved = shift_boxes(regions, shift)
    want = regions + torch.cat([shift, shift], -1)[..., None, :]
    assert torch.equal(moved, want)
    torch.testing.assert_close(shift_boxes(moved, -shift), regions, rtol=0, atol=1e-12)
    whole = shift.round()
    exact = regions.mul(64).round().div(64)
    assert torch.equal(shift_boxes(shift_boxes(exact, whole), -whole), exact)


# -------------------------------------------------------------------------------- composite


@st.composite
def pastes(draw, batch=None):
    """Foreground above 0 and background below 0, every value once; shifts beyond the image too."""
    batch = draw(batches()) if batch is None else batch
    shape = (*batch, draw(st.integers(1, 2)), *draw(sizes(high=6)))
    front = 1.0 + torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    mask = draw(valid_rows((*batch, *shape[-2:])))
    shift = draw(tensors((*batch, 2), -1.3, 1.3)) * torch.tensor([shape[-1], shape[-2]])
    return front, -front, mask, shift.round()


def slow_composite(front, back, mask, shift):
    got, (dx, dy) = back.clone(), (int(x) for x in shift)
    h, w = mask.shape
    for i, j in product(range(h), range(w)):
        if mask[i, j] and 0 <= i - dy < h and 0 <= j - dx < w:
            got[:, i, j] = front[:, i - dy, j - dx]
    return got


@given(pastes())
def test_every_pixel_of_a_composite_comes_from_one_image(case):
    got = composite(*case)
    assert got.shape == case[0].shape
    for index in np.ndindex(case[2].shape[:-2]):
        assert torch.equal(got[index], slow_composite(*(x[index] for x in case)))


@given(pastes())
def test_without_a_shift_the_foreground_stays_where_it_is(case):
    front, back, mask, shift = case
    got = composite(front, back, mask)
    assert torch.equal(got, torch.where(mask[..., None, :, :], front, back))
    assert torch.equal(got, composite(front, back, mask, shift * 0))


@given(pastes())
def test_a_composite_moved_back_is_the_foreground_that_stayed_inside(case):
    front, back, mask, shift = case
    everywhere = torch.ones_like(mask)
    moved = composite(front, back, everywhere, shift)
    restored = composite(moved, torch.zeros_like(back), everywhere, -shift)
    h, w = mask.shape[-2:]
    x, y = torch.arange(w) + shift[..., :1], torch.arange(h) + shift[..., 1:]
    stayed = ((y >= 0) & (y < h))[..., :, None] & ((x >= 0) & (x < w))[..., None, :]
    stayed = stayed[..., None, :, :].expand_as(front)
    assert torch.equal(restored[stayed], front[stayed])
    assert (restored[~stayed] == 0).all()


@given(pastes((2,)))
def test_the_gradient_goes_where_the_pixel_came_from(case):
    front, back, mask, shift = case
    leaves = [front.clone().requires_grad_(), back.clone().requires_grad_()]
    got = composite(*leaves, mask, shift)
    weight = 1.0 + torch.arange(got.numel(), dtype=torch.float64).view(got.shape)
    grads = torch.autograd.grad((got * weight).sum(), leaves)
    pasted = got > 0
    assert torch.equal(grads[1], torch.where(pasted, 0.0, weight))
    # A pixel of the foreground is named by its value: it takes the weight of where it went.
    want = torch.zeros(front.numel() + 1, dtype=torch.float64)
    want[got[pasted].long()] = weight[pasted]
    assert torch.equal(grads[0].flatten(), want[1:])


@given(pastes((2,)))
def test_a_nan_stays_in_the_pixels_of_its_image(case):
    front, back, mask, shift = case
    want = composite(*case)
    nan = torch.full_like(front, torch.nan)
    for spoiled, clean in (((nan, back), want < 0), ((front, nan), want > 0)):
        leaves = [x.clone().requires_grad_() for x in spoiled]
        got = composite(*leaves, mask, shift)
        assert torch.equal(got.isnan(), ~clean)
        assert torch.equal(got[clean], want[clean])
        assert all(x.isfinite().all() for x in torch.autograd.grad(got.sum(), leaves))


def test_the_shifted_boxes_show_what_the_boxes_held():
    images = torch.rand(3, 2, 12, 16, generator=seeded())
    regions = boxes_within(seeded(), image_box((12, 16), (3, 2), torch.float32), True)
    shift = sample_shift(regions, (12, 16), generator=seeded(3))
    assert (shift != 0).any()
    moved = shift_boxes(regions, shift)
    cut = proposal_cutout(moved, sample_cutout(moved, generator=seeded()), (12, 16)).mask
    mask = boxes_to_mask(moved, (12, 16)) & ~cut
    got = composite(images, images.roll(1, 0), mask, shift)
    for k in range(3):
        for (x1, y1, x2, y2), (u1, v1, u2, v2) in zip(
            regions[k].int().tolist(), moved[k].int().tolist(), strict=True
        ):
            there, here = got[k, :, v1:v2, u1:u2], images[k, :, y1:y2, x1:x2]
            kept = ~cut[k, v1:v2, u1:u2]
            assert torch.equal(there[:, kept], here[:, kept])
    outside = ~mask[:, None].expand_as(got)
    assert torch.equal(got[outside], images.roll(1, 0)[outside])


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("size", [(0, 4), (4, -1)])
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda x, s: proposal_cutout(x, x[:, :3], s), id="proposal_cutout"),
        pytest.param(boxes_to_mask, id="boxes_to_mask"),
        pytest.param(sample_shift, id="sample_shift"),
    ],
)
def test_an_image_without_pixels_is_refused(call, size):
    with pytest.raises(ValueError, match=r"densekit.regions.\w+: size is .*; give a positive"):
        call(torch.zeros(2, 4), size)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (sample_jittered_boxes, {"center": -0.1}),
        (sample_jittered_boxes, {"center": math.nan}),
        (sample_jittered_boxes, {"size": -0.1}),
        (sample_jittered_boxes, {"size": 1.0}),
        (sample_inner_boxes, {"scale": (0.0, 1.0)}),
        (sample_inner_boxes, {"scale": (0.5, 1.1)}),
        (sample_inner_boxes, {"scale": (0.9, 0.8)}),
        (sample_cutout, {"ratio": (-0.1, 0.5)}),
        (sample_cutout, {"ratio": (0.5, 1.1)}),
        (sample_cutout, {"ratio": (0.5, 0.2)}),
        (sample_surrounding_boxes, {"ratio": (-0.1, 0.5)}),
        (sample_surrounding_boxes, {"ratio": (0.5, 0.2)}),
        (sample_surrounding_boxes, {"aspect": (0.0, 1.0)}),
        (sample_surrounding_boxes, {"aspect": (1.0, math.inf)}),
    ],
)
def test_ranges_that_make_no_sense_are_refused(function, options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"densekit.regions.{function.__name__}: .*{name}"):
        function(torch.zeros(2, 4), **options)


def test_what_does_not_fit_is_refused():
    images, regions = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match="proposal_cutout: argument 'draws'"):
        proposal_cutout(regions, torch.zeros(2, 4, 3), (4, 4))
    with pytest.raises(TypeError, match="proposal_cutout: argument 'valid'"):
        proposal_cutout(regions, torch.zeros(2, 3, 3), (4, 4), mask[:, 0])
    with pytest.raises(TypeError, match="boxes_to_mask: argument 'valid'"):
        boxes_to_mask(regions, (4, 4), mask[:, 0])
    with pytest.raises(TypeError, match="fill_mask: argument 'fill'"):
        fill_mask(images, mask, fill=torch.zeros(4))
    with pytest.raises(TypeError, match="fill_mask: argument 'mask'"):
        fill_mask(images, mask[:, :3])
    with pytest.raises(TypeError, match="sample_shift: argument 'valid'"):
        sample_shift(regions, (4, 4), mask[:, 0])
    with pytest.raises(TypeError, match="shift_boxes: argument 'shift'"):
        shift_boxes(regions, torch.zeros(3, 2))
    with pytest.raises(TypeError, match="composite: argument 'background'"):
        composite(images, images[:, :, :3], mask)
    with pytest.raises(TypeError, match="composite: argument 'shift'"):
        composite(images, images, mask, torch.zeros(2, 2).long())


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_cutout_of_nothing_has_a_gradient(share):
    """Of a proposal that stands twice, the second one has lost its share already."""
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4]], requires_grad=True)
    draws = torch.tensor([[share, 0.0, 0.0]] * 2)
    found = proposal_cutout(boxes, draws, (8, 8)).boxes
    (gradient,) = torch.autograd.grad(found.sum(), boxes)
    assert gradient.isfinite().all()
