"""Scores against scikit-learn, scipy, scikit-image, slow loops and the authors' numbers."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    jaccard_score,
    recall_score,
)
from sklearn.metrics import confusion_matrix as sklearn_confusion
from strategies import flips, generators, largest
from densekit import (
    Accuracy,
    ConfusionScores,
    SegmentationScore,
    accuracy,
    as_dict,
    as_table,
    average_precision,
    bootstrap,
    confusion_matrix,
    confusion_scores,
    group_scores,
    match_clusters,
    mean_iou,
    merge_clusters,
    numerics,
)

DATA = Path(__file__).parent / "data"
CLASSES = 4


@st.composite
def segmentations(draw, low=0, high=CLASSES):
    """Labels and predictions of one shape."""
    shape = draw(st.sampled_from([(), (0,), (1,), (3,), (20,), (2, 3, 4)]))
    generator = draw(generators())
    return tuple(torch.randint(low, high, shape, generator=generator) for _ in range(2))


# ------------------------------------------------------------------------- confusion matrix


@given(segmentations())
def test_the_confusion_matrix_is_scikit_learns(maps):
    got = confusion_matrix(*maps, classes=CLASSES)
    if maps[0].numel():
        want = sklearn_confusion(*(x.flatten() for x in maps), labels=range(CLASSES))
        assert torch.equal(got, torch.from_numpy(want))
    else:
        assert torch.equal(got, torch.zeros(CLASSES, CLASSES, dtype=torch.long))


@given(segmentations(-2, CLASSES + 3), st.integers(-2, CLASSES + 2))
def test_what_is_no_class_is_left_out(maps, ignore):
    labels, predictions = maps
    real = range(CLASSES)
    keep = [
        (a, b)
        for a, b in zip(labels.flatten().tolist(), predictions.flatten().tolist(), strict=True)
        if a in real and b in real and a != ignore
    ]
    want = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    for a, b in keep:
        want[a, b] += 1
    assert torch.equal(confusion_matrix(*maps, classes=CLASSES, ignore=ignore), want)


@given(segmentations(), segmentations())
def test_matrices_of_batches_add_up(one, two):
    joined = [torch.cat([a.flatten(), b.flatten()]) for a, b in zip(one, two, strict=True)]
    want = confusion_matrix(*joined, classes=CLASSES)
    got = confusion_matrix(*one, classes=CLASSES) + confusion_matrix(*two, classes=CLASSES)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_few_bits_do_not_wrap_around(dtype):
    labels = torch.tensor([0, 100, 100], dtype=dtype)
    got = confusion_matrix(labels, labels.flip(0), classes=101)
    assert got.nonzero().tolist() == [[0, 100], [100, 0], [100, 100]]


def test_class_255_of_300_is_a_class():
    labels = torch.arange(300)
    predictions = torch.where(labels == 255, 0, labels)
    assert mean_iou(confusion_matrix(labels, labels, classes=300)) == 1
    got = mean_iou(confusion_matrix(labels, predictions, classes=300))
    assert got.item() == pytest.approx(298.5 / 300)
    few = torch.tensor([0, 255, 1, 255])  # of 255 classes or fewer it is none
    assert confusion_matrix(few, few, classes=255).sum() == 2
    assert confusion_matrix(few, few, classes=256).sum() == 4


@given(st.sampled_from([2, 21, 255, 256, 301, 1000]), generators())
def test_renaming_the_classes_renames_the_scores_for_any_number_of_classes(classes, generator):
    labels, predictions = torch.randint(classes, (2, 40), generator=generator)
    names = torch.randperm(classes, generator=generator)
    got = confusion_scores(confusion_matrix(names[labels], names[predictions], classes=classes))
    want = confusion_scores(confusion_matrix(labels, predictions, classes=classes))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one[names] if one.ndim else one, other)


def test_the_confusion_matrix_refuses_what_does_not_fit():
    labels = torch.zeros(3, dtype=torch.long)
    with pytest.raises(TypeError, match=r"argument 'predictions'.*shape=\(3\).*\(4,\)"):
        confusion_matrix(labels, torch.zeros(4, dtype=torch.long), classes=2)
    with pytest.raises(TypeError, match=r"argument 'predictions'.*float32"):
        confusion_matrix(labels, torch.zeros(3), classes=2)
    with pytest.raises(ValueError, match=r"densekit.metrics.confusion_matrix: classes is 0"):
        confusion_matrix(labels, labels, classes=0)


# --------------------------------------------------------------------------------- mean IoU


@given(segmentations())
def test_mean_iou_is_scikit_learns_jaccard_score(maps):
    got = mean_iou(confusion_matrix(*maps, classes=CLASSES))
    if maps[0].numel():
        # Of the classes that occur, as scikit-learn picks them when left to itself.
        want = jaccard_score(*(x.flatten() for x in maps), average="macro")
        assert got.item() == pytest.approx(want, abs=1e-6)
    else:
        assert got == 0


@given(segmentations())
def test_mean_iou_does_not_depend_on_the_names_of_the_classes(maps):
    order = torch.tensor([2, 0, 3, 1])
    got = mean_iou(confusion_matrix(*(order[x] for x in maps), classes=CLASSES))
    torch.testing.assert_close(got, mean_iou(confusion_matrix(*maps, classes=CLASSES)))


def test_mean_iou_of_many_matrices():
    confusion = torch.randint(0, 9, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    got = mean_iou(confusion)
    want = torch.stack([mean_iou(c) for c in confusion.flatten(0, 1)]).unflatten(0, (2, 3))
    assert torch.equal(got, want)


def test_mean_iou_is_exact_for_counts_that_float32_cannot_hold():
    count = 2**24 + 1
    assert mean_iou(torch.tensor([[count, 0], [0, 1]])) == 1


def test_mean_iou_refuses_fewer_columns_than_rows_and_what_is_not_counted():
    with pytest.raises(ValueError, match="confusion_scores: there are 4 rows and 3 columns; give"):
        mean_iou(torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(TypeError, match=r"mean_iou: argument 'confusion'.*float32"):
        mean_iou(torch.zeros(3, 3))


# ------------------------------------------------------------------- the authors' program


def golden():
    """Published scores of random logits, in [0, 1], and the confusion matrix they come from."""
    file = np.load(DATA / "cluster_iou_0_nc5.npz")
    logits, labels = torch.from_numpy(file["logits"]), torch.from_numpy(file["label"])
    up = torch.nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear")
    confusion = confusion_matrix(labels, up.argmax(1), classes=5)
    assert torch.equal(confusion, torch.from_numpy(file["conf"]).long())
    things = torch.arange(5) < int(file["num_things"])
    return file, confusion, things


def percent(score, file, key):
    assert score.item() == pytest.approx(file[key].item() / 100, abs=1e-7), key


def test_the_scores_of_the_authors_program():
    file, confusion, _ = golden()
    clusters = match_clusters(confusion)
    # Their list names the cluster of each class, ours the class of each cluster.
    assert torch.equal(clusters.argsort(), torch.from_numpy(file["match"]))
    merged = merge_clusters(confusion, clusters)
    got = confusion_scores(merged)
    percent(got.miou, file, "official_mIoU")
    percent(got.pixel_accuracy, file, "official_aAcc")
    percent(got.mean_accuracy, file, "official_mAcc")
    assert mean_iou(merged) == got.miou
    want = torch.from_numpy(file["class_order_IoU"]).float() / 100
    torch.testing.assert_close(got.iou, want)
    assert abs(mean_iou(confusion).item() - file["official_mIoU"].item() / 100) > 1e-2


def test_the_scores_of_things_and_stuff_in_the_order_of_the_classes():
    file, confusion, things = golden()
    merged = merge_clusters(confusion, match_clusters(confusion))
    percent(group_scores(merged, things).miou, file, "class_order_mIoU_th_subblock")
    percent(group_scores(merged, ~things).miou, file, "class_order_mIoU_st_subblock")


# ------------------------------------------------------------------- scores of a confusion


@given(segmentations())
def test_the_scores_are_scikit_learns(maps):
    got = confusion_scores(confusion_matrix(*maps, classes=CLASSES))
    labels, guesses = (x.flatten() for x in maps)
    if not len(labels):
        assert all((x == 0).all() for x in got)
        return
    each = {"labels": range(CLASSES), "average": None, "zero_division": 0}
    iou = torch.from_numpy(jaccard_score(labels, guesses, **each)).float()
    torch.testing.assert_close(got.iou, iou)
    assert got.pixel_accuracy.item() == pytest.approx(accuracy_score(labels, guesses))
    recall = recall_score(labels, guesses, labels=labels.unique(), average="macro", zero_division=0)
    assert got.mean_accuracy.item() == pytest.approx(recall)
    occurs = set(labels.tolist()) | set(guesses.tolist())
    assert got.valid.nonzero().flatten().tolist() == sorted(occurs)


@given(segmentations())
def test_a_perfect_prediction_scores_one_and_nothing_right_scores_zero(maps):
    labels = maps[0]
    one = confusion_scores(confusion_matrix(labels, labels, classes=CLASSES))
    none = confusion_scores(confusion_matrix(labels, (labels + 1) % CLASSES, classes=CLASSES))
    assert one[:3] == ((1, 1, 1) if labels.numel() else (0, 0, 0))
    assert none[:3] == (0, 0, 0)


@st.composite
def confusions(draw):
    """Counts of a few classes and as many, more, or fewer clusters, some of them empty."""
    shape = draw(st.sampled_from([(4, 4), (3, 5), (5, 3), (1, 4), (4, 1), (2, 2)]))
    generator = draw(generators())
    empty = flips(generator, shape[1]) & draw(st.booleans())
    return torch.randint(0, 9, shape, generator=generator) * ~empty


@given(confusions())
def test_columns_without_a_class_are_never_right(confusion):
    classes, clusters = confusion.shape
    if clusters < classes:
        with pytest.raises(ValueError, match=f"{classes} rows and {clusters} columns"):
            confusion_scores(confusion)
        return
    square = confusion[:, :classes]
    other = confusion[:, classes:].sum(1)
    got = confusion_scores(confusion)
    union = (square.sum(0) + square.sum(1) + other - square.diagonal()).clamp(min=1)
    torch.testing.assert_close(got.iou, square.diagonal() / union)
    accuracy = square.diagonal().sum() / confusion.sum().clamp(min=1)
    torch.testing.assert_close(got.pixel_accuracy, accuracy)


# ---------------------------------------------------------------------------------- clusters


def best_sum(score):
    """The best one-to-one naming, by trying all."""
    long, short = max(score.shape), min(score.shape)
    tall = score if score.shape[0] == long else score.T
    rows = (torch.tensor(order) for order in itertools.permutations(range(long), short))
    return max(tall[order, torch.arange(short)].sum().item() for order in rows)


def union_scores(confusion):
    union = confusion.sum(1)[:, None] + confusion.sum(0) - confusion
    return confusion / union.clamp(min=1)


@given(confusions(), st.sampled_from(["pixels", "iou"]))
def test_one_to_one_is_the_best_of_all_namings(confusion, by):
    classes, clusters = confusion.shape
    score = confusion.double() if by == "pixels" else union_scores(confusion).double()
    got = match_clusters(confusion, by=by)
    named = got >= 0
    assert named.sum() == min(classes, clusters)
    assert len(got[named].unique()) == named.sum()  # no class twice
    total = score[got[named], torch.arange(clusters)[named]].sum().item()
    assert total == pytest.approx(best_sum(score), rel=1e-6)


@given(confusions(), st.sampled_from(["pixels", "iou"]))
def test_many_to_one_is_the_best_class_of_each_cluster(confusion, by):
    score = confusion if by == "pixels" else union_scores(confusion)
    got = match_clusters(confusion, by=by, many_to_one=True)
    for cluster, named in enumerate(got.tolist()):
        if confusion[:, cluster].any():
            assert score[named, cluster] == score[:, cluster].max()
        else:
            assert named == -1


def test_pixels_and_iou_may_name_differently():
    # By pixels the large class takes both clusters' best cell; by IoU the small one is found.
    confusion = torch.tensor([[50, 40], [0, 9]])
    assert match_clusters(confusion, many_to_one=True).tolist() == [0, 0]
    confusion = torch.tensor([[90, 12], [0, 10]])
    assert match_clusters(confusion, many_to_one=True).tolist() == [0, 0]
    assert match_clusters(confusion, by="iou", many_to_one=True).tolist() == [0, 1]


@given(confusions(), generators(), st.booleans())
def test_permuted_clusters_change_no_score(confusion, generator, many_to_one):
    order = torch.randperm(confusion.shape[1], generator=generator)
    scores = []
    for counts in (confusion, confusion[:, order]):
        clusters = match_clusters(counts, many_to_one=many_to_one)
        scores.append(confusion_scores(merge_clusters(counts, clusters)).pixel_accuracy)
    torch.testing.assert_close(*scores)  # of several best namings, the pixels are the same


@given(confusions())
def test_sharing_a_class_never_costs_a_right_pixel(confusion):
    one, many = (
        confusion_scores(merge_clusters(confusion, match_clusters(confusion, many_to_one=x)))
        for x in (False, True)
    )
    assert many.pixel_accuracy >= one.pixel_accuracy


@given(segmentations(), generators())
def test_clusters_that_are_the_classes_by_another_name_score_one(maps, generator):
    labels, names = maps[0], torch.randperm(7, generator=generator)
    confusion = confusion_matrix(labels, names[labels], classes=CLASSES, clusters=7)
    assert confusion.shape == (CLASSES, 7)
    for many_to_one in (False, True):
        clusters = match_clusters(confusion, many_to_one=many_to_one)
        got = confusion_scores(merge_clusters(confusion, clusters))
        assert got[:3] == ((1, 1, 1) if labels.numel() else (0, 0, 0))


@given(confusions(), st.data())
def test_merging_clusters_is_a_loop_and_keeps_the_sum_of_each_row(confusion, data):
    classes, clusters = confusion.shape
    # Also numbers that are no class.
    names = st.lists(st.integers(-2, classes + 1), min_size=clusters, max_size=clusters)
    assignment = torch.tensor(data.draw(names), dtype=torch.long)
    got = merge_clusters(confusion, assignment)
    want = torch.zeros(classes, classes + 1, dtype=torch.long)
    for cluster, name in enumerate(assignment.tolist()):
        want[:, name if 0 <= name < classes else classes] += confusion[:, cluster]
    assert torch.equal(got, want)
    assert torch.equal(got.sum(1), confusion.sum(1))
    images = torch.stack([confusion, 2 * confusion])
    assert torch.equal(merge_clusters(images, assignment), torch.stack([want, 2 * want]))


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_sums_of_counts_of_few_bits_do_not_overflow(dtype):
    large = torch.iinfo(dtype).max
    counts = torch.tensor([[large, large], [0, large]], dtype=dtype)
    together = merge_clusters(counts, torch.tensor([0, 0], dtype=dtype))
    assert together.tolist() == [[2 * large, 0, 0], [large, 0, 0]]
    wide, group = counts.long(), torch.tensor([True, True])
    for function in (confusion_scores, mean_iou, lambda x: group_scores(x, group)):
        torch.testing.assert_close([*function(counts[None])], [*function(wide[None])])
    assert match_clusters(counts).tolist() == match_clusters(wide).tolist()
    states = counts.expand(3, 2, 2)
    assert bootstrap(states, mean_iou, draws=3).value == mean_iou(3 * wide)


def test_the_sum_of_two_clusters_of_a_billion_pixels():
    counts = torch.tensor([[1_500_000_000, 1_500_000_000], [0, 0]], dtype=torch.int32)
    got = merge_clusters(counts, torch.tensor([0, 0], dtype=torch.int32))
    assert got.tolist() == [[3_000_000_000, 0, 0], [0, 0, 0]]


@given(segmentations(), generators())
def test_the_order_of_matching_and_renaming_the_predictions_is_the_same(maps, generator):
    labels, guesses = maps
    confusion = confusion_matrix(labels, guesses, classes=CLASSES)
    clusters = match_clusters(confusion)
    renamed = confusion_matrix(labels, clusters[guesses], classes=CLASSES)
    assert torch.equal(merge_clusters(confusion, clusters)[:, :CLASSES], renamed)


def test_without_scipy_one_to_one_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    confusion = torch.tensor([[1, 0], [0, 2]])
    with pytest.raises(
        ImportError, match=r"match_clusters: .* needs scipy; install it, or give many"
    ):
        match_clusters(confusion)
    assert match_clusters(confusion, many_to_one=True).tolist() == [0, 1]


def test_clusters_that_do_not_fit_are_refused():
    confusion = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(TypeError, match=r"merge_clusters: argument 'assignment'.*clusters=3"):
        merge_clusters(confusion, torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match="match_clusters: argument 'by'"):
        match_clusters(confusion, by="recall")
    with pytest.raises(ValueError, match="confusion_matrix: clusters is 0; give"):
        confusion_matrix(confusion, confusion, classes=2, clusters=0)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_no_class_or_no_cluster_is_no_name(shape):
    confusion = torch.zeros(shape, dtype=torch.long)
    for many_to_one in (False, True):
        got = match_clusters(confusion, many_to_one=many_to_one)
        assert got.tolist() == [-1] * shape[1]
        assert merge_clusters(confusion, got).shape == (shape[0], shape[0] + 1)


# ------------------------------------------------------------------------------------ groups


@given(segmentations(), generators())
def test_a_group_counts_pixels_whose_label_and_prediction_are_in_it(maps, generator):
    group = flips(generator, CLASSES)
    labels, guesses = (x.flatten() for x in maps)
    inside = group[labels] & group[guesses]
    want = confusion_scores(confusion_matrix(labels[inside], guesses[inside], classes=CLASSES))
    confusion = confusion_matrix(labels, guesses, classes=CLASSES)
    more = torch.nn.functional.pad(confusion, (0, 2), value=7)  # columns of no class
    for counts in (confusion, more):
        got = group_scores(counts, group)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert not got.valid[~group].any()


@given(segmentations())
def test_the_group_of_all_classes_is_all_classes(maps):
    confusion = confusion_matrix(*maps, classes=CLASSES)
    every, want = torch.ones(CLASSES).bool(), confusion_scores(confusion)
    got = group_scores(confusion, every)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="confusion_scores: there are 3 rows and 2 columns"):
        group_scores(torch.zeros(3, 2, dtype=torch.long), torch.ones(3).bool())
    with pytest.raises(TypeError, match=r"group_scores: argument 'group'.*classes=3"):
        group_scores(torch.zeros(3, 3, dtype=torch.long), torch.ones(2).bool())


# ---------------------------------------------------------------------------------- accuracy


@given(segmentations(-1, CLASSES + 1))
def test_accuracy_is_scikit_learns_of_the_rows_with_a_class(maps):
    labels, guesses = (x.flatten() for x in maps)
    got = accuracy(labels, guesses, classes=CLASSES)
    keep = (labels >= 0) & (labels < CLASSES)
    labels, guesses = labels[keep], guesses[keep]
    if not len(labels):
        assert got == (0, 0)
        return
    assert got.overall.item() == pytest.approx(accuracy_score(labels, guesses))
    recall = recall_score(labels, guesses, labels=labels.unique(), average="macro", zero_division=0)
    assert got.macro.item() == pytest.approx(recall)


def test_accuracy_of_labels_of_few_bits_and_more_rows_than_float32_counts():
    labels = torch.tensor([0, 200, 200, 255], dtype=torch.uint8)
    assert accuracy(labels, labels.long(), classes=201) == (1, 1)
    rows = torch.zeros(2**24 + 2**20, dtype=torch.uint8)
    guesses = rows.clone()
    guesses[: 2**20] = 1  # float32 would count none of those that come after 2 ** 24
    got = accuracy(rows, guesses, classes=1)
    assert got.overall.item() == pytest.approx(2**24 / len(rows), abs=1e-6)


def test_accuracy_refuses_what_makes_no_sense():
    labels = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"densekit.metrics.accuracy: classes is 0; give one"):
        accuracy(labels, labels, classes=0)
    with pytest.raises(TypeError, match=r"accuracy: argument 'predictions'.*n=3"):
        accuracy(labels, labels[:2], classes=1)


# ------------------------------------------------------------------------- average precision


@st.composite
def rankings(draw):
    """Scores of which many are equal, and targets; a class may have none."""
    n, generator = draw(st.integers(1, 12)), draw(generators())
    steps = draw(st.sampled_from([1, 3, 1000]))
    scores = torch.randint(0, steps, (n, 3), generator=generator) / steps
    return scores.double(), flips(generator, n, 3)


@given(rankings())
def test_average_precision_is_scikit_learns(case):
    scores, targets = case
    got = average_precision(scores, targets)
    for c in range(3):
        if targets[:, c].any():
            want = average_precision_score(targets[:, c], scores[:, c])
            assert got[c].item() == pytest.approx(want, abs=1e-6)
        else:
            assert got[c] == 0


def slow_points(scores, targets, points):
    """The mean over recalls r of the best precision at a recall of r or more."""
    curve = []
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = targets[scores >= threshold]
        curve.append((int(found.sum()) / int(targets.sum()), found.double().mean().item()))
    # Recalls are shares of whole numbers: compare those, not rounded floats.
    total = int(targets.sum())
    best = []
    for i in range(points):
        reached = [p for r, p in curve if round(r * total) * (points - 1) >= i * total]
        best.append(max(reached))
    return sum(best) / points


@given(rankings(), st.sampled_from([2, 11, 101]))
def test_precision_at_points_is_that_of_a_loop(case, points):
    scores, targets = case
    got = average_precision(scores, targets, points=points)
    for c in range(3):
        want = slow_points(scores[:, c], targets[:, c], points) if targets[:, c].any() else 0
        assert got[c].item() == pytest.approx(want, abs=1e-6)


@given(rankings(), generators(), st.sampled_from([None, 11]))
def test_only_the_order_of_the_scores_counts(case, generator, points):
    scores, targets = case
    want = average_precision(scores, targets, points=points)
    order = torch.randperm(len(scores), generator=generator)
    for x, y in ((scores.exp() * 5 - 9, targets), (scores[order], targets[order])):
        torch.testing.assert_close(average_precision(x, y, points=points), want)


@given(rankings(), st.sampled_from([None, 2, 11]), st.data())
def test_a_score_that_is_nan_leaves_its_image_out_of_its_class_only(case, points, data):
    scores, targets = case
    lost = flips(data.draw(generators()), len(scores))
    spoiled = scores.clone()
    spoiled[lost, 0] = torch.nan
    got = average_precision(spoiled, targets, points=points)
    want = average_precision(scores[~lost], targets[~lost], points=points)
    assert got[0] == want[0]
    assert torch.equal(got[1:], average_precision(scores, targets, points=points)[1:])
    sure = scores.clone()  # the order of infinite scores counts
    sure[:, 1] = torch.where(scores[:, 1] == scores[:, 1].max(), torch.inf, sure[:, 1])
    assert torch.equal(average_precision(sure, targets, points=points)[1:], got[1:])


@given(rankings(), st.sampled_from([None, 2, 11]))
def test_a_perfect_ranking_has_precision_one(case, points):
    scores, targets = case
    got = average_precision(scores + 2 * targets, targets, points=points)
    torch.testing.assert_close(got, targets.any(0).float())


def test_the_eleven_points_of_a_ranking_worked_out_by_hand():
    scores, targets = torch.tensor([[4.0], [3.0], [2.0], [1.0]]), torch.tensor([[1], [0], [1], [0]])
    # Precision 1 up to recall 1/2 (points 0 to 0.5), 2/3 beyond.
    want = (6 * 1 + 5 * 2 / 3) / 11
    got = average_precision(scores, targets.bool(), points=11)
    assert got.item() == pytest.approx(want)
    assert average_precision(scores, targets.bool()).item() == pytest.approx((1 + 2 / 3) / 2)


def test_average_precision_of_nothing_is_zero_and_refuses_what_makes_no_sense():
    empty = average_precision(torch.zeros(0, 3), torch.zeros(0, 3).bool())
    assert empty.tolist() == [0, 0, 0]
    for points in (1, 0, -3):
        with pytest.raises(ValueError, match=f"average_precision: points is {points}; give 2 or"):
            average_precision(torch.zeros(2, 1), torch.zeros(2, 1).bool(), points=points)
    with pytest.raises(TypeError, match=r"average_precision: argument 'targets'.*classes=3"):
        average_precision(torch.zeros(2, 3), torch.zeros(2, 4).bool())


# --------------------------------------------------------------------------------- bootstrap


def means(sums):
    """The mean of numbers that come with a count."""
    return sums[..., 0] / sums[..., 1]


def counted(values):
    return torch.stack([values, torch.ones_like(values)], -1)


@given(generators(), st.integers(1, 8), st.integers(1, 30), st.floats(0.1, 0.99))
def test_an_interval_holds_what_its_draws_give(generator, n, draws, level):
    states = torch.randint(0, 9, (n, 3, 3), generator=generator)
    state = generator.get_state()
    got = bootstrap(states, mean_iou, draws=draws, level=level, generator=generator)
    # The same draws by hand, with scipy's and numpy's idea of a percentile.
    rows = torch.randint(n, (draws, n), generator=generator.set_state(state))
    figures = np.array([mean_iou(states[row].sum(0)).item() for row in rows])
    edges = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    want = mean_iou(states.sum(0)).item(), *edges, figures.std()
    assert [x.item() for x in got] == pytest.approx(want, abs=1e-5)
    assert figures.min() - 1e-6 <= got.low <= got.high <= figures.max() + 1e-6


def test_the_deviation_of_a_mean_is_the_standard_error_and_the_interval_is_as_wide():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator, dtype=torch.float64)
    got = bootstrap(counted(values), means, draws=4000, generator=generator)
    error = values.std(correction=0).item() / 20
    assert got.value.item() == pytest.approx(values.mean().item())
    assert got.deviation.item() == pytest.approx(error, rel=0.1)
    assert (got.high - got.value).item() == pytest.approx(1.96 * error, rel=0.15)
    assert (got.value - got.low).item() == pytest.approx(1.96 * error, rel=0.15)
    narrow = bootstrap(counted(values), means, draws=4000, level=0.5, generator=generator)
    assert (narrow.high - narrow.low).item() == pytest.approx(2 * 0.6745 * error, rel=0.15)


def test_an_interval_of_95_percent_holds_the_true_mean_in_about_95_percent_of_the_sets():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(300):
        values = torch.rand(60, generator=generator, dtype=torch.float64)
        got = bootstrap(counted(values), means, draws=200, generator=generator)
        held += bool(got.low <= 0.5 <= got.high)
    assert 0.90 <= held / 300 <= 0.98


@given(generators(), st.integers(1, 8))
def test_images_alike_have_an_interval_of_no_width(generator, n):
    states = torch.randint(1, 9, (1, 3, 3), generator=generator).expand(n, 3, 3)
    got = bootstrap(states, mean_iou, draws=9)
    torch.testing.assert_close(torch.stack(got[1:3]), got.value.expand(2))
    assert got.deviation.item() == pytest.approx(0, abs=1e-6)


@given(generators(), st.integers(1, 8), st.integers(0, 99))
def test_the_order_of_the_images_does_not_move_the_value_and_a_seed_fixes_the_interval(
    generator, n, seed
):
    states = torch.randint(0, 9, (n, 3, 3), generator=generator)

    def drawn(states):
        source = torch.Generator().manual_seed(seed)
        return bootstrap(states, mean_iou, draws=9, generator=source)

    got = drawn(states)
    assert drawn(states) == got
    assert drawn(states[torch.randperm(n, generator=generator)]).value == got.value
    assert 0 <= got.low <= got.high <= 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.long, torch.double])
def test_states_of_any_dtype_are_summed_as_numbers(dtype):
    # Sums of one bit, and of one byte, do not fit it.
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(600, generator=generator) < 0.7

    def interval(states):
        source = torch.Generator().manual_seed(1)
        return bootstrap(states, lambda sums: sums / 600, draws=50, generator=source)

    got, want = interval(values.to(dtype)), interval(values.double())
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, check_dtype=False)
    assert got.deviation > 0


def test_an_interval_of_many_figures_is_that_of_each():
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(0, 9, (7, 3, 3), generator=generator)

    def drawn(statistic):
        source = torch.Generator().manual_seed(1)
        return bootstrap(states, statistic, draws=20, generator=source)

    every = drawn(lambda sums: confusion_scores(sums).iou)
    assert every.low.shape == (3,)
    for c in range(3):
        one = drawn(lambda sums, c=c: confusion_scores(sums).iou[..., c])
        torch.testing.assert_close([x[c] for x in every], [*one])


@pytest.mark.parametrize(
    ("n", "options", "found"),
    [
        (0, {}, "the number of images is 0"),
        (3, {"draws": 0}, "draws is 0"),
        (3, {"level": 0.0}, "level is 0.0"),
        (3, {"level": 1.0}, "level is 1.0"),
        (3, {"level": 95}, "level is 95"),
    ],
)
def test_a_bootstrap_that_makes_no_sense_is_refused(n, options, found):
    with pytest.raises(ValueError, match=rf"densekit.metrics.bootstrap: {found}; give"):
        bootstrap(torch.zeros(n, 2, 2).long(), mean_iou, **options)


@given(generators())
def test_an_image_without_numbers_adds_nothing_to_any_draw(generator):
    states = torch.rand(6, 2, generator=generator)
    states[2] = torch.tensor([torch.nan, torch.inf])
    source = torch.Generator().manual_seed(1)
    got = bootstrap(states, lambda sums: sums, draws=9, generator=source)
    zeros = torch.where(states.isfinite(), states, 0.0)
    want = bootstrap(zeros, lambda sums: sums, draws=9, generator=source.manual_seed(1))
    torch.testing.assert_close([*got], [*want])


def test_states_in_half_precision_are_summed_in_float32():
    got = bootstrap(torch.full((100, 1), 6e4).half(), lambda sums: sums, draws=3)
    assert got.value.item() == pytest.approx(6e6, rel=1e-3)


def test_memory_does_not_grow_with_the_draws_or_the_points(monkeypatch):
    monkeypatch.setattr(numerics, "BLOCK", 2**12)
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(0, 9, (20, 40, 40), generator=generator)

    def interval():
        return bootstrap(states, mean_iou, draws=200, generator=torch.Generator().manual_seed(1))

    assert largest(interval) <= 8 * states.numel()
    blocks = interval()
    monkeypatch.setattr(numerics, "BLOCK", 2**20)
    assert all(torch.equal(x, y) for x, y in zip(blocks, interval(), strict=True))
    monkeypatch.setattr(numerics, "BLOCK", 2**12)
    scores, targets = torch.rand(1000, 20, generator=generator), flips(generator, 1000, 20)
    for points in (None, 101):
        used = largest(lambda points=points: average_precision(scores, targets, points=points))
        assert used <= 8 * 2**12


# ----------------------------------------------------------------------------- dicts and tables


def test_results_are_plain_numbers_that_json_keeps():
    scores = confusion_scores(torch.tensor([[3, 0], [0, 1]]))
    interval = bootstrap(torch.tensor([[[3, 0], [0, 1]]]), mean_iou, draws=2)
    results = {"seg": scores, "knn": [Accuracy(torch.tensor(0.5), torch.tensor(0.25))], "n": 3}
    got = as_dict(results | {"miou": interval, "note": None})
    assert json.loads(json.dumps(got)) == got
    assert got["seg"]["iou"] == [1.0, 1.0]
    assert got["seg"]["valid"] == [True, True]
    assert got["knn"] == [{"overall": 0.5, "macro": 0.25}]
    assert got["miou"] == {"value": 1.0, "low": 1.0, "high": 1.0, "deviation": 0.0}
    assert (got["n"], got["note"]) == (3, None)
    assert results["seg"] is scores  # nothing is changed in place


def test_a_table_has_a_column_for_each_number_and_gaps_where_there_is_none():
    rows = {
        "a|b": {"knn": Accuracy(torch.tensor(0.5), torch.tensor(0.25)), "images": 12},
        "two": {"seg": SegmentationScore(torch.tensor(1 / 3), torch.tensor(0.0)), "how": "x|y"},
        "three": ConfusionScores(*(torch.ones(()) for _ in range(3)), torch.ones(2), torch.ones(2)),
    }
    lines = as_table(rows, digits=2).splitlines()
    # An escaped bar does not end a cell.
    cells = [line.replace("\\|", "/").strip("|").split("|") for line in lines]
    assert len(lines) == 5
    assert len({len(row) for row in cells}) == 1  # a table, not a heap
    head, rule, *body = [[x.strip() for x in row] for row in cells]
    assert set(rule) == {"---"}
    want = ["", "knn.overall", "knn.macro", "images", "seg.miou", "seg.prior_miou", "how"]
    assert head == [*want, "miou", "pixel_accuracy", "mean_accuracy"]  # no iou: one for each class
    assert body[0] == ["a/b", "0.50", "0.25", "12", "", "", "", "", "", ""]
    assert body[1] == ["two", "", "", "", "0.33", "0.00", "x/y", "", "", ""]
    assert body[2] == ["three", *[""] * 6, "1.00", "1.00", "1.00"]


def test_bars_and_breaks_in_names_of_columns_and_rows_stay_in_their_cells():
    lines = as_table({"a|b\nc": {"x|y": 1, "z\n": "u\nv"}}).splitlines()
    assert lines == ["| | x\\|y | z  |", "|---|---|---|", "| a\\|b c | 1 | u v |"]


def test_a_table_of_nothing_is_a_head():
    assert as_table({}).splitlines() == ["| |", "|---|"]


def test_a_statistic_may_count_and_has_one_row_for_each_draw():
    states = torch.tensor([[3, 0], [0, 1]])
    assert bootstrap(states, lambda sums: sums.argmax(-1), draws=9).value == 0
    wanted = "the shape of what the statistic returns is .*; give figures of 9 sums"
    for statistic in (torch.sum, lambda sums: sums.sum(0)):
        with pytest.raises(ValueError, match=wanted):
            bootstrap(states, statistic, draws=9)


@pytest.mark.parametrize("statistic", [lambda sums: 1.0, lambda sums: None, confusion_scores])
def test_a_statistic_that_returns_no_tensor_is_refused(statistic):
    with pytest.raises(
        ValueError, match=r"bootstrap: what the statistic returns is .*give a tensor"
    ):
        bootstrap(torch.ones(3, 2, 2).long(), statistic)
