"""The scores that a paper printed: equal to its program's, and not the right ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from downstream.published import row_permuted_group_scores
from densekit import (
    confusion_matrix,
    confusion_scores,
    group_scores,
    match_clusters,
    merge_clusters,
)

DATA = Path(__file__).parents[1] / "data"
CLASSES = 4


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


def test_the_scores_of_things_and_stuff_as_they_are_published():
    file, confusion, things = golden()
    clusters = match_clusters(confusion)
    for group, name in ((things, "th"), (~things, "st")):
        got = row_permuted_group_scores(confusion, clusters, group)
        percent(got.miou, file, f"official_mIoU_{name}")
        percent(got.pixel_accuracy, file, f"official_aAcc_{name}")
        percent(got.mean_accuracy, file, f"official_mAcc_{name}")
        right = group_scores(merge_clusters(confusion, clusters), group)
        assert abs(right.miou - got.miou) > 5e-3  # they are not the right ones


def test_the_group_of_all_classes_is_all_classes():
    generator = torch.Generator().manual_seed(0)
    confusion = torch.randint(9, (CLASSES, CLASSES), generator=generator)
    every, want = torch.ones(CLASSES).bool(), confusion_scores(confusion)
    names = torch.arange(CLASSES)
    got = row_permuted_group_scores(confusion, names, every)  # nothing is moved
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_permuted_scores_of_what_does_not_fit_are_refused():
    confusion = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(TypeError, match="row_permuted_group_scores: argument 'confusion'"):
        row_permuted_group_scores(confusion, torch.zeros(2).long(), torch.ones(2).bool())


def test_where_labels_and_clusters_are_exchanged_the_wrong_class_scores_one():
    confusion, clusters = torch.tensor([[1, 8], [9, 2]]), torch.tensor([1, 0])
    wrong = row_permuted_group_scores(confusion, clusters, torch.tensor([True, False]))
    assert wrong.pixel_accuracy == 1
