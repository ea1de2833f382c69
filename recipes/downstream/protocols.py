"""The protocols of evaluate.py: features of two splits in, figures with their intervals out.

This module is no command. Each protocol is a function of the features of the split to fit on, the
features of the split to score, the configuration and a seed. `FITTED` has them by name; `video`
stands alone, because it takes the frames of videos.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm
import densekit as dk
from downstream.davis import VOID, Video
from downstream.encoders import Encoder, device_of
from downstream.label_files import read_frame

GALLERY = 100_000  # cells at most, of retrieval-seg
MOST = 2**30  # numbers in one tensor of kmeans-seg: 4 GB of class scores, 8 GB of counts


class Features(NamedTuple):
    """The features of a split, in the order of its images."""

    maps: Tensor  # of the last level, (n, d, h, w), in half precision
    pooled: list[Tensor]  # the mean over the map of each level, (n, d)
    labels: list[Tensor | None]  # class maps at their own size; what is no class is ignored
    area: Tensor  # (n, classes): the share of each class in the image
    objects: Tensor  # (m, d): RoIAlign of the last level, averaged
    object_classes: Tensor
    object_images: Tensor  # the number of the image that each object is in
    classes: list[str]


Counts = Callable[[Features, Features, Any, int], Tensor]  # a confusion matrix for each image


# ---- segmentation --------------------------------------------------------------------------------
def resize_labels(labels: Tensor, size: list[int]) -> Tensor:
    """A class map (h, w) at another size, by the nearest pixel."""
    resized = F.interpolate(labels[None, None].float(), tuple(size), mode="nearest-exact")
    return resized[0, 0].long()


def small_labels(features: Features, cells: int) -> Tensor:
    """Class maps of one size to fit on: `cells` x `cells` labels for each cell of the features."""
    size = [side * cells for side in features.maps.shape[-2:]]
    nothing = torch.full((1, 1), -1)  # no class
    maps = [resize_labels(nothing if x is None else x, size) for x in features.labels]
    return torch.stack(maps)


def cells_of(maps: Tensor) -> Tensor:
    """All cells of maps (n, d, h, w) as rows (n h w, d)."""
    return dk.map_to_rows(maps.float()).flatten(0, 1)


def count_confusions(class_scores: Callable[[Tensor], Tensor], test: Features) -> Tensor:
    """A confusion matrix of each image that has a label map.

    `class_scores` gives the scores (1, classes or clusters, h, w) of the maps of one image.
    """
    counts = []
    for maps, labels in zip(test.maps, test.labels, strict=True):
        if labels is None:
            continue
        scores = class_scores(maps[None].float())
        counts.append(dk.segmentation_counts(scores, labels[None], classes=len(test.classes)))
    if not counts:
        raise harness.UserError("No image of the split has a label map: choose another protocol.")
    return torch.cat(counts)


def segmentation_figures(counts: Tensor, test: Features, config: Any) -> dict:
    """Figures of the whole split from the confusion matrix of each image."""
    scores = dk.confusion_scores(counts.sum(0))
    draws = harness.generator(2)
    interval = dk.bootstrap(counts, dk.mean_iou, draws=config.draws, generator=draws)

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
        fit.maps.float(),
        small_labels(fit, 4),
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
    labels = small_labels(fit, 1).flatten()
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


def kmeans_counts(fit: Features, test: Features, config: Any, seed: int) -> Tensor:
    """Clusters of the split to score, named by its labels (CrOC, Sec 4.2)."""
    clusters = config.clusters or len(test.classes)
    check_clusters(clusters, test)
    draws = harness.generator(seed)
    centers = dk.minibatch_kmeans(cells_of(test.maps), clusters, generator=draws)

    def class_scores(maps: Tensor) -> Tensor:
        nearest = dk.nearest_centroids(cells_of(maps), centers).view(-1, *maps.shape[-2:])
        return F.one_hot(nearest, clusters).movedim(-1, 1).float()

    counts = count_confusions(class_scores, test)
    many_to_one = clusters > len(test.classes)
    names = dk.match_clusters(counts.sum(0), many_to_one=many_to_one)
    return dk.merge_clusters(counts, names)


def retrieval_counts(fit: Features, test: Features, config: Any, seed: int) -> Tensor:
    """The nearest of 100,000 labeled cells vote."""
    k = len(fit.classes)
    labels = small_labels(fit, 1).flatten()
    labeled = ((labels >= 0) & (labels < k)).nonzero()[:, 0]
    order = torch.randperm(len(labeled), generator=harness.generator(seed))
    kept = labeled[order[:GALLERY]]
    gallery = cells_of(fit.maps)[kept]
    gallery_labels = labels[kept]

    def class_scores(maps: Tensor) -> Tensor:
        cells = cells_of(maps)
        votes = dk.knn_votes(cells, gallery, gallery_labels, classes=k, k=config.neighbors)
        return votes.view(-1, *maps.shape[-2:], k).movedim(-1, 1)

    return count_confusions(class_scores, test)


def segment(counts_of: Counts, fit: Features, test: Features, config: Any, seed: int) -> dict:
    """The figures of a protocol from its confusion matrices."""
    return segmentation_figures(counts_of(fit, test, config, seed), test, config)


def position_prior(fit: Features, test: Features, config: Any) -> dict:
    """What is known without an image: the shares of the classes at each place."""
    k = len(fit.classes)
    labels = small_labels(fit, 4)
    is_class = (labels >= 0) & (labels < k)
    labels = torch.where(is_class, labels, k)  # one more class for what is ignored
    shares = F.one_hot(labels, k + 1)[..., :k].float().mean(0)
    scores = shares.movedim(-1, 0)[None]
    counts = count_confusions(lambda maps: scores, test)
    return segmentation_figures(counts, test, config)


# ---- classification ------------------------------------------------------------------------------
def classification_figures(
    labels: Tensor, predicted: Tensor, images: Tensor, test: Features, config: Any
) -> dict:
    """Accuracies of rows, which are images or objects; the interval is over the images.

    Args:
        labels: The class of each row; a row with -1 is left out.
        predicted: The class that each row is given.
        images: The number of the image that each row is in.
        test: The features of the split.
        config: The configuration of the evaluation.
    """
    known = labels >= 0
    labels = labels[known]
    predicted = predicted[known]
    images = images[known]
    if not len(labels):
        raise harness.UserError(
            "The split to score has no object, or no image of a class: choose another protocol."
        )
    # For each image and class: how many rows are right, and how many there are.
    right_and_all = torch.stack([(labels == predicted).long(), torch.ones_like(labels)], -1)
    states = torch.zeros(len(test.maps), len(test.classes), 2, dtype=torch.long)
    states = states.index_put((images, labels), right_and_all, accumulate=True)

    def accuracies(sums: Tensor) -> Tensor:
        right, total = sums.double().unbind(-1)
        of_classes = right / total.clamp(min=1)
        macro = of_classes.sum(-1) / (total > 0).sum(-1).clamp(min=1)
        overall = right.sum(-1) / total.sum(-1).clamp(min=1)
        return torch.stack([overall, macro], -1)

    draws = harness.generator(2)
    interval = dk.bootstrap(states, accuracies, draws=config.draws, generator=draws)
    return {**split_interval(interval, dk.Accuracy._fields), "rows": len(labels)}


def split_interval(interval: dk.Interval, names: tuple[str, ...]) -> dict[str, dk.Interval]:
    """The interval of several figures as an interval for each."""
    return {name: dk.Interval(*(x[i] for x in interval)) for i, name in enumerate(names)}


def main_class(features: Features) -> Tensor:
    """The class that covers most of each image, or -1 where there is none.

    In an image without a label map it is the class of the largest box.
    """
    return torch.where(features.area.amax(1) > 0, features.area.argmax(1), -1)


def objects_by_neighbors(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """Objects by their nearest neighbors (D3SSL, Sec 5.3), disturbed or not."""
    votes = dk.knn_votes(
        test.objects,
        fit.objects,
        fit.object_classes,
        classes=len(test.classes),
        k=config.neighbors,
    )
    predicted = torch.where(votes.amax(1) > 0, votes.argmax(1), -1)
    images = test.object_images
    return classification_figures(test.object_classes, predicted, images, test, config)


def images_by_neighbors(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """Images by the nearest neighbors of their pooled last level."""
    votes = dk.knn_votes(
        test.pooled[-1],
        fit.pooled[-1],
        main_class(fit),
        classes=len(test.classes),
        k=config.neighbors,
    )
    images = torch.arange(len(test.maps))
    return classification_figures(main_class(test), votes.argmax(1), images, test, config)


def images_by_linear_layer(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """Images by a linear layer on each pooled level."""
    images = torch.arange(len(test.maps))
    figures = {}
    levels = zip(fit.pooled, test.pooled, strict=True)
    for number, (fit_rows, test_rows) in enumerate(levels, 1):
        probe = dk.train_linear_probe(
            fit_rows[..., None, None],
            main_class(fit)[:, None, None],
            classes=len(fit.classes),
            epochs=config.epochs,
            lr=config.lr,
            generator=harness.generator(seed),
        )
        predicted = (test_rows @ probe.weight + probe.bias).argmax(1)
        found = classification_figures(main_class(test), predicted, images, test, config)
        figures[f"level{number}"] = {name: found[name] for name in dk.Accuracy._fields}
    return {**figures, "rows": len(images)}


def images_by_svm(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """A linear SVM on each pooled level; mean AP of the classes that occur (DUPR, Table 1b)."""
    fit_targets = fit.area > 0
    test_targets = test.area > 0
    occurs = fit_targets.any(0) & test_targets.any(0)
    if not occurs.any():
        raise harness.UserError("No class occurs in both splits: choose another protocol.")

    figures = {}
    levels = zip(fit.pooled, test.pooled, strict=True)
    for number, (fit_rows, test_rows) in enumerate(levels, 1):
        svm = dk.fit_svm(dk.l2_normalize(fit_rows), fit_targets, cost=config.cost)
        scores = dk.l2_normalize(test_rows) @ svm.weight + svm.bias
        precision = dk.average_precision(scores, test_targets)
        figures[f"level{number}_map"] = precision[occurs].mean()
    return {**figures, "classes": int(occurs.sum()), "images": len(test_targets)}


# ---- the table -----------------------------------------------------------------------------------
# The protocols whose confusion matrices, one for each image, can be had alone.
COUNTS: dict[str, Counts] = {
    "ridge-seg": ridge_counts,
    "kmeans-seg": kmeans_counts,
    "retrieval-seg": retrieval_counts,
}


class Protocol(NamedTuple):
    score: Callable[[Features, Features, Any, int], dict]
    disturbed: bool = False  # on features of objects that have another image around them
    has_prior: bool = False  # the position prior is a baseline of it


FITTED = {
    "linear-seg": Protocol(linear_seg, has_prior=True),
    "ridge-seg": Protocol(partial(segment, ridge_counts), has_prior=True),
    "kmeans-seg": Protocol(partial(segment, kmeans_counts), has_prior=True),
    "retrieval-seg": Protocol(partial(segment, retrieval_counts), has_prior=True),
    "object-knn": Protocol(objects_by_neighbors),
    "disturbed-object-knn": Protocol(objects_by_neighbors, disturbed=True),
    "image-knn": Protocol(images_by_neighbors),
    "image-linear": Protocol(images_by_linear_layer),
    "image-svm": Protocol(images_by_svm),
}


# ---- video ---------------------------------------------------------------------------------------
@torch.no_grad()
def video(encoder: Encoder, videos: list[Video], config: Any) -> dict:
    """Labels of the first frame carried through DAVIS: J, F and their mean (CrOC, Appendix D)."""
    sums = []
    for item in tqdm(videos, desc=harness.printable(f"{encoder.name} video")):
        first, objects = read_first_mask(item)
        maps = encode_frames(encoder, item, config)
        start = share_of_objects(first, objects, maps)
        shares = dk.propagate_video(maps, start)
        scores = score_frames(item, shares, objects)  # (frames, 2, objects)
        sums.append(torch.cat([scores.mean(0).sum(1), torch.tensor([len(objects)])]))
    states = torch.stack(sums).double()  # of each video: J and F summed over objects, objects

    def means(total: Tensor) -> Tensor:
        both = total[..., :2] / total[..., 2:]
        return torch.cat([both, both.mean(-1, keepdim=True)], -1)

    draws = harness.generator(2)
    interval = dk.bootstrap(states, means, draws=config.draws, generator=draws)
    return {
        **split_interval(interval, ("J", "F", "J&F")),
        "videos": len(states),
        "objects": int(states[:, 2].sum()),
    }


def read_first_mask(item: Video) -> tuple[Tensor, list[int]]:
    """The mask of the first frame, and the numbers of its objects."""
    masks = item.masks or []
    if len(masks) >= 3 and masks[0] is not None:
        first = item.read_mask(masks[0])
        objects = [x for x in first.unique().tolist() if x not in (0, VOID)]
        if objects:
            return first, objects
    raise harness.UserError(f"{item.name} has no object in its first frame to follow.")


def encode_frames(encoder: Encoder, item: Video, config: Any) -> Tensor:
    """The maps (t, d, h, w) of all frames."""
    maps = []
    for number in range(0, len(item.frames), config.batch):
        paths = item.frames[number : number + config.batch]
        pixels = [read_frame(path, config.value_range) / 255 for path in paths]
        frames = [transforms.resize(x, config.size, antialias=True) for x in pixels]
        maps.append(encoder(torch.stack(frames).to(device_of(encoder))).float())
    return torch.cat(maps)


def share_of_objects(mask: Tensor, objects: list[int], maps: Tensor) -> Tensor:
    """The share (1 + objects, h, w) of the background and of each object in every cell."""
    numbers = (0, *objects)
    pixels = torch.stack([mask == x for x in numbers])[None].float().to(maps.device)
    shares = F.interpolate(pixels, tuple(maps.shape[-2:]), mode="area")[0]
    return shares / shares.sum(0).clamp(min=1e-6)  # without what is ignored


def score_frames(item: Video, shares: Tensor, objects: list[int]) -> Tensor:
    """J and F of each object in every frame with a mask, (frames, 2, objects).

    The first and the last frame do not count, as in DAVIS's own program.
    """
    masks = item.masks or []
    scores = []
    for path, share in zip(masks[1:-1], shares[1:-1], strict=True):
        if path is None:
            continue
        mask = item.read_mask(path)
        resized = F.interpolate(share[None], tuple(mask.shape), mode="bilinear")[0]
        predicted = resized.argmax(0).cpu()  # 0 is the background

        true_masks = torch.stack([mask == x for x in objects])
        own_masks = torch.stack([predicted == i for i in range(1, len(objects) + 1)])
        j = dk.region_similarity(true_masks, own_masks)
        f = dk.boundary_f_measure(true_masks, own_masks)
        scores.append(torch.stack([j, f]))
    if not scores:
        raise harness.UserError(f"{item.name} has no mask to score by but those at its ends.")
    return torch.stack(scores)
