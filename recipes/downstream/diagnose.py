"""The diagnostics of evaluate.py: figures of one encoder on the images of one split.

This module is no command. Each function takes the encoder and a `Task`. `DIAGNOSTICS` has them by
name; `retrieval` stands alone, because it takes the features of the split.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor
from torchvision.transforms import v2 as transforms
from torchvision.utils import save_image
import densekit as dk
from densekit import viz
from downstream import bands, colors
from downstream.crops import as_bytes, as_picture
from downstream.encoders import Encoder, device_of
from downstream.health import health
from downstream.protocols import Features, interval_over_images, main_class, split_interval
from downstream.report import picture_name
from downstream.shards import Shards

IOUS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of a box and its copies
STRIDE = 16  # of the level C4, which DUPR's figures are of
ROI = 14  # bins of the box whose affinity is drawn, along each axis
TEMPERATURE = 0.001  # of the affinity
ATTEMPTS = 10  # to draw two views that both contain a box
OBJECTS = 256  # at most, of which the coupling is measured
BLOCK = 2**22  # numbers of maps at a time: 16 MB in float32
THUMBNAIL = 112  # pixels of the longer side of a retrieved image
COSINES = 2**27  # of images at a time: half a gigabyte


def level_of_figures(encoder: Encoder, config: Any) -> int:
    """The level that DUPR's figures are of: that of --level, or else C4, as an index.

    C4 is the last level whose cells are 16 pixels wide or less.
    """
    if config.level:
        return config.level - 1
    fine = [number for number, stride in enumerate(encoder.strides) if stride <= STRIDE]
    return fine[-1] if fine else 0


class Task(NamedTuple):
    """What each diagnostic takes beside the encoder."""

    samples: Any  # of the split, `Samples` of evaluate.py
    load: Callable  # how they are loaded, `load_batches` of evaluate.py
    config: Any
    folder: Path  # for the picture
    shards: Shards  # the processes that share the images out

    def batches(self, source: Any, title: str, numbers: range) -> Iterable[list[Any]]:
        """Some items of a source in batches; the first process shows a progress bar."""
        return self.load(source, self.config, title, numbers, silent=not self.shards.is_main)

    def batches_with_boxes(self, title: str, numbers: range) -> Iterable[list[Any]]:
        """Some images of the split with their boxes, in batches."""
        return self.batches(self.samples.with_parts(frozenset({"objects"})), title, numbers)


# ---- pictures ------------------------------------------------------------------------------------
def picture_path(folder: Path, kind: str, encoder: Encoder) -> Path:
    """figures/affinity-random-tiny.png of the encoder random:tiny."""
    return folder / f"{kind}-{picture_name(encoder.name)}.png"


def save_figure(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


# ---- patches of two views ------------------------------------------------------------------------
class TwoViews(NamedTuple):
    """Two augmented views of an image."""

    crops: Tensor  # uint8 (2, 3, h, w); of bands, float (2, c, h, w)
    views: dk.View  # of both, (2,)
    boxes: Tensor  # (2, 4): one object in the frame of each view
    has_object: bool  # whether both views contain it


def photometric() -> transforms.Compose:
    """MoCo v2's random changes of a crop's colors and sharpness, as in dupr.py."""
    jitter = colors.ColorJitter(0.4, 0.4, 0.4, 0.1)
    blur = colors.RandomBlur((0.1, 2.0))
    return transforms.Compose(
        [
            as_picture,
            transforms.RandomApply([jitter], p=0.8),
            colors.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
            as_bytes,
        ]
    )


class PatchViews:
    """Views of the images of a split, as MoCo v2 makes them; the same in each run."""

    def __init__(self, samples: Any, size: tuple[int, int]):
        self.samples = samples
        self.size = size
        self.colors = photometric()

    def __getitem__(self, index: int) -> TwoViews:
        row = self.samples.rows[index]
        image = self.samples.images.read_image(row)
        size = (image.shape[-2], image.shape[-1])
        boxes, _ = self.samples.images.read_boxes(row, size)
        if not len(boxes):
            boxes = torch.zeros(1, 4)
        both = boxes[:1].expand(2, 1, 4)

        draws = harness.generator(3, row)
        views = sample_views_of(size, draws)
        seen = dk.boxes_in_view(views, both)
        for _ in range(ATTEMPTS):
            if seen.valid.all():
                break
            views = sample_views_of(size, draws)
            seen = dk.boxes_in_view(views, both)

        crops = []
        with harness.seeded(3, row):
            for view in dk.unstack_views(views):
                crop = dk.crop_views(bands.in_unit(image), view, self.size)
                if image.dtype == torch.uint8:  # the colors of bands stay as they are
                    crop = self.colors((crop * 255).round().clamp(0, 255).byte())
                crops.append(crop)
        return TwoViews(torch.stack(crops), views, seen.boxes[:, 0], bool(seen.valid.all()))


def sample_views_of(size: tuple[int, int], draws: torch.Generator) -> dk.View:
    """Two views (2,) of an image, which overlap by a tenth or more."""
    pair = dk.sample_view_pairs(size, min_overlap=0.1, generator=draws)
    return dk.stack_views([pair.view1, pair.view2])


@torch.no_grad()
def patches(encoder: Encoder, task: Task) -> dict:
    """How many cells of one view are found in another, and their affinity (DUPR, Fig 9, 10).

    A cell is found where its nearest cell by cosine is at most one cell away from the right place.
    The affinity is that of the bins of an object that both views contain, on the last level.
    """
    level = level_of_figures(encoder, task.config)
    source = PatchViews(task.samples, task.config.size)
    own = task.shards.part(len(task.samples))
    title = f"{encoder.name} patches"
    found = []  # of each image: cells found, by chance, and all; on the diagonal, objects
    affinity = []
    for batch in task.batches(source, title, own):
        crops = bands.in_unit(torch.stack([x.crops for x in batch]).to(device_of(encoder)))
        levels1 = encoder.levels(crops[:, 0])
        levels2 = encoder.levels(crops[:, 1])
        views = dk.stack_views([x.views for x in batch])
        view1 = dk.index_views(views, (slice(None), 0))
        view2 = dk.index_views(views, (slice(None), 1))
        cells = match_cells(levels1[level].cpu(), levels2[level].cpu(), view1, view2)

        boxes = torch.stack([x.boxes for x in batch])
        has_object = torch.tensor([x.has_object for x in batch])
        bins1 = pool_bins(levels1[-1].cpu(), boxes[:, 0], view1)
        bins2 = pool_bins(levels2[-1].cpu(), boxes[:, 1], view2)
        matrices = dk.affinity_matrix(bins1, bins2, temperature=TEMPERATURE)
        matrices = torch.where(has_object[:, None, None], matrices, 0.0)
        diagonal = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
        found.append(torch.cat([cells, torch.stack([diagonal, has_object.float()], 1)], 1))
        affinity.append(matrices.sum(0, keepdim=True))

    states = task.shards.gather_parts(found)
    matrices = task.shards.gather_parts(affinity)
    if states is None or matrices is None:
        return {}
    figure = viz.plot_affinity(matrices.sum(0) / states[:, 4].sum().clamp(min=1))
    save_figure(figure, picture_path(task.folder, "affinity", encoder))
    return patch_figures(states.double(), task.config)


def patch_figures(states: Tensor, config: Any) -> dict:
    """The figures of the split from those of each image (n, 5), in the order of `found`.

    Without an object that both views contain there is no figure of the diagonal.
    """

    def shares(sums: Tensor) -> Tensor:
        return sums[..., :-1] / sums[..., -1:].clamp(min=1)  # the last sum is the number of cases

    cells = interval_over_images(states[:, :3], shares, config.draws)
    figures = split_interval(cells, ("found", "chance"))
    figures["chance"] = figures["chance"].value
    if states[:, 4].any():
        objects = interval_over_images(states[:, 3:], shares, config.draws)
        figures |= split_interval(objects, ("diagonal",))
    return {
        **figures,
        "images": int((states[:, 2] > 0).sum()),
        "objects": int(states[:, 4].sum()),
    }


def match_cells(maps1: Tensor, maps2: Tensor, view1: dk.View, view2: dk.View) -> Tensor:
    """Of each image (b, 3): cells of view 1 that are found, expected by chance, and in view 2."""
    h, w = maps1.shape[-2:]
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
    centers = dk.grid_points(whole, (h, w))
    points = centers.expand(len(maps1), *centers.shape)
    target = dk.image_to_view(view2, dk.view_to_image(view1, points))
    is_inside = ((target >= 0) & (target <= 1)).all(-1)

    rows1 = dk.map_to_rows(maps1.float())
    rows2 = dk.map_to_rows(maps2.float())
    nearest = dk.nearest_rows(rows1, rows2).indices[..., 0]
    cells = torch.tensor([w, h])  # along x and y
    is_near = ((centers - target[:, :, None]).abs() * cells <= 1).all(-1)  # (b, n, n)
    is_right = is_near.gather(-1, nearest.clamp(min=0)[..., None])[..., 0] & (nearest >= 0)
    chance = is_near.float().mean(-1)
    facts = [is_right.float(), chance, torch.ones_like(chance)]
    return torch.stack([(x * is_inside).sum(1) for x in facts], 1)


def pool_bins(maps: Tensor, boxes: Tensor, view: dk.View) -> Tensor:
    """The bins (b, 196, d) of a box in each view, in the order of the image."""
    bins = dk.roi_align(maps.float(), boxes[:, None], ROI).features[:, 0]
    bins = torch.where(view.flip[:, None, None, None], bins.flip(-1), bins)
    return dk.map_to_rows(bins)


# ---- boxes ---------------------------------------------------------------------------------------
@torch.no_grad()
def similarity_iou(encoder: Encoder, task: Task) -> dict:
    """The cosine of a box and its moved copies, by their IoU (DUPR, Eq 8, Fig 5).

    It is the mean over the images, of the mean over the boxes of an image.
    """
    level = level_of_figures(encoder, task.config)
    own = task.shards.part(len(task.samples))
    number = own.start
    curves = []  # of each image, (1, ious)
    title = f"{encoder.name} similarity-iou"
    for batch in task.batches_with_boxes(title, own):
        images = bands.in_unit(torch.stack([x.image for x in batch]).to(device_of(encoder)))
        maps = encoder.levels(images)[level].float().cpu()
        for own_maps, sample in zip(maps, batch, strict=True):
            draws = harness.generator(4, number)
            curve = dk.similarity_iou_curve(own_maps, sample.boxes, ious=IOUS, generator=draws)
            curves.append(torch.where(curve.valid, curve.similarity, torch.nan)[None])
            number += 1

    together = task.shards.gather_parts(curves)
    if together is None:
        return {}
    mean = together.nanmean(0)
    figure = viz.plot_similarity_iou(IOUS, mean)
    save_figure(figure, picture_path(task.folder, "similarity", encoder))
    known = zip(IOUS, mean.tolist(), mean.isnan().tolist(), strict=True)
    return {f"at {iou}": value for iou, value, missing in known if not missing}


@torch.no_grad()
def bias(encoder: Encoder, task: Task) -> dict:
    """The coupling rate and mean cosine of each level, on objects cut out (D3SSL, Sec 3).

    An object and its neighbor are of different classes.
    """
    if not task.shards.is_main:
        return {}
    # `layer_bias` makes images of 3/2 and 5/2 of this side: all of them in whole cells.
    step = 2 * encoder.stride
    side = max(1, task.config.size[0] // 3 // step) * step
    objects: list[Tensor] = []
    classes: list[int] = []
    title = f"{encoder.name} bias"
    for batch in task.batches_with_boxes(title, range(len(task.samples))):
        for sample in batch:
            if len(sample.boxes):
                objects.append(cut_first_object(sample, side))
                classes.append(int(sample.classes[0]))
        if len(objects) >= OBJECTS:
            break
    own, others = pair_classes(torch.tensor(classes[:OBJECTS], dtype=torch.long))
    harness.check(
        len(own) > 1, "bias needs objects of two classes or more: choose another protocol."
    )

    model = NamedLevels(encoder)
    pictures = torch.stack(objects[:OBJECTS]).to(device_of(encoder))
    found = dk.layer_bias(model, pictures[own], model.names, pictures[others])
    figures = {}
    for number in range(len(model.names)):
        coupling = found.coupling_rate[number].item()
        cosine = found.mean_cosine[number].item()
        figures[f"level{number + 1}"] = {"coupling": coupling, "cosine": cosine}
    return {**figures, "objects": len(own)}


def pair_classes(classes: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of objects, and of a neighbor of another class for each of them.

    Sorted by class, the neighbor is as many objects further as the most frequent class has. What
    that class has more than all others is left out.
    """
    if not len(classes):
        return classes, classes
    order = classes.argsort(stable=True)
    counts = classes.bincount()
    frequent = int(counts.argmax())
    surplus = int(2 * counts[frequent] - len(classes))
    if surplus > 0:
        left_out = (classes[order] == frequent).nonzero()[:surplus, 0]
        kept = torch.ones(len(order), dtype=torch.bool)
        kept[left_out] = False
        order = order[kept]
    shift = int(classes[order].bincount().amax()) if len(order) else 0
    return order, order.roll(-shift)


def cut_first_object(sample: Any, side: int) -> Tensor:
    """The first object of an image, resized to a square; a picture is in [0, 1]."""
    h, w = sample.image.shape[-2:]
    box = sample.boxes[0] * torch.tensor([w, h, w, h])
    return dk.crop_views(bands.in_unit(sample.image), dk.View(box, torch.tensor(False)), side)


class NamedLevels(torch.nn.Module):
    """The encoder with a module for each of its levels, which `layer_bias` finds by its name."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        count = len(encoder.strides)
        self.level = torch.nn.ModuleList(torch.nn.Identity() for _ in range(count))
        self.names = [f"level.{number}" for number in range(count)]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.encoder.levels(images)
        return [level(x) for level, x in zip(self.level, maps, strict=True)]


@torch.no_grad()
def health_of_split(encoder: Encoder, task: Task) -> dict:
    """Scores that need no labels, of the first images of the split."""
    if not task.shards.is_main:
        return {}

    def batches() -> Iterator[list]:
        title = f"{encoder.name} health"
        for batch in task.batches_with_boxes(title, range(len(task.samples))):
            yield [x._replace(image=bands.in_unit(x.image)) for x in batch]

    return health(encoder, batches(), task.config, task.folder)


DIAGNOSTICS = {
    "patches": patches,
    "similarity-iou": similarity_iou,
    "bias": bias,
    "health": health_of_split,
}


# ---- a diagnostic of features --------------------------------------------------------------------
def thumbnail(image: Tensor) -> Tensor:
    """A picture of at most the size that the file shows."""
    side = max(image.shape[-2:])
    size = [max(1, THUMBNAIL * length // side) for length in image.shape[-2:]]
    if side <= THUMBNAIL:
        return image
    return transforms.functional.resize(image, size, antialias=True)


def nearest_images(maps: Tensor, count: int) -> Tensor:
    """The numbers (n, count) of the images with the largest cosine of whole maps, the best first.

    Unlike `dk.nearest_maps` it makes no copy of the maps, which stay in half precision: some
    columns at a time are widened.
    """
    rows = maps.movedim(1, -1).flatten(1)
    images_at_once = max(1, BLOCK // rows.shape[1])
    lengths = torch.cat([x.float().norm(dim=1) for x in rows.split(images_at_once)])
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)[:, None]

    nearest = []
    queries_at_once = max(1, COSINES // len(rows))
    for first in range(0, len(rows), queries_at_once):
        queries = slice(first, first + queries_at_once)
        cosines = torch.zeros(len(scale[queries]), len(rows), device=maps.device)
        for columns in rows.split(max(1, BLOCK // len(rows)), 1):
            part = columns.float() * scale
            cosines.addmm_(part[queries], part.mT)
        nearest.append(cosines.topk(min(count, len(rows))).indices)
    return torch.cat(nearest)


def retrieval(
    encoder: Encoder, picture: Callable[[int], Tensor], test: Features, config: Any, folder: Path
) -> dict:
    """The four images whose maps agree most, place by place (DUPR, Fig 6 and 8).

    The figure is the share of them that have the main class of the image that is looked up; an
    image without a class is not looked up.
    """
    harness.check(len(test.maps) > 1, "retrieval needs two images or more: give another --split.")
    nearest = nearest_images(test.maps, 5).cpu()
    is_other = nearest != torch.arange(len(nearest))[:, None]
    # The image itself is left out, or the last one, where more than four are equal to it.
    is_other[:, -1] &= ~is_other.all(1)
    nearest = nearest[is_other].view(len(nearest), nearest.shape[1] - 1)

    rows = torch.arange(min(6, len(nearest)))
    shown = torch.cat([rows[:, None], nearest[rows]], 1)
    tiles = [thumbnail(picture(int(number))) for row in shown for number in row]
    path = picture_path(folder, "retrieval", encoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.stack(tiles), path, nrow=shown.shape[1])

    classes = main_class(test)
    same = (classes[nearest] == classes[:, None]).double()
    known = classes >= 0
    harness.check(bool(known.any()), "No image has a class: choose another protocol.")
    facts = torch.stack([same.mean(1) * known, known.double()], 1)

    def share(sums: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1].clamp(min=1)

    interval = interval_over_images(facts, share, config.draws)
    return {"same main class": interval, "queries": int(known.sum())}
