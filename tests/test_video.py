"""Labels carried through a video against a slow loop; J and F against scikit-learn and -image."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation
from skimage.morphology import disk
from sklearn.metrics import jaccard_score
from strategies import batches, flips, generators, largest, sizes, uniform
from densekit import (
    boundary_f_measure,
    numerics,
    propagate_labels,
    propagate_video,
    region_similarity,
)

# -------------------------------------------------------------------------------- video labels


@st.composite
def videos(draw, frames=None):
    """Feature maps of some frames, and shares in each cell of all of them."""
    generator, t = draw(generators()), frames or draw(st.integers(2, 4))
    size, d, c = draw(sizes(high=5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    features = uniform(generator, t, d, *size, low=-1)
    shares = uniform(generator, t, c, *size, low=0.1)
    return features, shares / shares.sum(1, keepdim=True)


def slow_propagation(features, context, labels, *, radius, k, temperature):
    """Cell by cell: the k most alike within the radius, weighted."""
    _, h, w = features.shape
    got = torch.zeros(labels.shape[1], h, w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            near = []
            for frame, known in zip(context, labels, strict=True):
                for b in range(max(0, y - radius), min(h, y + radius + 1)):
                    for a in range(max(0, x - radius), min(w, x + radius + 1)):
                        one, other = features[:, y, x], frame[:, b, a]
                        cosine = (one @ other / one.norm() / other.norm()).item()
                        near.append((cosine, known[:, b, a]))
            best = sorted(near, key=lambda pair: -pair[0])[:k]
            weights = [math.exp(cosine / temperature) for cosine, _ in best]
            for weight, (_, shares) in zip(weights, best, strict=True):
                got[:, y, x] += weight / sum(weights) * shares
    return got


@given(videos(), st.integers(0, 5), st.integers(1, 7), st.floats(0.05, 2), st.integers(1, 30))
def test_labels_are_carried_as_in_a_loop(video, radius, k, temperature, chunk):
    (*context, now), (*labels, _) = video
    context, labels = torch.stack(context), torch.stack(labels)
    options = {"radius": radius, "k": k, "temperature": temperature}
    if now.shape[0] == 1:  # all cosines are 1 or -1: which of equal ones is taken is free
        options["k"] = 10_000
    got = propagate_labels(now, context, labels, chunk=chunk, **options)
    torch.testing.assert_close(got, slow_propagation(now, context, labels, **options))


@given(videos(), st.integers(0, 5), st.integers(1, 7))
def test_shares_stay_shares_whatever_the_length_of_the_features(video, radius, k):
    (*context, now), (*labels, _) = video
    context, labels = torch.stack(context), torch.stack(labels)
    got = propagate_labels(now, context, labels, radius=radius, k=k)
    torch.testing.assert_close(got.sum(0), torch.ones(now.shape[1:]).double())
    assert (got >= labels.amin((0, 2, 3))[:, None, None] - 1e-12).all()
    assert (got <= labels.amax((0, 2, 3))[:, None, None] + 1e-12).all()
    if now.shape[0] > 1:
        longer = propagate_labels(3 * now, 0.1 * context, labels, radius=radius, k=k)
        torch.testing.assert_close(longer, got)
    one = propagate_labels(now, context, torch.ones_like(labels), radius=radius, k=k)
    torch.testing.assert_close(one, torch.ones_like(one))


@given(videos(), st.integers(0, 5), st.integers(1, 7), generators())
def test_a_cell_that_is_not_finite_asks_for_nothing_and_gives_nothing(video, radius, k, generator):
    (*context, now), (*labels, _) = video
    context, labels = torch.stack(context), torch.stack(labels)
    now, context = (torch.cat([x, torch.ones_like(x[..., :1, :, :])], -3) for x in (now, context))
    lost, gone, bare = (
        flips(generator, *x) for x in (now.shape[1:], *[(len(context), *now.shape[1:])] * 2)
    )
    options = {"radius": radius, "k": k}
    got = propagate_labels(
        torch.where(lost, torch.nan, now),
        torch.where(gone[:, None], torch.inf, context),
        torch.where(bare[:, None], torch.nan, labels),
        **options,
    )
    assert got.isfinite().all()
    assert (got[:, lost] == 0).all()
    if not (gone | bare).any():
        want = propagate_labels(now, context, labels, **options)
        torch.testing.assert_close(got[:, ~lost], want[:, ~lost])
    total = got.sum(0)  # one, or zero where no candidate is left
    torch.testing.assert_close(total, (total > 0.5).to(total))
    if (
        not gone.all()
        and not bare.all()
        and not (gone | bare).all()
        and radius >= max(now.shape[1:])
    ):
        assert (total[~lost] > 0.5).all()


@given(videos(5), st.integers(0, 5), st.integers(1, 3))
def test_a_video_is_labeled_frame_by_frame_from_the_first_and_the_last_ones(video, context, k):
    features, (first, *_) = video
    options = {"radius": 2, "k": k, "temperature": 0.3}
    want = [first]
    for now in range(1, 5):
        used = sorted({0} | {i for i in range(now) if now - i <= context})
        known = torch.stack([want[i] for i in used])
        want.append(propagate_labels(features[now], features[used], known, **options))
    got = propagate_video(features, first, context=context, **options)
    assert torch.equal(got, torch.stack(want))


def test_an_object_that_moves_is_followed_as_far_as_the_radius_reaches():
    generator = torch.Generator().manual_seed(0)
    scene = torch.randn(16, 8, 8, generator=generator)
    things = torch.zeros(2, 8, 8)
    things[1, 2:5, :3] = 1
    things[0] = 1 - things[1]
    video = torch.stack([scene.roll(step, 2) for step in range(4)])
    want = torch.stack([things.roll(step, 2) for step in range(4)])
    # All cells move by one; a seam of the torus jumps, and only its neighbors are near.
    got = propagate_video(video, things, radius=1, k=1, context=1)
    assert torch.equal(got[..., 4:], want[..., 4:])
    far = propagate_video(video, things, radius=0, k=1, context=1)
    assert not torch.equal(far[..., 4:], want[..., 4:])
    whole = propagate_video(video, things, radius=8, k=1)
    assert torch.equal(whole, want)


def test_half_features_carry_labels_in_float32():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 8, 4, 4, generator=generator).bfloat16()
    first = torch.rand(2, 4, 4, generator=generator)
    want = propagate_video(features.float(), first)
    with torch.autocast("cpu", torch.bfloat16):
        got = propagate_video(features, first.bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"chunk": 0}, {"radius": -1}, {"temperature": 0.0}, {"t": 0}]
)
def test_labels_are_not_carried_where_it_makes_no_sense(options):
    ((name, value),) = options.items()
    name = "the number of frames" if name == "t" else name
    t = {"t": 2} | options
    maps, labels = torch.rand(t.pop("t"), 3, 2, 2), torch.rand(2, 1, 2, 2)
    with pytest.raises(ValueError, match=f"propagate_labels: {name} is {value}; give"):
        propagate_labels(torch.rand(3, 2, 2), maps, labels[: len(maps)], **t)


@pytest.mark.parametrize("temperature", [1e-320, 1e-100, 1e100, math.inf])
def test_labels_are_carried_at_any_temperature(temperature):
    context = uniform(torch.Generator().manual_seed(0), 2, 3, 2, 2, dtype=torch.float32)
    labels = uniform(torch.Generator().manual_seed(1), 2, 1, 2, 2, dtype=torch.float32)
    options = {"radius": 0, "temperature": temperature}  # two cells are near, and 5 are asked for
    got = propagate_labels(context[0], context, labels, **options)
    want = labels[0] if temperature < 1 else labels.mean(0)
    torch.testing.assert_close(got, want)


def test_a_video_that_makes_no_sense_is_refused():
    maps, first = torch.rand(2, 3, 2, 2), torch.rand(1, 2, 2)
    with pytest.raises(ValueError, match=r"propagate_video: the number of frames is 0; give"):
        propagate_video(maps[:0], first)
    with pytest.raises(ValueError, match=r"propagate_video: context is -1; give"):
        propagate_video(maps, first, context=-1)
    with pytest.raises(TypeError, match="propagate_video: argument 'first'"):
        propagate_video(maps, first[:, :1])
    with pytest.raises(TypeError, match="propagate_labels: argument 'context_labels'"):
        propagate_labels(maps[0], maps, first[None])


# ------------------------------------------------------------------------------------- J and F


@st.composite
def masks(draw, batch=()):
    """Two masks, at times blocks, full or empty."""
    size, generator = draw(sizes(high=12)), draw(generators())
    found = []
    for _ in range(2):
        kind = draw(st.sampled_from(["noise", "block", "full", "empty"]))
        noise = flips(generator, *batch, *size)
        corners = torch.stack([torch.randint(n + 1, (2,), generator=generator) for n in size])
        (top, bottom), (left, right) = corners.sort(-1).values.tolist()
        block = torch.zeros_like(noise)
        block[..., top:bottom, left:right] = True
        options = {"noise": noise, "block": block}
        options |= {"full": torch.ones_like(noise), "empty": torch.zeros_like(noise)}
        found.append(options[kind])
    return tuple(found)


def slow_outline(mask):
    """Pixels that differ from the next to the right, below, or both; outside is as the edge."""
    h, w = mask.shape
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    out = np.zeros_like(mask)
    for y, x in itertools.product(range(h), range(w)):
        here = padded[y, x]
        out[y, x] = any(here != padded[y + a, x + b] for a, b in ((0, 1), (1, 0), (1, 1)))
    return out


def slow_f(mask, guess, tolerance):
    """The measure of DAVIS with scikit-image's disk."""
    reach = math.ceil(tolerance * math.hypot(*mask.shape))
    true, found = slow_outline(mask), slow_outline(guess)
    if not true.any() and not found.any():
        return 1.0
    if not true.any() or not found.any():
        return 0.0
    near = [binary_dilation(x, disk(reach)) for x in (true, found)]
    precision = (found & near[0]).sum() / found.sum()
    recall = (true & near[1]).sum() / true.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@given(masks(), st.sampled_from([0.0, 0.008, 0.1, 0.25, 1.0]))
def test_f_is_that_of_a_loop_and_scikit_images_disk(pair, tolerance):
    got = boundary_f_measure(*pair, tolerance=tolerance)
    want = slow_f(*(x.numpy() for x in pair), tolerance)
    assert got.item() == pytest.approx(want, abs=1e-6)


@given(masks())
def test_j_is_scikit_learns(pair):
    one, other = (x.flatten().numpy() for x in pair)
    want = jaccard_score(one, other) if (one | other).any() else 1
    assert region_similarity(*pair).item() == pytest.approx(want)


@given(st.data(), batches())
def test_j_and_f_are_symmetric_one_for_equal_masks_and_of_each_image_alone(data, batch):
    one, other = data.draw(masks(batch))
    for measure in (region_similarity, boundary_f_measure):
        got = measure(one, other)
        assert got.shape == batch
        assert got.dtype == torch.float32
        assert ((got >= 0) & (got <= 1)).all()
        assert torch.equal(measure(one, one), torch.ones(batch))
        torch.testing.assert_close(measure(other, one), got)
        for index in np.ndindex(batch):
            assert measure(one[index], other[index]) == got[index]


def test_far_masks_have_no_j_and_no_f_and_a_shift_within_the_tolerance_costs_no_f():
    left, right = torch.zeros(2, 40, 60).bool()
    left[5:15, 5:15] = True
    right[20:30, 40:50] = True
    assert region_similarity(left, right) == 0
    assert boundary_f_measure(left, right) == 0
    moved = left.roll(1, 1)  # ceil(0.008 * 72.1) is 1 pixel
    assert boundary_f_measure(left, moved) == 1
    assert boundary_f_measure(left, moved, tolerance=0) < 0.9
    assert boundary_f_measure(left, left.roll(3, 1)) < 1
    empty = torch.zeros_like(left)
    assert (region_similarity(left, empty), boundary_f_measure(left, empty)) == (0, 0)
    assert (region_similarity(empty, empty), boundary_f_measure(empty, empty)) == (1, 1)


def test_f_of_many_images_works_in_blocks(monkeypatch):
    pair = flips(torch.Generator().manual_seed(0), 2, 40, 16, 16)
    want = boundary_f_measure(*pair)
    monkeypatch.setattr(numerics, "BLOCK", 2**10)
    assert torch.equal(boundary_f_measure(*pair), want)
    assert largest(lambda: boundary_f_measure(*pair)) <= 8 * 2**10


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_f_refuses_what_makes_no_sense(tolerance):
    mask = torch.ones(2, 2).bool()
    with pytest.raises(ValueError, match=f"boundary_f_measure: tolerance is {tolerance}; give 0"):
        boundary_f_measure(mask, mask, tolerance=tolerance)
    for measure in (region_similarity, boundary_f_measure):
        with pytest.raises(TypeError, match=f"{measure.__name__}: argument 'predictions'"):
            measure(mask, mask[:1])


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("options", [{"k": 0}, {"radius": -1}, {"temperature": 0.0}])
def test_a_wrong_option_of_a_video_of_any_length_is_named(frames, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"propagate_video: {name} is {value}; give"):
        propagate_video(torch.rand(frames, 3, 2, 2), torch.ones(2, 2, 2), **options)
