"""The diagnostics of evaluate.py: figures of one encoder on the images of one split.

This module is no command. Each function takes the encoder, batches of samples (an image, and its
boxes in [0, 1]), the configuration, and the folder for its picture. `DIAGNOSTICS` has them by name;
`retrieval` stands alone, because it takes the features of the split.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import harness
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid
import densekit as dk
from downstream.encoders import Encoder, device_of
from downstream.health import health
from downstream.protocols import Features, main_class

IOUS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of a box and its copies
PATCHES = 49  # of a view: 7 x 7


# ---- pictures ------------------------------------------------------------------------------------
def picture_path(folder: Path, kind: str, encoder: Encoder) -> Path:
    """figures/affinity-random-tiny.png of the encoder random:tiny."""
    name = re.sub(r"[^\w.-]+", "-", encoder.name).strip("-")
    return folder / f"{kind}-{name}.png"


def new_figure() -> tuple[Figure, Any]:
    """A square figure and its axes."""
    figure = Figure(figsize=(4, 4), layout="constrained")
    return figure, figure.subplots()


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


# ---- diagnostics of batches ----------------------------------------------------------------------
@torch.no_grad()
def patches(encoder: Encoder, batches: Iterable, config: Any, folder: Path) -> dict:
    """How many patches of one view are found in another, and their affinity (DUPR, Fig 9, 10)."""
    device = device_of(encoder)
    own_number = torch.arange(PATCHES)
    right = 0
    valid_pairs = 0
    affinity = torch.zeros(PATCHES, PATCHES)

    for number, batch in enumerate(batches):
        images = torch.stack([x.image for x in batch])
        draws = harness.generator(3, number)
        views = dk.sample_view_pairs(config.size, (len(images),), min_overlap=0.1, generator=draws)
        crops1 = dk.crop_views(images, views.view1, config.size)
        crops2 = dk.crop_views(images, views.view2, config.size)
        maps1 = encoder(crops1.to(device)).float().cpu()
        maps2 = encoder(crops2.to(device)).float().cpu()

        pairs = dk.gridsample_pairs(maps1, maps2, views.view1, views.view2)
        overlap = pairs.valid.all(1)
        matches = dk.match_by_feature(pairs.features1, pairs.features2)
        found = matches.indices2[overlap]
        right += int((found == own_number).sum())
        valid_pairs += int(overlap.sum())
        matrices = dk.affinity_matrix(pairs.features1, pairs.features2, temperature=0.05)
        affinity += matrices[overlap].sum(0)

    figure, axes = new_figure()
    axes.imshow((affinity / max(1, valid_pairs)).numpy())
    save_figure(figure, picture_path(folder, "affinity", encoder))
    return {
        "found": right / max(1, PATCHES * valid_pairs),
        "chance": 1 / PATCHES,
        "images": valid_pairs,
    }


@torch.no_grad()
def similarity_iou(encoder: Encoder, batches: Iterable, config: Any, folder: Path) -> dict:
    """The cosine of a box and its moved copies, by their IoU (DUPR, Eq 8, Fig 5)."""
    device = device_of(encoder)
    curves = []
    for number, batch in enumerate(batches):
        images = torch.stack([x.image for x in batch])
        maps = encoder(images.to(device)).float().cpu()
        boxes = torch.nn.utils.rnn.pad_sequence([x.boxes for x in batch], batch_first=True)
        valid = dk.boxes_valid(boxes)  # what pads has no area
        draws = harness.generator(4, number)
        curve = dk.similarity_iou_curve(maps, boxes, valid, ious=IOUS, generator=draws)
        curves.append(torch.where(curve.valid, curve.similarity, torch.nan))
    mean = torch.stack(curves).nanmean(0)

    figure, axes = new_figure()
    axes.plot(IOUS, mean.tolist(), marker="o")
    save_figure(figure, picture_path(folder, "similarity", encoder))
    known = zip(IOUS, mean.tolist(), mean.isnan().tolist(), strict=True)
    return {f"at {iou}": value for iou, value, missing in known if not missing}


@torch.no_grad()
def bias(encoder: Encoder, batches: Iterable, config: Any, folder: Path) -> dict:
    """The coupling rate and mean cosine of each level, on objects cut out (D3SSL, Sec 3)."""
    # `layer_bias` makes images of 3/2 and 5/2 of this side: all of them in whole cells.
    step = 2 * encoder.stride
    side = max(1, config.size[0] // 3 // step) * step
    objects = []
    for batch in batches:
        objects += cut_first_objects(batch, side)
    if len(objects) < 2:
        raise harness.UserError("bias needs two objects or more: choose another protocol.")

    model = NamedLevels(encoder)
    images = torch.stack(objects[:256]).to(device_of(encoder))
    found = dk.layer_bias(model, images, model.names)
    figures = {}
    for number in range(len(model.names)):
        coupling = found.coupling_rate[number].item()
        cosine = found.mean_cosine[number].item()
        figures[f"level{number + 1}"] = {"coupling": coupling, "cosine": cosine}
    return figures


def cut_first_objects(batch: list, side: int) -> list[Tensor]:
    """The first object of each image that has one, resized to a square."""
    objects = []
    for sample in batch:
        if not len(sample.boxes):
            continue
        h, w = sample.image.shape[-2:]
        box = sample.boxes[0] * torch.tensor([w, h, w, h])
        objects.append(dk.crop_views(sample.image, dk.View(box, torch.tensor(False)), side))
    return objects


class NamedLevels(torch.nn.Module):
    """The encoder with a module for each of its levels, which `layer_bias` finds by its name."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        channels = len(encoder.mean)
        maps = encoder.levels(torch.zeros(1, channels, 224, 224, device=device_of(encoder)))
        self.level = torch.nn.ModuleList(torch.nn.Identity() for _ in maps)
        self.names = [f"level.{number}" for number in range(len(maps))]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.encoder.levels(images)
        return [level(x) for level, x in zip(self.level, maps, strict=True)]


DIAGNOSTICS = {
    "patches": patches,
    "similarity-iou": similarity_iou,
    "bias": bias,
    "health": health,
}


# ---- a diagnostic of features --------------------------------------------------------------------
def retrieval(
    encoder: Encoder, image: Callable[[int], Tensor], test: Features, folder: Path
) -> dict:
    """The four images whose maps agree most, place by place (DUPR, Fig 6 and 8)."""
    queries = test.maps[:6].float()
    nearest = dk.nearest_maps(queries, test.maps.float(), k=5).indices  # the first is the query

    tiles = [image(int(number)) for row in nearest for number in row]
    grid = make_grid(torch.stack(tiles), nrow=nearest.shape[1])
    figure, axes = new_figure()
    axes.imshow(grid.permute(1, 2, 0).numpy())
    save_figure(figure, picture_path(folder, "retrieval", encoder))

    classes = main_class(test)[nearest]
    same = (classes[:, 1:] == classes[:, :1]).float().mean()
    return {"same main class": same, "queries": len(nearest)}
