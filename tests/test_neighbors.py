"""Votes of nearest neighbors, and nearest rows, against scikit-learn and slow loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from strategies import feature_pairs, flips, generators, sizes, tensors, uniform
from densekit import (
    knn_votes,
    mean_iou,
    nearest_maps,
    nearest_rows,
    object_knn,
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
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"densekit.neighbors.knn_votes: {name} is {value}; give"):
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


@pytest.mark.parametrize("temperature", [1e-320, 1e-100, 1e100, math.inf])
def test_a_temperature_beyond_the_range_of_the_dtype_is_its_end(temperature):
    rows = uniform(torch.Generator().manual_seed(0), 6, 3, dtype=torch.float32)
    gallery = uniform(torch.Generator().manual_seed(1), 5, 3, dtype=torch.float32)
    gallery[3] = torch.nan  # it has no vote, though all five are asked for
    labels = torch.tensor([0, 1, 2, 0, 1])
    votes = knn_votes(rows, gallery, labels, classes=3, k=5, temperature=temperature)
    if temperature > 1:
        want = torch.tensor([0.25, 0.5, 0.25]).expand(6, 3)
    else:
        want = knn_votes(rows, gallery, labels, classes=3, k=1)
    torch.testing.assert_close(votes, want)


# ------------------------------------------------------------------------------- nearest rows


@given(feature_pairs(), st.integers(1, 8))
def test_nearest_rows_are_the_best_cosines_of_a_loop(pair, k):
    got = nearest_rows(*pair, k=k)
    n, m = pair[0].shape[-2], pair[1].shape[-2]
    assert got.indices.shape == got.similarity.shape == (*pair[0].shape[:-2], n, min(k, m))
    for index in np.ndindex(pair[0].shape[:-2]):
        for i, row in enumerate(pair[0][index]):
            cosines = torch.cosine_similarity(row, pair[1][index], dim=-1) if m else row[:0]
            want = cosines.sort(descending=True).values[:k]
            torch.testing.assert_close(got.similarity[index][i], want)
            chosen = got.indices[index][i]
            assert len(chosen.unique()) == len(chosen)
            torch.testing.assert_close(cosines[chosen], want)


@given(feature_pairs(), generators())
def test_permuted_rows_are_found_where_they_went(pair, generator):
    rows = torch.cat([pair[0], torch.ones_like(pair[0][..., :1])], -1)  # no two are parallel
    order = torch.randperm(rows.shape[-2], generator=generator)
    lengths = uniform(generator, *rows.shape[:-1], 1, low=0.1, high=10)
    got = nearest_rows(rows, (rows * lengths)[..., order, :])
    assert (got.indices[..., 0] == order.argsort()).all()
    torch.testing.assert_close(got.similarity, torch.ones_like(got.similarity))


@given(feature_pairs(), st.integers(1, 8), generators())
def test_a_row_that_is_not_finite_is_no_neighbor_and_has_none(pair, k, generator):
    one, other = pair
    lost, gone = (flips(generator, x.shape[-2]) for x in pair)
    got = nearest_rows(
        torch.where(lost[:, None], torch.nan, one),
        torch.where(gone[:, None], torch.inf, other),
        k=k,
    )
    want = nearest_rows(one, other[..., ~gone, :], k=k)
    found = want.indices.shape[-1]
    kept = (~gone).nonzero()[:, 0]
    assert torch.equal(got.indices[..., ~lost, :found], kept[want.indices[..., ~lost, :]])
    torch.testing.assert_close(
        got.similarity[..., ~lost, :found], want.similarity[..., ~lost, :], rtol=0, atol=1e-12
    )
    none = got.indices == -1
    assert none[..., lost, :].all()
    assert none[..., found:].all()
    assert torch.equal(none, got.similarity.isnan())
    rows = one.clone().requires_grad_()
    found = nearest_rows(torch.where(lost[:, None], torch.nan, rows), other, k=k)
    found.similarity.nansum().backward()
    assert rows.grad.isfinite().all()


def test_nearest_rows_ignore_autocast():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.002]])
    with torch.autocast("cpu", torch.bfloat16):
        got = nearest_rows(rows, rows)
    assert got.indices.flatten().tolist() == [0, 1]
    assert got.similarity.dtype == torch.float32


@given(st.data(), sizes(high=3), st.integers(1, 6))
def test_nearest_maps_agree_place_by_place(data, size, k):
    d, counts = data.draw(st.integers(1, 3)), data.draw(st.tuples(*[st.integers(0, 5)] * 2))
    maps, gallery = (data.draw(tensors((count, d, *size))) for count in counts)
    got = nearest_maps(maps, gallery, k=k)
    assert got.indices.shape == (counts[0], min(k, counts[1]))
    for i, one in enumerate(maps):
        cosines = [((one * other).sum() / one.norm() / other.norm()).item() for other in gallery]
        want = sorted(cosines, reverse=True)[:k]
        assert got.similarity[i].tolist() == pytest.approx(want, abs=1e-9)
        assert [cosines[j] for j in got.indices[i]] == pytest.approx(want, abs=1e-9)


def test_a_map_with_its_object_elsewhere_is_far():
    one = torch.zeros(1, 2, 4, 4)
    one[:, :, 0, 0] = 1
    moved, alike = one.roll(2, -1), one + 0.1 * torch.rand(1, 2, 4, 4)
    got = nearest_maps(one, torch.cat([moved, alike, one]), k=3)
    assert got.indices.tolist() == [[2, 1, 0]]  # their means are the same
    assert got.similarity[0, 2] == 0


def test_nearest_rows_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"densekit.neighbors.nearest_rows: k is 0; give 1"):
        nearest_rows(torch.zeros(2, 3), torch.zeros(2, 3), k=0)
    with pytest.raises(ValueError, match="k is -1; give 1"):
        nearest_maps(torch.zeros(2, 3, 1, 1), torch.zeros(2, 3, 1, 1), k=-1)
    with pytest.raises(TypeError, match=r"nearest_rows: argument 'gallery'.*d=3"):
        nearest_rows(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"nearest_maps: argument 'gallery'.*h=1"):
        nearest_maps(torch.zeros(2, 3, 1, 1), torch.zeros(2, 3, 2, 1))


def test_features_and_gallery_may_have_two_dtypes():
    features, gallery = torch.rand(3, 4, 2, 2).double(), torch.rand(5, 4, 2, 2)
    got = nearest_maps(features, gallery, k=2)
    want = nearest_maps(features, gallery.double(), k=2)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.similarity, want.similarity, atol=1e-6, rtol=0)
