"""The protocols of evaluation against scikit-learn, SciPy and plain loops."""

import json
from dataclasses import replace
from types import SimpleNamespace

import evaluate
import harness
import numpy as np
import pytest
import torch
from downstream import diagnose, protocols, video
from downstream.protocols import FITTED, Features
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC
from torch import nn
import densekit as dk

CONFIG = evaluate.Config(("random:tiny",), draws=9, neighbors=5, epochs=40)


def drawn(number, images=12, classes=7, d=6, h=3, w=4, objects=40):
    """Random features of a split."""
    draws = harness.generator(number)
    labels = torch.randint(classes, (images, 2 * h, 2 * w), generator=draws)
    maps = torch.randn(images, d, h, w, generator=draws)
    return Features(
        maps=maps,
        pooled=[maps.mean((-2, -1))],
        labels=list(labels.byte()),
        area=torch.rand(images, classes, generator=draws),
        presence=torch.ones(images, classes, dtype=torch.int8),
        objects=torch.randn(objects, d, generator=draws),
        object_classes=torch.randint(classes, (objects,), generator=draws),
        object_images=torch.randint(images, (objects,), generator=draws),
        classes=[str(x) for x in range(classes)],
        vectors=[torch.randn(images, d, generator=draws)],
    )


# ---- objects and images --------------------------------------------------------------------------


def test_objects_are_named_as_scikit_learn_names_them():
    fit, test = drawn(0), drawn(1)
    found = FITTED["object-knn"].score(fit, test, CONFIG, 0)
    oracle = KNeighborsClassifier(
        5, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(fit.objects.numpy(), fit.object_classes.numpy())
    shares = oracle.predict_proba(test.objects.numpy())
    labels = test.object_classes.numpy()
    best = shares.argsort(1)[:, ::-1][:, :5]
    voted = np.take_along_axis(shares, best, 1) > 0
    right = (best == labels[:, None]) & voted
    assert found["overall"].value == pytest.approx(right[:, 0].mean())
    assert found["top5"].value == pytest.approx(right.any(1).mean())
    of_classes = [right[labels == x, 0].mean() for x in np.unique(labels)]
    assert found["macro"].value == pytest.approx(np.mean(of_classes))
    assert found["rows"] == 40


def test_the_background_is_no_class_of_an_image():
    fit, test = [x._replace(background=0) for x in (drawn(0), drawn(1))]
    for split in (fit, test):
        split.area[:, 0] = 9.0  # it covers most of each image
    test.area[3, 1:] = 0
    want = test.area[:, 1:].argmax(1) + 1
    want[3] = -1
    assert torch.equal(protocols.main_class(test), want)
    assert FITTED["image-knn"].score(fit, test, CONFIG, 0)["rows"] == 11
    config = replace(CONFIG, cost=1.0)
    assert FITTED["image-svm"].score(fit, test, config, 0)["classes"] == 6


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 30))
def test_images_in_which_nothing_is_counted_move_no_interval(number, counted, empty):
    test = drawn(number, images=counted, objects=2 * counted)
    more = test._replace(labels=[*test.labels, *[None] * empty])
    ranked = test.object_classes[:, None].expand(-1, 5).clone()
    ranked[::2] -= 1  # every other object is named wrongly
    rows = (test.object_classes, ranked, test.object_images)
    found = protocols.classification_figures(*rows, test, CONFIG)
    assert protocols.classification_figures(*rows, more, CONFIG) == found

    draws = harness.generator(number)
    states = torch.rand(counted, 5, generator=draws).double()
    states[:, 4] = 1  # an object that both views contain
    views_without = torch.cat([states, torch.zeros(empty, 5)])
    found = diagnose.patch_figures(states, CONFIG)
    assert diagnose.patch_figures(views_without, CONFIG) == found
    objects_without = views_without.clone()
    objects_without[counted:, :3] = 0.5
    assert diagnose.patch_figures(objects_without, CONFIG)["diagonal"] == found["diagonal"]

    nothing = torch.zeros(3, 5)
    assert "diagonal" not in diagnose.patch_figures(nothing, CONFIG)
    assert diagnose.patch_figures(nothing, CONFIG)["found"].high == 0


@pytest.mark.parametrize(("number", "split"), [(0, "to fit on"), (1, "to score")])
def test_a_split_without_an_object_is_a_sentence(number, split):
    splits = [drawn(0), drawn(1)]
    nothing = torch.zeros(0, dtype=torch.long)
    splits[number] = splits[number]._replace(
        objects=torch.zeros(0, 1), object_classes=nothing, object_images=nothing
    )
    for protocol in ("object-knn", "disturbed-object-knn"):
        with pytest.raises(harness.UserError, match=f"The split {split} has no object: give"):
            FITTED[protocol].score(*splits, CONFIG, 0)


# ---- support vector machines ---------------------------------------------------------------------


def unsure(number, n=60, classes=3, d=5):
    draws = harness.generator(number)
    rows = torch.randn(n, d, generator=draws)
    rule = torch.randn(d, classes, generator=draws)
    noise = torch.randn(n, classes, generator=draws)
    presence = (rows @ rule + noise > 0.5).to(torch.int8)
    presence[torch.rand(n, classes, generator=draws) < 0.1] = -1
    return rows, presence


def scores_of_liblinear(rows, presence, queries, cost):
    sure = (presence >= 0).numpy()
    weights = {0: 1.0, 1: protocols.POSITIVE}
    svm = LinearSVC(C=cost, class_weight=weights, dual=False, tol=1e-10, max_iter=100_000)
    return svm.fit(rows.numpy()[sure], presence.numpy()[sure]).decision_function(queries.numpy())


def test_svms_are_those_of_liblinear():
    rows, presence = unsure(0)
    costs = [0.1, 10.0, 0.1]
    found = protocols.svm_scores(rows, presence, rows, costs)
    for k, cost in enumerate(costs):
        want = scores_of_liblinear(rows, presence[:, k], rows, cost)
        torch.testing.assert_close(found[:, k].double().numpy(), want, atol=1e-4, rtol=1e-4)


def test_the_cost_of_a_class_is_the_best_of_a_cross_validation():
    rows, presence = unsure(1)
    order = torch.randperm(60, generator=harness.generator(4))
    folds = order.tensor_split(3)
    for k, cost in enumerate(protocols.choose_costs(rows, presence, 4)):
        means = {}
        for tried in protocols.COSTS:
            precision = []
            for held_out in folds:
                kept = torch.tensor([x for x in range(60) if x not in held_out.tolist()])
                scores = scores_of_liblinear(rows[kept], presence[kept, k], rows[held_out], tried)
                truth = presence[held_out, k].numpy()
                precision.append(average_precision_score(truth[truth >= 0], scores[truth >= 0]))
            means[tried] = np.mean(precision)
        assert means[cost] == pytest.approx(max(means.values()), abs=1e-4)


def test_maps_become_vectors_of_about_9000_numbers():
    # conv1 to C5 of a ResNet-50 at 224 pixels, as in Goyal et al. 2019.
    shapes = {64: 112, 256: 56, 512: 28, 1024: 14, 2048: 7}
    for (channels, side), want in zip(shapes.items(), (9216, 9216, 8192, 9216, 8192), strict=True):
        assert evaluate.pool_to_vector(torch.zeros(1, channels, side, side)).shape == (1, want)
    maps = torch.arange(16.0).view(1, 1, 4, 4)  # fewer cells than bins
    assert evaluate.pool_to_vector(maps).tolist() == [list(range(16))]


# ---- segmentation --------------------------------------------------------------------------------


def test_k_means_moves_to_the_means_of_all_cells():
    test = drawn(2, images=40)
    centers = protocols.cluster_cells(test.maps.half(), 5, seed=0)
    cells = protocols.cells_of(test.maps.half()).float()
    for _ in range(200):  # to a fixed point
        nearest = torch.cdist(cells, centers).argmin(1)
        centers = torch.stack([cells[nearest == x].mean(0) for x in range(5)])
    start = protocols.cluster_cells(test.maps.half(), 5, seed=0)
    found, want = [torch.cdist(cells, x).amin(1).square().sum() for x in (start, centers)]
    assert found <= 1.02 * want  # 20 iterations end a little above the fixed point


def test_more_clusters_than_classes_get_the_commonest_class():
    test = drawn(3, classes=3)
    config = SimpleNamespace(clusters=8, draws=9)
    counts = protocols.kmeans_counts(test, test, config, 0)
    centers = protocols.cluster_cells(test.maps, 8, seed=0)
    nearest = torch.cdist(protocols.cells_of(test.maps), centers).argmin(1)
    scores = nn.functional.one_hot(nearest, 8).view(12, 3, 4, 8).movedim(-1, 1).float()
    guess = nn.functional.interpolate(scores, (6, 8), mode="bilinear").argmax(1)
    labels = torch.stack(test.labels).long()
    names = torch.tensor([(labels[guess == x]).bincount(minlength=3).argmax() for x in range(8)])
    assert counts.sum(0).diagonal().sum() == (names[guess] == labels).sum()


def test_cells_are_looked_up_in_all_labeled_cells():
    fit, test = drawn(4, classes=3), drawn(5, classes=3)
    fit.labels[2] = None
    counts = protocols.retrieval_counts(fit, test, CONFIG, 0)
    gallery, names = [], []
    for number in (x for x in range(12) if x != 2):
        for i in range(3):
            for j in range(4):
                gallery.append(fit.maps[number, :, i, j].numpy())
                names.append(int(fit.labels[number][2 * i + 1, 2 * j + 1]))
    oracle = KNeighborsClassifier(
        5, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(np.stack(gallery), names)
    shares = oracle.predict_proba(protocols.cells_of(test.maps).numpy())
    scores = torch.from_numpy(shares).view(12, 3, 4, 3).movedim(-1, 1).float()
    assert torch.equal(counts, dk.segmentation_counts(scores, torch.stack(test.labels)))


def test_things_and_stuff_are_the_two_groups_of_the_27_classes():
    folder = harness.Path(harness.__file__).parent
    names = ("coco_stuff_27", "coco_things_12", "coco_stuff_15")
    both, things, stuff = [json.loads((folder / f"{x}.json").read_text()) for x in names]
    assert things["names"] + stuff["names"] == both["names"]
    assert (len(things["names"]), len(stuff["names"])) == (12, 15)
    shifted = {key: value + 12 for key, value in stuff["map"].items()}
    assert {**things["map"], **shifted} == both["map"]


# ---- videos --------------------------------------------------------------------------------------


def dinos_labels(maps, first, context=7, radius=12, k=5, temperature=0.1):
    """Labels carried through a video, cell by cell."""
    t, _, h, w = maps.shape
    maps = maps / np.linalg.norm(maps, axis=1, keepdims=True)
    labels = [first]
    for now in range(1, t):
        used = [0, *range(max(1, now - context), now)]
        shares = np.zeros_like(first)
        for i in range(h):
            for j in range(w):
                known = []
                for frame in used:
                    for y in range(max(0, i - radius), min(h, i + radius + 1)):
                        for x in range(max(0, j - radius), min(w, j + radius + 1)):
                            cosine = maps[now, :, i, j] @ maps[frame, :, y, x]
                            known.append((cosine, labels[frame][:, y, x]))
                known.sort(key=lambda item: -item[0])
                weights = np.exp(np.array([x[0] for x in known[:k]]) / temperature)
                votes = np.stack([x[1] for x in known[:k]])
                shares[:, i, j] = (weights[:, None] * votes).sum(0) / weights.sum()
        labels.append(shares)
    return np.stack(labels)


def test_labels_are_carried_as_dino_carries_them(tmp_path):
    generator = np.random.default_rng(0)
    masks = []
    for number in range(10):
        mask = generator.integers(0, 3, (12, 14)).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / f"{number}.png")
        masks.append(tmp_path / f"{number}.png")
    item = video.Video("one", [], masks)
    maps = generator.standard_normal((10, 4, 3, 14))
    first, objects = video.read_first_mask(item)
    start = video.labels_of_cells(first, objects, torch.from_numpy(maps))
    # The label of the pixel at the middle of each cell.
    middles = first.numpy()[[2, 6, 10]]
    assert np.array_equal(start.numpy(), np.stack([middles == x for x in range(3)]))

    got = dk.propagate_video(torch.from_numpy(maps), start.double())
    want = dinos_labels(maps, start.double().numpy())
    torch.testing.assert_close(got.numpy(), want)

    for path, share in zip(masks[1:-1], want[1:-1], strict=True):
        big = nn.functional.interpolate(torch.from_numpy(share)[None], (12, 14), mode="bilinear")
        scaled = [(x - x.min()) / (x.max() - x.min()) for x in big[0].numpy()]
        predicted = np.stack(scaled).argmax(0)
        one = video.Video("one", [], [path, path, path])
        scores = video.score_frames(one, torch.from_numpy(share).expand(3, -1, -1, -1), objects)
        true = np.asarray(Image.open(path))
        for place, name in enumerate(objects):
            both = ((predicted == name) & (true == name)).sum()
            either = ((predicted == name) | (true == name)).sum()
            assert float(scores[0, 0, place]) == pytest.approx(both / either)


# ---- diagnostics ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), max_size=30))
def test_a_neighbor_is_of_another_class(classes):
    numbers = torch.tensor(classes, dtype=torch.long)
    own, others = diagnose.pair_classes(numbers)
    assert (numbers[own] != numbers[others]).all()
    assert len(own.unique()) == len(own)
    assert sorted(own.tolist()) == sorted(others.tolist())
    most = max((classes.count(x) for x in set(classes)), default=0)
    assert len(own) == min(len(classes), 2 * (len(classes) - most))  # as many as can be


@given(st.integers(0, 10**6))
def test_cells_that_know_their_place_are_found(seed):
    draws = harness.generator(seed)
    pair = dk.sample_view_pairs((60, 80), (3,), min_overlap=0.1, generator=draws)
    maps = []
    for view in (pair.view1, pair.view2):
        places = dk.coordinate_map(view, (7, 7)).movedim(-1, 1) / 80
        maps.append(torch.cat([places, (1.5 - places.square().sum(1, keepdim=True)).sqrt()], 1))
    found, chance, count = diagnose.match_cells(*maps, pair.view1, pair.view2).T
    assert torch.equal(found, count)  # on a sphere the nearest place has the largest cosine
    assert (chance < count).all()
    blind = diagnose.match_cells(maps[0], maps[1] * 0 + 1, pair.view1, pair.view2)
    assert (blind[:, 0] < count).any()


def test_the_bins_of_a_box_have_the_order_of_the_image():
    image = torch.rand(1, 3, 40, 40)
    flips = torch.tensor([False, True])
    box = torch.tensor([[4.0, 4.0, 36.0, 36.0]])
    rows = []
    for flip in flips:
        view = dk.View(torch.tensor([[0.0, 0.0, 40.0, 40.0]]), flip[None])
        maps = dk.crop_views(image, view, 40)
        seen = dk.boxes_in_view(view, box[None])
        rows.append(diagnose.pool_bins(maps, seen.boxes[:, 0], view))
    torch.testing.assert_close(*rows)


def test_retrieved_images_are_the_four_nearest(tmp_path):
    test = drawn(6)._replace(background=0)
    encoder = SimpleNamespace(name="random")
    found = diagnose.retrieval(encoder, lambda i: torch.zeros(3, 8, 8), test, CONFIG, tmp_path)
    flat = test.maps.flatten(1)
    cosine = nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    cosine.fill_diagonal_(-2)
    classes = test.area[:, 1:].argmax(1)
    same = classes[cosine.topk(4).indices] == classes[:, None]
    assert found["same main class"].value == pytest.approx(same.float().mean().item())
    assert found["queries"] == 12


@given(st.integers(1, 9), st.tuples(*[st.integers(1, 6)] * 2), st.booleans(), st.integers(0, 999))
def test_classes_without_a_vote_in_an_image_change_no_count(k, size, has_negative, seed):
    generator = torch.Generator().manual_seed(seed)
    voted = torch.rand(k, 1, 1, generator=generator) < 0.4
    # Random votes have no ties, which rounding would decide.
    scores = torch.rand(k, *size, generator=generator, dtype=torch.float64) * voted
    if has_negative:
        scores = scores - 0.5
    labels = torch.randint(-1, 5, (13, 17), generator=generator)
    expected = dk.segmentation_counts(scores[None], labels[None], classes=5)
    assert torch.equal(protocols.count_confusion(scores, labels, 5), expected)
