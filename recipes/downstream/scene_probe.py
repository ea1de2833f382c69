"""What an encoder knows of the demos' scenes: a score, and a picture on which one sees it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.utils import save_image
import densekit as dk
from densekit import viz

SIZE = (64, 64)  # of a scene, in pixels
CLASSES = len(dk.SCENE_CLASSES)
CLUSTERS = 2 * CLASSES
STRIDE = 8  # the classifier and the clusters are fitted to every eighth pixel in each direction
FITTED = 128  # scenes
SHOWN = 6  # other scenes
PANEL_SIDE = 128  # of the picture, in pixels


@torch.no_grad()
def probe(encode: Callable[[Tensor], Tensor], path: Path) -> dict[str, Tensor]:
    """Score feature maps by `dk.probe_scenes`, and save a picture of six scenes: see `draw`.

    `encode` maps images (b, 3, h, w) in [0, 1] to feature maps, in evaluation mode.
    """
    score = dk.probe_scenes(encode)
    draw(encode, path)
    return {"probe_miou": score.miou, "prior_miou": score.prior_miou}


def draw(encode: Callable[[Tensor], Tensor], path: Path) -> None:
    """A row per scene: the scene, its classes, the probe's, clusters, principal components.

    The clusters are those of k-means, which sees no label. Each has the color of the class that
    most of its pixels have.
    """
    # Seeds 0 and 1 are those of `dk.probe_scenes`.
    fitted, shown = [
        dk.sample_scenes(count, SIZE, generator=torch.Generator().manual_seed(seed))
        for count, seed in ((FITTED, 2), (SHOWN, 3))
    ]
    fitted_maps, shown_maps = [encode(x.images).float().cpu() for x in (fitted, shown)]
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
    pixels = dk.grid_points(whole, SIZE)
    some_pixels = pixels.unflatten(0, SIZE)[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]

    rows = features_at(fitted_maps, some_pixels.flatten(0, 1)).flatten(0, 1)
    labels = fitted.labels[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE].flatten()
    classifier = dk.fit_linear_probe(rows, labels, classes=CLASSES)
    draws = torch.Generator().manual_seed(0)
    directions = dk.l2_normalize(rows)
    start = dk.minibatch_kmeans(directions, CLUSTERS, steps=0, generator=draws)
    clusters = dk.kmeans(directions, start)
    counts = dk.confusion_matrix(labels, clusters.labels, classes=CLASSES, clusters=CLUSTERS)
    class_of_cluster = dk.match_clusters(counts, many_to_one=True)

    shown_rows = features_at(shown_maps, pixels)
    probed = (shown_rows @ classifier.weight + classifier.bias).argmax(-1)
    centroids = clusters.centroids.expand(SHOWN, -1, -1)
    found = dk.nearest_centroids(dk.l2_normalize(shown_rows), centroids)
    label_maps = [shown.labels, *(x.unflatten(1, SIZE) for x in (probed, class_of_cluster[found]))]

    panels = [shown.images, *(viz.label_colors(x).movedim(-1, 1) for x in label_maps)]
    panels.append(dk.pca_colors(dk.rows_to_map(shown_rows, SIZE)))
    tiles = [nn.functional.interpolate(x, PANEL_SIDE) for x in panels]
    save_image(torch.stack(tiles, 1).flatten(0, 1), path, nrow=len(panels))


def features_at(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear features of each map at the same points, (b, n, d)."""
    return dk.gridsample(maps, points.expand(len(maps), *points.shape))
