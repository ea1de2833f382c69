"""The diagnostics of evaluate.py: figures of one encoder on the images of one split.

No command of its own. Each takes the encoder, batches of samples (image, boxes in [0, 1]), the
configuration and the folder for its picture.
"""

import re
from pathlib import Path
from typing import Any

import harness
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid
import densekit as dk
from downstream.encoders import Encoder
from downstream.protocols import Features, main_class


def place(encoder: Encoder) -> torch.device:
    return next(encoder.parameters()).device


def slug(encoder: Encoder) -> str:
    return re.sub(r"[^\w.-]+", "-", encoder.name).strip("-")


def draw(path: Path, paint: Any) -> None:
    figure = Figure(figsize=(4, 4), layout="constrained")
    paint(figure.subplots())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


@torch.no_grad()
def patches(encoder: Encoder, batches: Any, config: Any, folder: Path) -> dict:
    """Patches of one view found in another, their affinity (DUPR, Fig 9 and 10)."""
    right, total, affinity, n = 0, 0, torch.zeros(49, 49), 0
    device = place(encoder)
    for number, batch in enumerate(batches):
        images = torch.stack([x.image for x in batch])
        pairs = dk.sample_view_pairs(
            config.size, (len(images),), min_overlap=0.1, generator=harness.generator(3, number)
        )
        maps = [
            encoder(dk.crop_views(images, view, config.size).to(device)).float().cpu()
            for view in (pairs.view1, pairs.view2)
        ]
        both = dk.gridsample_pairs(*maps, pairs.view1, pairs.view2)
        match = dk.match_patches(both.features1, both.features2)
        right += int((match.indices[both.valid][..., 0] == torch.arange(49)).sum())
        total, n = total + 49 * int(both.valid.sum()), n + int(both.valid.sum())
        matrix = dk.affinity_matrix(both.features1, both.features2, temperature=0.05)
        affinity += matrix[both.valid].sum(0)
    draw(
        folder / f"affinity-{slug(encoder)}.png",
        lambda ax: ax.imshow((affinity / max(1, n)).numpy()),
    )
    return {"found": right / max(1, total), "chance": 1 / 49, "images": n}


@torch.no_grad()
def similarity_iou(encoder: Encoder, batches: Any, config: Any, folder: Path) -> dict:
    """Cosine of a box and its moved copies (DUPR, Eq 8, Fig 5)."""
    ious, curves, device = (0.1, 0.3, 0.5, 0.7, 0.9), [], place(encoder)
    for number, batch in enumerate(batches):
        maps = encoder(torch.stack([x.image for x in batch]).to(device)).float().cpu()
        boxes = torch.nn.utils.rnn.pad_sequence([x.boxes for x in batch], batch_first=True)
        valid = dk.boxes_valid(boxes)
        draws = harness.generator(4, number)
        curve = dk.similarity_iou_curve(maps, boxes, valid, ious=ious, generator=draws)
        curves.append(torch.where(curve.valid, curve.similarity, torch.nan))
    mean = torch.stack(curves).nanmean(0).tolist()
    draw(folder / f"similarity-{slug(encoder)}.png", lambda ax: ax.plot(ious, mean, marker="o"))
    return {f"at {iou}": value for iou, value in zip(ious, mean, strict=True) if value == value}


def retrieval(encoder: Encoder, images: Any, test: Features, folder: Path) -> dict:
    """The four images whose maps agree most, place by place (DUPR, Fig 6 and 8)."""
    best = dk.nearest_maps(test.maps[:6].float(), test.maps.float(), k=5).indices
    tiles = [images(int(i)) for row in best for i in row]  # each one first finds itself
    grid = make_grid(torch.stack(tiles), nrow=best.shape[1])
    draw(
        folder / f"retrieval-{slug(encoder)}.png",
        lambda ax: ax.imshow(grid.permute(1, 2, 0).numpy()),
    )
    classes = main_class(test)
    same = (classes[best[:, 1:]] == classes[best[:, :1]]).float().mean()
    return {"same main class": same, "queries": len(best)}


@torch.no_grad()
def bias(encoder: Encoder, batches: Any, config: Any, folder: Path) -> dict:
    """Coupling rate and mean cosine of each level, on objects cut out (D3SSL, Sec 3)."""
    # The images made of a picture are 3/2 and 5/2 of its sides: all of them in whole cells.
    step, cut = 2 * encoder.stride, []
    side = max(1, config.size[0] // 3 // step) * step
    for batch in batches:
        for x in batch:
            h, w = x.image.shape[-2:]
            boxes = x.boxes[:1] * torch.tensor([w, h, w, h])
            cut += [dk.crop_views(x.image, dk.View(y, torch.tensor(False)), side) for y in boxes]
    if len(cut) < 2:
        raise harness.UserError("bias needs two objects or more: choose another protocol.")
    device = place(encoder)
    model = Levels(encoder)
    names = [f"level.{i}" for i in range(len(model.level))]
    found = dk.layer_bias(model, torch.stack(cut[:256]).to(device), names)
    levels = zip(found.coupling_rate.tolist(), found.mean_cosine.tolist(), strict=True)
    return {f"level{i}": {"coupling": a, "cosine": b} for i, (a, b) in enumerate(levels, 1)}


class Levels(torch.nn.Module):  # names the levels, for `layer_bias`
    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        count = len(encoder.levels(torch.zeros(1, 3, 224, 224, device=place(encoder))))
        self.level = torch.nn.ModuleList(torch.nn.Identity() for _ in range(count))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.encoder.levels(images)
        return [level(x) for level, x in zip(self.level, maps, strict=True)]


ALONE = {"patches": patches, "similarity-iou": similarity_iou, "bias": bias}
