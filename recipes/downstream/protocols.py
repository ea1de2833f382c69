"""The protocols of evaluate.py: features of two splits in, figures with their intervals out.

This module is no command. Each protocol is a function of the features of the split to fit on, the
features of the split to score, the configuration and a seed. `FITTED` has them by name.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor
from torch.nn import functional as F
import densekit as dk

GALLERY = 100_000  # cells at most, of retrieval-seg
MOST = 2**30  # numbers in one tensor of kmeans-seg: 4 GB of class scores, 8 GB of counts
CELLS = 2**13  # that are looked up at a time
ITERATIONS = 20  # of k-means on all cells
COSTS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)  # C of the SVM, to choose from
FOLDS = 3  # of the cross-validation
POSITIVE = 2.0  # weight of an image with the class in the SVM, as in Goyal et al. 2019
BEST = 5  # classes that a row may be named by, for the top-5 accuracy


class Features(NamedTuple):
    """The features of a split, in the order of its images. What no protocol needs is empty.

    What is half precision has been checked: every number of it is finite.
    """

    maps: Tensor  # of one level, (n, d, h, w)
    pooled: list[Tensor]  # the mean over the map of each level, (n, d)
    labels: Sequence[Tensor | None]  # class maps at their own size; what is no class is ignored
    area: Tensor  # (n, classes): the share of each class in the image
    presence: Tensor  # int8 (n, classes): 1 of the image, 0 not, -1 unsure
    objects: Tensor  # (m, d): RoIAlign of one level, averaged
    object_classes: Tensor
    object_images: Tensor  # the number of the image that each object is in
    classes: list[str]
    vectors: Sequence[Tensor] = ()  # each level, pooled to about 9,000 numbers, (n, d)
    background: int | None = None  # the class that stands for no object


Counts = Callable[[Features, Features, Any, int], Tensor]  # a confusion matrix for each image


# ---- intervals -----------------------------------------------------------------------------------
def interval_over_images(
    states: Tensor, figures_of: Callable[[Tensor], Tensor], draws: int
) -> dk.Interval:
    """The figures of a split, and their interval by a bootstrap over its images.

    An image in which nothing is counted does not count: where many are like that, some resamplings
    would hold nothing at all, and the interval would reach down to 0.
    """
    is_counted = states.flatten(1).any(1)
    if is_counted.any():
        states = states[is_counted]
    return dk.bootstrap(states, figures_of, draws=draws, generator=harness.generator(2))


def split_interval(interval: dk.Interval, names: tuple[str, ...]) -> dict[str, dk.Interval]:
    """The interval of several figures as an interval for each."""
    return {name: dk.Interval(*(x[i] for x in interval)) for i, name in enumerate(names)}


# ---- segmentation --------------------------------------------------------------------------------
def resize_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """A class map (h, w) at another size, by the nearest pixel, in the same dtype."""
    rows, columns = [
        ((2 * torch.arange(new) + 1) * old) // (2 * new)
        for old, new in zip(labels.shape, size, strict=True)
    ]
    return labels[rows[:, None], columns]


def small_labels(features: Features, cells: int) -> Tensor:
    """Class maps of one size to fit on: `cells` x `cells` labels for each cell of the features.

    They are int16, and -1 is no class.
    """
    size = [side * cells for side in features.maps.shape[-2:]]
    small = torch.empty(len(features.labels), *size, dtype=torch.int16)
    for number, labels in enumerate(features.labels):
        small[number] = resize_to_cells(labels, size, len(features.classes))
    harness.check(
        bool((small >= 0).any()),
        "The split to fit on has no labeled pixel: give another --fit, or leave the protocol out.",
    )
    return small


def resize_to_cells(labels: Tensor | None, size: Sequence[int], classes: int) -> Tensor:
    """A class map at another size, int16; -1 is no class, everywhere where there is no map."""
    if labels is None:
        return torch.full(tuple(size), -1, dtype=torch.int16)
    resized = resize_labels(labels, size)
    is_class = (resized >= 0) & (resized < classes)
    return torch.where(is_class, resized.to(torch.int16), -1)


def cells_of(maps: Tensor) -> Tensor:
    """All cells of maps (n, d, h, w) as rows (n h w, d)."""
    return dk.map_to_rows(maps).flatten(0, 1)


def blocks_of_images(maps: Tensor) -> Iterable[range]:
    """The numbers of the images, in blocks of at most some thousand cells."""
    cells = max(1, maps.shape[-2] * maps.shape[-1])
    at_once = max(1, CELLS // cells)
    for first in range(0, len(maps), at_once):
        yield range(first, min(first + at_once, len(maps)))


def count_confusions(class_scores: Callable[[Tensor], Tensor], test: Features) -> Tensor:
    """A confusion matrix of each image that has a label map.

    `class_scores` gives the scores (n, classes or clusters, h, w) of the maps of some images.
    """
    counts = []
    for numbers in blocks_of_images(test.maps):
        scores = class_scores(test.maps[numbers.start : numbers.stop].float())
        for number, own_scores in zip(numbers, scores, strict=True):
            labels = test.labels[number]
            if labels is None:
                continue
            labels = labels.to(scores.device)
            counts.append(count_confusion(own_scores, labels, len(test.classes)).cpu())
    if not counts:
        raise harness.UserError("No image of the split has a label map: choose another protocol.")
    return torch.cat(counts)


def count_confusion(scores: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The confusion matrix (1, classes, k) of an image with the scores (k, h, w).

    Of votes and clusters most have no cell in an image. Where no score is below 0 these cannot win
    a pixel from those that have one, so they are not resized to it. (Where no class has a vote, the
    first one wins.)
    """
    kept = (scores != 0).flatten(1).any(1) | (scores < 0).any()
    kept[0] = True
    counts = labels.new_zeros(1, classes, len(scores), dtype=torch.long)
    counts[..., kept] = dk.segmentation_counts(scores[kept][None], labels[None], classes=classes)
    return counts


def segmentation_figures(counts: Tensor, test: Features, config: Any) -> dict:
    """Figures of the whole split from the confusion matrix of each image.

    An image without a labeled pixel does not count, in the bootstrap either.
    """
    counts = counts[counts.flatten(1).sum(1) > 0]
    harness.check(len(counts) > 0, "No image of the split has a labeled pixel.")
    scores = dk.confusion_scores(counts.sum(0))
    interval = interval_over_images(counts, dk.mean_iou, config.draws)

    iou_of_classes = {}
    for number, name in enumerate(test.classes):
        if scores.valid[number]:  # the class occurs
            iou_of_classes[name] = scores.iou[number].item()
    return {
        "miou": interval,
        "pixel_accuracy": scores.pixel_accuracy,
        "mean_accuracy": scores.mean_accuracy,
        "images": len(counts),
        "iou": iou_of_classes,
    }


def linear_seg(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """A linear layer by SGD, on 4 x 4 labels for each cell of the features (CrOC, Sec 4.2)."""
    k = len(fit.classes)
    probe = dk.train_linear_probe(
        fit.maps,
        small_labels(fit, 4).to(fit.maps.device),
        classes=k,
        epochs=config.epochs,
        lr=config.lr,
        generator=harness.generator(seed),
    )
    counts = count_confusions(partial(dk.linear_maps, probe), test)
    return segmentation_figures(counts, test, config)


def ridge_counts(fit: Features, test: Features, config: Any, seed: int) -> Tensor:
    """A linear layer in closed form, on the label in the middle of each cell."""
    k = len(fit.classes)
    labels = small_labels(fit, 1).flatten().to(fit.maps.device)
    probe = dk.fit_linear_probe(cells_of(fit.maps), labels, classes=k)
    return count_confusions(partial(dk.linear_maps, probe), test)


def check_clusters(clusters: int, test: Features) -> None:
    """A sentence for more clusters than there are cells, or than fit into memory."""
    cells = test.maps[:, 0].numel()
    pixels = max((x.numel() for x in test.labels if x is not None), default=1)
    counts = len(test.labels) * len(test.classes)
    most = min(cells, MOST // pixels, MOST // counts)
    harness.check(
        clusters <= most,
        f"--clusters is {clusters}: give at most {most}, of {cells} cells in {len(test.labels)} "
        f"images of up to {pixels} pixels.",
    )


def cluster_cells(maps: Tensor, clusters: int, seed: int) -> Tensor:
    """The centroids (clusters, d) of all cells of maps, by Lloyd's iteration.

    It starts from the best of a few short runs on some of the cells.
    """
    cells = cells_of(maps)
    draws = harness.generator(seed, device=maps.device)
    start = dk.minibatch_kmeans(cells, clusters, steps=0, generator=draws)
    return dk.kmeans(cells, start, iterations=ITERATIONS).centroids


def kmeans_counts(fit: Features, test: Features, config: Any, seed: int) -> Tensor:
    """Clusters of the split to score, named by its labels (CrOC, Sec 4.2)."""
    clusters = config.clusters or len(test.classes)
    check_clusters(clusters, test)
    centers = cluster_cells(test.maps, clusters, seed)

    def class_scores(maps: Tensor) -> Tensor:
        nearest = dk.nearest_centroids(cells_of(maps), centers)
        nearest = nearest.view(len(maps), *maps.shape[-2:])
        return F.one_hot(nearest, clusters).movedim(-1, 1).float()

    counts = count_confusions(class_scores, test)
    many_to_one = clusters > len(test.classes)
    names = dk.match_clusters(counts.sum(0), many_to_one=many_to_one)
    return dk.merge_clusters(counts, names)


def retrieval_counts(fit: Features, test: Features, config: Any, seed: int) -> Tensor:
    """The nearest of 100,000 labeled cells vote."""
    k = len(fit.classes)
    labels = small_labels(fit, 1).flatten()
    labeled = (labels >= 0).nonzero()[:, 0]
    order = torch.randperm(len(labeled), generator=harness.generator(seed))
    kept = labeled[order[:GALLERY]]
    device = fit.maps.device
    gallery = dk.l2_normalize(cells_of(fit.maps)[kept.to(device)].float())
    gallery_labels = labels[kept].to(device)

    def class_scores(maps: Tensor) -> Tensor:
        cells = cells_of(maps)
        votes = dk.knn_votes(cells, gallery, gallery_labels, classes=k, k=config.neighbors)
        return votes.view(len(maps), *maps.shape[-2:], k).movedim(-1, 1)

    return count_confusions(class_scores, test)


def segment(counts_of: Counts, fit: Features, test: Features, config: Any, seed: int) -> dict:
    """The figures of a protocol from its confusion matrices."""
    return segmentation_figures(counts_of(fit, test, config, seed), test, config)


def position_prior(fit: Features, test: Features, config: Any) -> dict:
    """What is known without an image: the shares of the classes at each place.

    Empty where the split to fit on has no labeled pixel.
    """
    k = len(fit.classes)
    size = [4 * side for side in test.maps.shape[-2:]]
    images_of_class = torch.zeros(k, *size)  # at each place; the maps are not in memory together
    for labels in fit.labels:
        small = resize_to_cells(labels, size, k)[None].long()
        images_of_class.scatter_add_(0, small.clamp(min=0), (small >= 0).float())
    if not images_of_class.any():
        return {}
    shares = images_of_class / max(1, len(fit.labels))

    def class_scores(maps: Tensor) -> Tensor:
        return shares.expand(len(maps), *shares.shape)

    counts = count_confusions(class_scores, test)
    return segmentation_figures(counts, test, config)


# ---- classification ------------------------------------------------------------------------------
ACCURACIES = ("overall", "macro", "top5")


def best_classes(scores: Tensor, *, votes: bool = False) -> Tensor:
    """The best five classes of each row, the best one first; -1 for one without a vote."""
    best = scores.topk(min(BEST, scores.shape[1]), dim=1)
    if votes:
        return torch.where(best.values > 0, best.indices, -1).cpu()
    return best.indices.cpu()


def classification_figures(
    labels: Tensor, ranked: Tensor, images: Tensor, test: Features, config: Any
) -> dict:
    """Accuracies of rows, which are images or objects; the interval is over the images.

    Args:
        labels: The class of each row; a row with -1 is left out.
        ranked: The classes that each row may be named by, the best one first.
        images: The number of the image that each row is in.
        test: The features of the split.
        config: The configuration of the evaluation.
    """
    known = labels >= 0
    labels = labels[known]
    ranked = ranked[known]
    images = images[known]
    if not len(labels):
        raise harness.UserError(
            "The split to score has no object, or no image of a class: choose another protocol."
        )
    # For each image and class: how many rows are right, right among five, and how many there are.
    is_class = ranked == labels[:, None]
    facts = [is_class[:, 0], is_class.any(1), torch.ones_like(is_class[:, 0])]
    numbers = torch.stack([x.long() for x in facts], -1)
    states = torch.zeros(len(test.labels), len(test.classes), 3, dtype=torch.long)
    states = states.index_put((images, labels), numbers, accumulate=True)

    def accuracies(sums: Tensor) -> Tensor:
        right, among_five, total = sums.double().unbind(-1)
        of_classes = right / total.clamp(min=1)
        macro = of_classes.sum(-1) / (total > 0).sum(-1).clamp(min=1)
        count = total.sum(-1).clamp(min=1)
        return torch.stack([right.sum(-1) / count, macro, among_five.sum(-1) / count], -1)

    interval = interval_over_images(states, accuracies, config.draws)
    return {**split_interval(interval, ACCURACIES), "rows": len(labels)}


def main_class(features: Features) -> Tensor:
    """The class that covers most of each image, or -1 where there is none.

    In an image without a label map it is the class of the largest box. The background is no class.
    """
    area = features.area
    if features.background is not None:
        area = area.clone()
        area[:, features.background] = 0
    return torch.where(area.amax(1) > 0, area.argmax(1), -1)


def check_classes(fit_classes: Tensor) -> None:
    """A UserError where no image of the split to fit on has a main class."""
    harness.check(
        bool((fit_classes >= 0).any()),
        "No image of the split to fit on has a class: give another --fit, or leave the protocol "
        "out.",
    )


def objects_by_neighbors(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """Objects by their nearest neighbors (D3SSL, Sec 5.3), disturbed or not."""
    harness.check(len(fit.objects) > 0, "The split to fit on has no object: give another --fit.")
    harness.check(len(test.objects) > 0, "The split to score has no object: give another --split.")
    votes = dk.knn_votes(
        test.objects.float(),
        fit.objects.float(),
        fit.object_classes.to(fit.objects.device),
        classes=len(test.classes),
        k=config.neighbors,
    )
    ranked = best_classes(votes, votes=True)
    return classification_figures(test.object_classes, ranked, test.object_images, test, config)


def images_by_neighbors(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """Images by the nearest neighbors of their pooled last level."""
    gallery = fit.pooled[-1].float()
    fit_classes = main_class(fit)
    check_classes(fit_classes)
    votes = dk.knn_votes(
        test.pooled[-1].float(),
        gallery,
        fit_classes.to(gallery.device),
        classes=len(test.classes),
        k=config.neighbors,
    )
    images = torch.arange(len(test.labels))
    ranked = best_classes(votes, votes=True)
    return classification_figures(main_class(test), ranked, images, test, config)


def images_by_linear_layer(
    fit: Features, test: Features, config: Any, seed: int, *, part: str = "pooled"
) -> dict:
    """Images by a linear layer on each level, pooled to one cell, or to about 9,000 numbers."""
    images = torch.arange(len(test.labels))
    fit_classes = main_class(fit)
    check_classes(fit_classes)
    fit_levels = getattr(fit, part)
    test_levels = getattr(test, part)
    figures = {}
    levels = zip(fit_levels, test_levels, strict=True)
    for number, (fit_rows, test_rows) in enumerate(levels, first_level(fit_levels)):
        probe = dk.train_linear_probe(
            fit_rows[..., None, None],
            fit_classes[:, None, None].to(fit_rows.device),
            classes=len(fit.classes),
            epochs=config.epochs,
            lr=config.lr,
            generator=harness.generator(seed),
        )
        ranked = best_classes(test_rows.float() @ probe.weight + probe.bias)
        found = classification_figures(main_class(test), ranked, images, test, config)
        figures[f"level{number}"] = {name: found[name] for name in ACCURACIES}
    return {**figures, "rows": int((main_class(test) >= 0).sum())}


def first_level(levels: Sequence[Tensor]) -> int:
    """The number of the first level: 1, or 0 where the stem is in front of the four others."""
    return 0 if len(levels) == 5 else 1


# ---- support vector machines ---------------------------------------------------------------------
def images_by_svm(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """A linear SVM on each level; mean AP of the classes that occur (DUPR, Table 1b).

    An image in which a class is unsure is left out for this class, in both splits.
    """
    fit_presence = fit.presence
    test_presence = test.presence
    occurs = (fit_presence > 0).any(0) & (test_presence > 0).any(0)
    if fit.background is not None:
        occurs[fit.background] = False
    if not occurs.any():
        raise harness.UserError("No class occurs in both splits: choose another protocol.")

    fit_presence = fit_presence[:, occurs]
    test_presence = test_presence[:, occurs]
    figures = {}
    levels = zip(fit.vectors, test.vectors, strict=True)
    for number, (fit_rows, test_rows) in enumerate(levels, first_level(fit.vectors)):
        rows = dk.l2_normalize(fit_rows.float())
        presence = fit_presence.to(rows.device)
        costs = [config.cost] * presence.shape[1]
        if config.cost is None:
            costs = choose_costs(rows, presence, seed)
        scores = svm_scores(rows, presence, dk.l2_normalize(test_rows.float()), costs)
        precision = known_precision(scores, test_presence.to(rows.device))
        figures[f"level{number}_map"] = precision.mean()
    scored = (test_presence >= 0).any(1)
    return {**figures, "classes": int(occurs.sum()), "images": int(scored.sum())}


def known_precision(scores: Tensor, presence: Tensor) -> Tensor:
    """The average precision of each class over the images where the class is sure."""
    scores = torch.where(presence >= 0, scores, torch.nan)  # which leaves the image out
    return dk.average_precision(scores, presence > 0)


def svm_scores(rows: Tensor, presence: Tensor, queries: Tensor, costs: Sequence[float]) -> Tensor:
    """The scores (queries, classes) of SVMs, each with the cost of its class."""
    weights = torch.where(presence > 0, POSITIVE, 1.0)
    weights = torch.where(presence >= 0, weights, 0.0)
    scores = queries.new_zeros(len(queries), presence.shape[1])
    for cost in sorted(set(costs)):
        own = torch.tensor([x == cost for x in costs], device=rows.device)
        svm = dk.fit_svm(rows, presence[:, own] > 0, weights[:, own], cost=cost)
        scores[:, own] = queries @ svm.weight + svm.bias
    return scores


def choose_costs(rows: Tensor, presence: Tensor, seed: int) -> list[float]:
    """The C of each class, of powers of 10, with the best mean precision in a cross-validation."""
    order = torch.randperm(len(rows), generator=harness.generator(seed)).to(rows.device)
    folds = order.tensor_split(min(FOLDS, len(rows)))
    classes = presence.shape[1]
    means = []
    for cost in COSTS:
        total = rows.new_zeros(classes)
        tried = rows.new_zeros(classes)
        for held_out in folds:
            kept = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            kept[held_out] = False
            own = presence[kept]
            scores = svm_scores(rows[kept], own, rows[held_out], [cost] * classes)
            answer = presence[held_out]
            usable = (own > 0).any(0) & (answer > 0).any(0)
            total += torch.where(usable, known_precision(scores, answer), 0.0)
            tried += usable
        means.append(total / tried.clamp(min=1))
    best = torch.stack(means).argmax(0)
    return [COSTS[number] for number in best.tolist()]


# ---- the table -----------------------------------------------------------------------------------
# The protocols whose confusion matrices, one for each image, can be had alone.
COUNTS: dict[str, Counts] = {
    "ridge-seg": ridge_counts,
    "kmeans-seg": kmeans_counts,
    "retrieval-seg": retrieval_counts,
}


class Protocol(NamedTuple):
    score: Callable[[Features, Features, Any, int], dict]
    parts: frozenset[str]  # the parts of the features that it needs
    needs_fit: bool = True  # whether it reads the split to fit on
    random: bool = False  # whether its figures depend on the seed
    has_prior: bool = False  # the position prior is a baseline of it


MAPS = frozenset({"maps"})
OBJECTS = frozenset({"objects"})
DISTURBED = frozenset({"disturbed"})  # objects that have another image around them
POOLED = frozenset({"pooled", "classes"})
VECTORS = frozenset({"vectors", "classes"})
linear_on_vectors = partial(images_by_linear_layer, part="vectors")

FITTED = {
    "linear-seg": Protocol(linear_seg, MAPS, random=True, has_prior=True),
    "ridge-seg": Protocol(partial(segment, ridge_counts), MAPS, has_prior=True),
    "kmeans-seg": Protocol(
        partial(segment, kmeans_counts), MAPS, needs_fit=False, random=True, has_prior=True
    ),
    "retrieval-seg": Protocol(
        partial(segment, retrieval_counts), MAPS, random=True, has_prior=True
    ),
    "object-knn": Protocol(objects_by_neighbors, OBJECTS),
    "disturbed-object-knn": Protocol(objects_by_neighbors, DISTURBED),
    "image-knn": Protocol(images_by_neighbors, POOLED),
    "image-linear": Protocol(images_by_linear_layer, POOLED, random=True),
    "image-linear-map": Protocol(linear_on_vectors, VECTORS, random=True),
    "image-svm": Protocol(images_by_svm, VECTORS, random=True),
}
