"""The protocols of evaluate.py: features of two splits in, figures with their intervals out.

No command of its own. Each is a function of the features of the split to fit on, those of the split
to score, the configuration and a seed; `FITTED` has them by name.
"""

from functools import partial
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm
import densekit as dk
from downstream import image_sets
from downstream.encoders import Encoder
from downstream.image_sets import IGNORED


class Features(NamedTuple):  # of a split, in the order of its images
    maps: Tensor  # of the last level, (n, d, h, w), in half precision
    pooled: list[Tensor]  # of each level, (n, d)
    labels: list[Tensor | None]  # class maps at their own size
    area: Tensor  # (n, classes)
    objects: Tensor  # (m, d): RoIAlign of the last level, averaged
    object_classes: Tensor
    object_images: Tensor  # the image that each object is of
    classes: list[str]


# ---- segmentation --------------------------------------------------------------------------------
def nearest(labels: Tensor, size: Any) -> Tensor:
    return F.interpolate(labels[:, None].float(), tuple(size), mode="nearest-exact")[:, 0].long()


def small_labels(features: Features, cells: int) -> Tensor:
    """Class maps of one size, cells x cells for each cell of the feature maps, to fit on."""
    size = [x * cells for x in features.maps.shape[-2:]]
    empty = torch.full((1, 1), IGNORED)
    maps = [nearest((empty if x is None else x)[None], size) for x in features.labels]
    return torch.cat(maps)


def rows_of(maps: Tensor) -> Tensor:  # (n, d, h, w) -> (n h w, d)
    return maps.float().movedim(1, -1).flatten(0, 2)


def count(scores: Any, test: Features, clusters: int) -> Tensor:
    """A confusion matrix for each image; `scores(maps)` are the class scores of one image."""
    k, counts = len(test.classes), []
    for maps, labels in zip(test.maps, test.labels, strict=True):
        if labels is not None:
            found = scores(maps[None].float())
            counts.append(dk.segmentation_counts(found, labels[None], classes=k))
    if not counts:
        raise harness.UserError("No image of the split has a label map: choose another protocol.")
    return torch.cat(counts)


def segmentation(counts: Tensor, test: Features, config: Any) -> dict:
    scores = dk.confusion_scores(counts.sum(0))
    interval = dk.bootstrap(counts, dk.mean_iou, draws=config.draws, generator=harness.generator(2))
    iou = zip(test.classes, scores.iou.tolist(), scores.valid.tolist(), strict=True)
    return {
        "miou": interval, "pixel_accuracy": scores.pixel_accuracy,
        "mean_accuracy": scores.mean_accuracy, "images": len(counts),
        "iou": {name: x for name, x, occurs in iou if occurs},
    }  # fmt: skip


def linear_seg(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """A linear layer by SGD, at four label cells to a feature cell (CrOC, Sec 4.2)."""
    probe = dk.train_linear_probe(
        fit.maps.float(), small_labels(fit, 4), classes=len(fit.classes), epochs=config.epochs,
        lr=config.lr, generator=harness.generator(seed),
    )  # fmt: skip
    counts = count(partial(dk.linear_maps, probe), test, len(fit.classes))
    return segmentation(counts, test, config)


def ridge_seg(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """The same in closed form, on the label in the middle of each cell."""
    labels, k = small_labels(fit, 1).flatten(), len(fit.classes)
    probe = dk.fit_linear_probe(rows_of(fit.maps), labels, classes=k)
    return segmentation(count(partial(dk.linear_maps, probe), test, k), test, config)


def kmeans_seg(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """Clusters of the split to score, named by its labels (CrOC, Sec 4.2)."""
    clusters = config.clusters or len(test.classes)
    options = {"generator": harness.generator(seed)}
    centers = dk.minibatch_kmeans(rows_of(test.maps), clusters, **options)

    def scores(maps: Tensor) -> Tensor:
        labels = dk.nearest_centroids(rows_of(maps), centers).view(-1, *maps.shape[-2:])
        return F.one_hot(labels, clusters).movedim(-1, 1).float()

    counts = count(scores, test, clusters)
    many = clusters > len(test.classes)
    assignment = dk.match_clusters(counts.sum(0), many_to_one=many)
    return segmentation(dk.merge_clusters(counts, assignment), test, config)


def retrieval_seg(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """The nearest of 100,000 labeled cells vote."""
    labels, k = small_labels(fit, 1).flatten(), len(fit.classes)
    keep = (labels != IGNORED).nonzero()[:, 0]
    keep = keep[torch.randperm(len(keep), generator=harness.generator(seed))[:100_000]]
    known = rows_of(fit.maps)[keep], labels[keep]

    def scores(maps: Tensor) -> Tensor:
        votes = dk.knn_votes(rows_of(maps), *known, classes=k, k=config.neighbors)
        return votes.view(-1, *maps.shape[-2:], k).movedim(-1, 1)

    return segmentation(count(scores, test, k), test, config)


def position_prior(fit: Features, test: Features, config: Any) -> dict:
    """What is known without an image: the shares of the classes at each place."""
    k, labels = len(fit.classes), small_labels(fit, 4)
    shares = F.one_hot(torch.where(labels < k, labels, k), k + 1)[..., :k].float().mean(0)
    shares = shares.movedim(-1, 0)[None]
    return segmentation(count(lambda maps: shares, test, k), test, config)


# ---- classification ------------------------------------------------------------------------------
def classification(
    labels: Tensor, named: Tensor, images: Tensor, test: Features, config: Any
) -> dict:
    """Accuracies of rows (images or objects), the interval over images."""
    keep = labels >= 0
    labels, named, images = labels[keep], named[keep], images[keep]
    if not len(labels):
        what = "has no object, or no image of a class"
        raise harness.UserError(f"The split to score {what}: choose another protocol.")
    states = torch.zeros(len(test.maps), len(test.classes), 2, dtype=torch.long)
    right = torch.stack([(labels == named).long(), torch.ones_like(labels)], -1)
    states = states.index_put((images, labels), right, accumulate=True)

    def shares(sums: Tensor) -> Tensor:
        hits, total = sums.double().unbind(-1)
        macro = (hits / total.clamp(min=1)).sum(-1) / (total > 0).sum(-1).clamp(min=1)
        return torch.stack([hits.sum(-1) / total.sum(-1).clamp(min=1), macro], -1)

    options = {"draws": config.draws, "generator": harness.generator(2)}
    figures = dk.bootstrap(states, shares, **options)
    both = {
        name: dk.Interval(*(x[i] for x in figures)) for i, name in enumerate(dk.Accuracy._fields)
    }
    return {**both, "rows": len(labels)}


def object_knn(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """Objects by their nearest neighbors (D3SSL, Sec 5.3), disturbed or not."""
    k = len(test.classes)
    votes = dk.knn_votes(
        test.objects, fit.objects, fit.object_classes, classes=k, k=config.neighbors
    )
    named = torch.where(votes.amax(1) > 0, votes.argmax(1), -1)
    return classification(test.object_classes, named, test.object_images, test, config)


def main_class(features: Features) -> Tensor:
    """The class that covers most of each image (of boxes, the largest's); -1 without any."""
    return torch.where(features.area.amax(1) > 0, features.area.argmax(1), -1)


def image_knn(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """Images by the nearest neighbors of their pooled last level."""
    k = len(test.classes)
    votes = dk.knn_votes(
        test.pooled[-1], fit.pooled[-1], main_class(fit), classes=k, k=config.neighbors
    )
    images = torch.arange(len(test.maps))
    return classification(main_class(test), votes.argmax(1), images, test, config)


def image_linear(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """A linear layer on each pooled level."""
    found, images = {}, torch.arange(len(test.maps))
    for level, (x, y) in enumerate(zip(fit.pooled, test.pooled, strict=True), 1):
        probe = dk.train_linear_probe(
            x[..., None, None], main_class(fit)[:, None, None], classes=len(fit.classes),
            epochs=config.epochs, lr=config.lr, generator=harness.generator(seed),
        )  # fmt: skip
        named = (y @ probe.weight + probe.bias).argmax(1)
        scores = classification(main_class(test), named, images, test, config)
        found[f"level{level}"] = {name: scores[name] for name in dk.Accuracy._fields}
    return {**found, "rows": len(images)}


def image_svm(fit: Features, test: Features, config: Any, seed: int) -> dict:
    """A linear SVM on each pooled level; mean AP of the classes that occur (DUPR, Table 1b)."""
    targets, wanted = fit.area > 0, test.area > 0
    occurs = targets.any(0) & wanted.any(0)
    if not occurs.any():
        raise harness.UserError("No class occurs in both splits: choose another protocol.")
    found = {}
    for level, (x, y) in enumerate(zip(fit.pooled, test.pooled, strict=True), 1):
        svm = dk.fit_svm(dk.l2_normalize(x), targets, cost=config.cost)
        scores = dk.l2_normalize(y) @ svm.weight + svm.bias
        found[f"level{level}_map"] = dk.average_precision(scores, wanted)[occurs].mean()
    return {**found, "classes": int(occurs.sum()), "images": len(wanted)}


# ---- video ---------------------------------------------------------------------------------------
@torch.no_grad()
def video(encoder: Encoder, config: Any) -> dict:
    """Labels of the first frame carried through DAVIS: J, F and their mean (CrOC, Appendix D)."""
    device = next(encoder.parameters()).device
    sums = []
    for item in tqdm(
        image_sets.open_videos(config.data, config.split), desc=f"{encoder.name} video"
    ):
        masks, maps = item.masks or [None], []
        first = None if masks[0] is None else image_sets.read_mask(masks[0])
        ids = [] if first is None else [x for x in first.unique().tolist() if x not in (0, IGNORED)]
        if first is None or not ids or len(masks) < 3:
            raise harness.UserError(f"{item.name} has no object in its first frame to follow.")
        for number in range(0, len(item.frames), config.batch):
            read = [image_sets.read_frame(x) for x in item.frames[number : number + config.batch]]
            frames = [transforms.resize(x / 255, config.size, antialias=True) for x in read]
            maps.append(encoder(torch.stack(frames).to(device)).float())
        maps = torch.cat(maps)
        objects = torch.stack([first == x for x in (0, *ids)])[None].float().to(device)
        start = F.interpolate(objects, tuple(maps.shape[-2:]), mode="area")[0]
        shares, scores = dk.propagate_video(maps, start / start.sum(0).clamp(min=1e-6)), []
        for path, share in zip(masks[1:-1], shares[1:-1], strict=True):  # as DAVIS counts
            if path is not None:
                mask = image_sets.read_mask(path)
                size = tuple(mask.shape)
                guess = F.interpolate(share[None], size, mode="bilinear")[0].argmax(0).cpu()
                true = torch.stack([mask == x for x in ids])
                own = torch.stack([guess == i for i in range(1, len(ids) + 1)])
                j, f = dk.region_similarity(true, own), dk.boundary_f_measure(true, own)
                scores.append(torch.stack([j, f]))
        if not scores:
            raise harness.UserError(f"{item.name} has no mask to score by but those at its ends.")
        sums.append(torch.cat([torch.stack(scores).mean(0).sum(1), torch.tensor([len(ids)])]))
    states = torch.stack(sums).double()

    def means(total: Tensor) -> Tensor:  # over objects: J, F, J&F
        both = total[..., :2] / total[..., 2:]
        return torch.cat([both, both.mean(-1, keepdim=True)], -1)

    options = {"draws": config.draws, "generator": harness.generator(2)}
    figures = dk.bootstrap(states, means, **options)
    names = ("J", "F", "J&F")
    return {
        **{name: dk.Interval(*(x[i] for x in figures)) for i, name in enumerate(names)},
        "videos": len(states), "objects": int(states[:, 2].sum()),
    }  # fmt: skip


FITTED = {  # by name; disturbed-object-knn is object-knn on features of its own
    "linear-seg": linear_seg, "ridge-seg": ridge_seg, "kmeans-seg": kmeans_seg,
    "retrieval-seg": retrieval_seg, "object-knn": object_knn, "disturbed-object-knn": object_knn,
    "image-knn": image_knn, "image-linear": image_linear, "image-svm": image_svm,
}  # fmt: skip
