"""Segmentation without labels: images to train on, and pseudo-classes that are named and scored.

This module is no command. densesiam_segment.py and picie.py share it: their methods differ, and
what they read and how they are scored do not.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate
from torch.utils.data import Subset
import densekit as dk
from densekit import viz
from downstream import image_sets
from downstream.published import row_permuted_group_scores


# ---- data ----------------------------------------------------------------------------------------
def check_data(config: Any) -> None:
    """Check the options of the data; each wrong one is a UserError of its own."""
    harness.check(
        config.data is not None or config.preset == "demo",
        f"--data is missing: the preset {config.preset} needs the folder of a labeled image set.",
    )
    harness.check(
        config.data is None or config.data.is_dir(),
        f"--data is {config.data}: give the folder of a labeled image set.",
    )
    harness.check(
        config.mapping is None or config.mapping.is_file(),
        f"--mapping is {config.mapping}: give a JSON file of classes.",
    )
    harness.check(
        config.train_list is None or config.train_list.is_file(),
        f"--train-list is {config.train_list}: give a text file with one image name a line.",
    )
    harness.check(
        config.val_list is None or config.val_list.is_file(),
        f"--val-list is {config.val_list}: give a text file with one image name a line.",
    )


def open_split(config: Any, split: str, list_file: Path | None, *, labels: bool = True) -> Any:
    """The images of a split: all of them, or those that a list names, in its order.

    Without `labels` their label maps may be missing.
    """
    images = image_sets.open_images(
        config.data, config.layout, split, config.mapping, labels=labels
    )
    images.value_range = config.value_range
    if list_file is None:
        return Subset(images, range(len(images)))

    indices = []
    for line in image_sets.read_list(list_file):
        index = images.find(line)
        if index is None:
            raise harness.UserError(f"The list {list_file} names {line}, which {split} lacks.")
        indices.append(index)
    if not indices:
        raise harness.UserError(f"The list {list_file} is empty: name images of {split}.")
    return Subset(images, list(dict.fromkeys(indices)))  # a name that stands twice counts once


def open_training(config: Any) -> Any:
    """The images to train on, as a source for the views; their labels are not read."""
    split = open_split(config, config.train_split, config.train_list, labels=False)
    names = [split.dataset.names[index] for index in split.indices]
    images = [split.dataset.images[name] for name in names]
    if config.data is None:  # procedural scenes
        return [(image, ()) for image in images]
    files = [os.path.relpath(image, config.data) for image in images]
    return harness.FolderImages(config.data, files, value_range=config.value_range)


def read_labeled(split: Any, index: int) -> tuple[image_sets.Labeled | None, str]:
    """A labeled image; where its file cannot be read, None and "path: reason"."""
    try:
        return split[index], ""
    except harness.UserError:
        name = split.dataset.names[split.indices[index]]
        path = split.dataset.images[name]
        try:
            harness.read_image(path, split.dataset.value_range)
        except Exception as error:  # broken bytes raise nearly anything
            return None, f"{path}: {harness.one_line(error)}"
        raise  # the label map is wrong


# ---- images of any size --------------------------------------------------------------------------
def pad_with_mean_color(images: Tensor, encoder: Any) -> Tensor:
    """Images (b, c, h, w), padded at the right and below to whole cells of all levels.

    Without padding, the last map covers more than the image, and its cells lie beside their pixels.
    """
    height, width = images.shape[-2:]
    sides = [side + -side % encoder.stride for side in (height, width)]
    padded = images.new_tensor(encoder.mean).view(-1, 1, 1).repeat(len(images), 1, *sides)
    padded[..., :height, :width] = images
    return padded


def resize_logits(logits: Tensor, shares: tuple[float, float], size: torch.Size) -> Tensor:
    """Logits (1, k, h, w) of a padded image, resized bilinearly to the label map of the image.

    `shares` are those of the image in the height and in the width of the map.
    """
    if shares == (1, 1):
        return interpolate(logits, size, mode="bilinear")
    y, x = [
        share * (2 * torch.arange(side, device=logits.device) + 1) / side - 1
        for share, side in zip(shares, size, strict=True)
    ]  # the centers of the pixels, on a map from -1 to 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None].to(logits)
    return grid_sample(logits, grid, padding_mode="border", align_corners=False)


def segment(
    logits_of: Callable[[Tensor], Tensor], encoder: Any, images: Tensor, size: torch.Size
) -> Tensor:
    """The pseudo-class of each pixel of one image (1, c, h, w), at the size of its labels.

    `logits_of` gives the logits of the cells (1, k, h, w) of a padded image.
    """
    padded = pad_with_mean_color(images, encoder)
    shares = (images.shape[-2] / padded.shape[-2], images.shape[-1] / padded.shape[-1])
    return resize_logits(logits_of(padded), shares, size).argmax(1)[0]


# ---- scores --------------------------------------------------------------------------------------
def evaluate(model: Any, val: Any, run: harness.Run, step: int) -> None:
    """Name and score the pseudo-classes, log the scores and save a picture.

    The model has `segment(image, size)`, as `match` asks for, and the buffer `names`.

    Of a mapping the first classes are things and the others stuff. Each group is scored alone,
    unless one of them is empty.
    """
    classes = len(model.names)
    things = val.dataset.things
    harness.share_buffers(model)
    model.eval()
    matching = match(val, model.segment, classes, run)
    model.names.copy_(matching.names)
    model.train()

    scores = {"miou": matching.mean_iou()}
    if 0 < things < classes:
        is_thing = torch.arange(classes, device=run.world.device) < things
        scores |= group_scores(matching, "things", is_thing)
        scores |= group_scores(matching, "stuff", ~is_thing)
    if step == 0:
        scores["color_miou"] = match_colors(val, classes, run).mean_iou()
    run.log(step, **scores)

    if run.world.is_main and matching.examples:  # there is none if its images are all unreadable
        draw(matching, val.dataset, run.picture_path(step))


class Matching(NamedTuple):
    """Pseudo-classes of a whole set, matched to its classes."""

    confusion: Tensor  # how many pixels have this label and that pseudo-class
    names: Tensor  # the class of each pseudo-class
    examples: list[tuple[Tensor, Tensor, Tensor]]  # images, labels and pseudo-classes, to draw

    def mean_iou(self) -> Tensor:
        return dk.mean_iou(dk.merge_clusters(self.confusion, self.names))


@torch.no_grad()
def match(
    val: Any, segment: Callable[[Tensor, torch.Size], Tensor], classes: int, run: harness.Run
) -> Matching:
    """Match pseudo-classes to classes, by the pixels of all images over all processes.

    `segment(image, size)` gives the pseudo-class of each pixel of an image.
    """
    device = run.world.device
    confusion = torch.zeros(classes, classes, dtype=torch.long, device=device)
    examples = {}
    unreadable = []
    for index in range(run.world.rank, len(val), run.world.size):
        sample, problem = read_labeled(val, index)
        if sample is None:
            unreadable.append(problem)
            continue
        if sample.labels is None:
            raise harness.UserError(f"The image {sample.name} has no label map to score with.")
        found = segment(sample.image.to(device) / 255, sample.labels.shape)
        confusion += dk.confusion_matrix(sample.labels.to(device), found, classes=classes)
        sixth = 6 * index // len(val)  # the picture shows one image of each sixth of the set
        examples[sixth] = (sample.image, sample.labels, found.cpu())

    if unreadable:
        run.note_unreadable(unreadable)
    torch.distributed.all_reduce(confusion)
    harness.check(confusion.sum() > 0, "No scored image is readable and has a labeled pixel.")
    return Matching(confusion, dk.match_clusters(confusion), list(examples.values()))


def match_colors(val: Any, classes: int, run: harness.Run) -> Matching:
    """Match k-means clusters of the colors: the baseline that a segmenter has to beat."""
    colors = []
    for index in range(len(val)):
        sample, _ = read_labeled(val, index)
        if sample is not None:
            colors.append(sample.image.flatten(1)[:, ::17].T / 255)
    generator = harness.generator(0)
    centers = dk.minibatch_kmeans(torch.cat(colors), classes, generator=generator)
    centers = centers.to(run.world.device)

    def segment(image: Tensor, size: torch.Size) -> Tensor:
        return dk.nearest_centroids(image.flatten(1).T, centers).view(size)

    return match(val, segment, classes, run)


def group_scores(matching: Matching, name: str, group: Tensor) -> dict[str, Tensor]:
    """Mean IoU within a group of classes, and the wrong one that the papers publish."""
    merged = dk.merge_clusters(matching.confusion, matching.names)
    right = dk.group_scores(merged, group)
    published = row_permuted_group_scores(matching.confusion, matching.names, group)
    return {f"{name}_miou": right.miou, f"{name}_wrong": published.miou}


def draw(matching: Matching, dataset: Any, path: Path) -> None:
    """A row per example: the image, its labels and the classes found."""
    images, labels, found = zip(*matching.examples, strict=True)
    names = matching.names.cpu()
    named = [names[x] for x in found]
    figure = viz.plot_segmentation(
        images, labels, named, names=dataset.classes, ignore=dataset.ignored
    )
    figure.savefig(path)
