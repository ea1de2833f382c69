"""Labels by nearest neighbors against scikit-learn and slow loops, and their promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from strategies import generators, sizes, uniform
from densekit import (
    knn_votes,
    mean_iou,
    object_knn,
    propagate_labels,
    propagate_video,
    segmentation_counts,
)

CLASSES = 4


# ------------------------------------------------------------------------ nearest neighbors


@st.composite
def galleries(draw, least=1):
    """Objects and a gallery: features and labels of both."""
    d, generator = draw(st.integers(2, 4)), draw(generators())
    counts = draw(st.integers(1, 12)), draw(st.integers(least, 12))
    features = (2 * uniform(generator, count, d) - 1 for count in counts)
    labels = (torch.randint(CLASSES, (count,), generator=generator) for count in counts)
    (one, known), (label, known_label) = features, labels
    return one, label, known, known_label


@pytest.mark.filterwarnings("ignore::UserWarning:sklearn")
@given(galleries(), st.integers(1, 12), st.floats(0.05, 1))
def test_the_neighbors_vote_as_in_scikit_learn(case, k, temperature):
    features, labels, gallery, known = (x.numpy() for x in case)
    oracle = KNeighborsClassifier(
        min(k, len(gallery)),
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    )
    guess = oracle.fit(gallery, known).predict(features)
    got = object_knn(*case, classes=CLASSES, k=k, temperature=temperature)
    assert got.overall.item() == pytest.approx(accuracy_score(labels, guess))
    assert got.macro.item() == pytest.approx(balanced_accuracy_score(labels, guess))


@given(galleries(), st.integers(1, 14), st.integers(1, 14), generators())
def test_chunks_and_the_order_and_length_of_rows_do_not_matter(case, k, chunk, generator):
    features, labels, gallery, known = case
    want = object_knn(*case, classes=CLASSES, k=k)
    order = torch.randperm(len(known), generator=generator)
    turn = torch.randperm(len(labels), generator=generator)
    length = uniform(generator, len(labels), 1, low=0.1, high=9)
    moved = (features[turn] * length, labels[turn], 3 * gallery[order], known[order])
    for rows, size in ((case, chunk), (moved, 4096), (moved, chunk)):
        got = object_knn(*rows, classes=CLASSES, k=k, chunk=size)
        torch.testing.assert_close(got, want)


@given(galleries())
def test_more_neighbors_than_there_are_is_all_of_them(case):
    want = object_knn(*case, classes=CLASSES, k=len(case[2]))
    assert object_knn(*case, classes=CLASSES, k=99) == want
    assert object_knn(*case, classes=CLASSES + 3, k=99) == want


@given(galleries(), st.integers(1, 14))
def test_rows_without_numbers_or_without_a_class_change_nothing(case, k):
    features, labels, gallery, known = case
    want = object_knn(*case, classes=CLASSES, k=min(k, len(known)))
    gallery = torch.cat([gallery, gallery[:1] * torch.nan, gallery[:1] / 0, gallery, gallery])
    known = torch.cat([known, known[:1], known[:1], known * 0 - 1, known * 0 + CLASSES])
    queries = torch.cat([features, features])
    targets = torch.cat([labels, labels * 0 + CLASSES])
    got = object_knn(queries, targets, gallery, known, classes=CLASSES, k=min(k, len(case[3])))
    torch.testing.assert_close(got, want)
    got = object_knn(features * torch.nan, labels, *case[2:], classes=CLASSES, k=k)
    assert got == (0, 0)
    got = object_knn(features, labels, gallery * torch.nan, known, classes=CLASSES, k=k)
    assert got == (0, 0)


def test_objects_are_compared_in_full_precision_under_autocast():
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.002]])
    with torch.autocast("cpu", torch.bfloat16):
        got = object_knn(gallery, torch.arange(2), gallery, torch.arange(2), classes=2, k=1)
    assert got.overall == 1


@given(galleries())
def test_the_nearest_neighbor_of_a_known_object_is_itself(case):
    _, _, gallery, known = case
    got = object_knn(gallery, known, gallery, known, classes=CLASSES, k=1)
    assert got == (1, 1)


def test_near_neighbors_outvote_many_far_ones_when_it_is_cold():
    angles = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    gallery = torch.stack([angles.cos(), angles.sin()], -1)
    known, one = torch.tensor([0, 1, 1, 1, 1]), torch.tensor([[1.0, 0.1]])
    for temperature, label in ((0.07, 0), (10.0, 1)):
        got = object_knn(
            one, torch.tensor([label]), gallery, known, classes=2, temperature=temperature
        )
        assert got.overall == 1


def test_macro_accuracy_counts_every_class_that_occurs_once():
    gallery, known = torch.eye(3), torch.tensor([0, 1, 4])
    labels = torch.tensor([0, 0, 0, 1])  # three are rightly named, the one of class 1 is not
    got = object_knn(gallery[[0, 0, 0, 2]], labels, gallery, known, classes=6, k=1)
    assert got.overall == 0.75
    assert got.macro == 0.5


def test_no_object_and_no_gallery_score_zero():
    rows, labels = torch.rand(4, 3), torch.zeros(4).long()
    for one, known in ((0, 4), (4, 0), (0, 0)):
        got = object_knn(rows[:one], labels[:one], rows[:known], labels[:known], classes=2)
        assert got == (0, 0)


@pytest.mark.parametrize(
    "options",
    [{"classes": 0}, {"k": 0}, {"chunk": 0}, {"temperature": 0.0}, {"temperature": math.nan}],
)
def test_a_vote_that_makes_no_sense_is_refused(options):
    rows, labels = torch.rand(4, 3), torch.zeros(4).long()
    with pytest.raises(ValueError, match=r"densekit.neighbors.knn_votes: classes is .*above 0"):
        object_knn(rows, labels, rows, labels, **{"classes": 2} | options)


def test_neighbors_that_do_not_fit_are_refused():
    labels = torch.zeros(4).long()
    with pytest.raises(TypeError, match="object_knn: argument 'gallery'"):
        object_knn(torch.zeros(4, 3), labels, torch.zeros(4, 2), labels, classes=2)
    with pytest.raises(TypeError, match="object_knn: argument 'gallery_labels'"):
        object_knn(torch.zeros(4, 3), labels, torch.zeros(5, 3), labels, classes=2)


@pytest.mark.filterwarnings("ignore::UserWarning:sklearn")
@given(galleries(), st.integers(1, 12), st.floats(0.05, 1))
def test_the_votes_are_scikit_learns_shares(case, k, temperature):
    features, _, gallery, known = case
    oracle = KNeighborsClassifier(
        min(k, len(gallery)),
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    )
    shares = oracle.fit(gallery.numpy(), known.numpy()).predict_proba(features.numpy())
    want = torch.zeros(len(features), CLASSES, dtype=torch.float64)
    want[:, oracle.classes_] = torch.from_numpy(shares)
    options = {"classes": CLASSES, "k": k, "temperature": temperature}
    for chunk in (None, 1, 5):
        got = knn_votes(features, gallery, known, chunk=chunk, **options)
        torch.testing.assert_close(got, want)


@given(galleries(), st.integers(1, 14))
def test_votes_of_rows_without_numbers_are_zero_and_they_have_none(case, k):
    features, _, gallery, known = case
    want = knn_votes(features, gallery, known, classes=CLASSES, k=min(k, len(known)))
    torch.testing.assert_close(want.sum(1), torch.ones(len(features)).double())
    more = torch.cat([gallery, gallery * torch.nan, gallery / 0, gallery, gallery])
    names = torch.cat([known, known, known, known * 0 - 1, known * 0 + CLASSES])
    queries = torch.cat([features, features * torch.nan, features * torch.inf])
    got = knn_votes(queries, more, names, classes=CLASSES, k=min(k, len(known)))
    torch.testing.assert_close(got[: len(features)], want)
    assert (got[len(features) :] == 0).all()


def test_cold_votes_do_not_overflow():
    gallery, known = torch.eye(3), torch.arange(3)
    got = knn_votes(gallery, gallery, known, classes=3, temperature=1e-6)
    assert torch.equal(got, torch.eye(3))


@given(generators())
def test_cells_that_are_known_are_segmented_without_an_error(generator):
    maps = torch.randn(2, 5, 4, 3, generator=generator)
    labels = torch.randint(CLASSES, (2, 4, 3), generator=generator)
    rows = maps.movedim(1, -1).flatten(0, 2)
    votes = knn_votes(rows, rows, labels.flatten(), classes=CLASSES, k=1)
    counts = segmentation_counts(votes.unflatten(0, (2, 4, 3)).movedim(-1, 1), labels)
    assert mean_iou(counts.sum(0)) == 1


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
    t = {"t": 2} | options
    maps, labels = torch.rand(t.pop("t"), 3, 2, 2), torch.rand(2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"densekit.neighbors.propagate_labels: . frames, k="):
        propagate_labels(torch.rand(3, 2, 2), maps, labels[: len(maps)], **t)


def test_a_video_that_makes_no_sense_is_refused():
    maps, first = torch.rand(2, 3, 2, 2), torch.rand(1, 2, 2)
    with pytest.raises(ValueError, match=r"propagate_video: 0 frames and context=7 came"):
        propagate_video(maps[:0], first)
    with pytest.raises(ValueError, match=r"propagate_video: 2 frames and context=-1 came"):
        propagate_video(maps, first, context=-1)
    with pytest.raises(TypeError, match="propagate_video: argument 'first'"):
        propagate_video(maps, first[:, :1])
    with pytest.raises(TypeError, match="propagate_labels: argument 'context_labels'"):
        propagate_labels(maps[0], maps, first[None])
