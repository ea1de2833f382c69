"""The picture of the first page: two views, their matched points, clusters, and PCA colors.

    pip install ".[recipes,weights]" scikit-image
    python docs/pictures.py          # some minutes: it trains first, by recipes/adapt.py

The photograph is Chelsea the cat of scikit-image, CC0 by its photographer Stefan van der Walt. The
encoder is EfficientNet-lite0, before and after 64 steps of adapt.py's demo, without labels, on 32
pieces of two photographs: this one, and the cup of coffee by Rachel Michetti, CC0 as well.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
import densekit as dk
from densekit import viz

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "first-page.png"
VIEWS = dk.View(  # of the photograph, which has 300 x 451 pixels
    torch.tensor([[60.0, 10.0, 340.0, 290.0], [140.0, 40.0, 390.0, 290.0]]),
    torch.tensor([False, True]),
)
SIDE = 512  # of the views, in pixels, for the encoder
ROWS = (1, 4, 6, 2, 0, 5, 3)  # of the matched points, from left to right
CLUSTERS = 5
TITLES = (
    "the same points",
    "clusters of both views",
    "PCA before adapt.py",
    "PCA after adapt.py",
)
GRAY = "#808080"  # of all text: it can be read on white and on black


def photograph() -> Tensor:
    """The photograph in [0, 1], (3, 300, 451)."""
    from skimage import data

    return torch.from_numpy(data.chelsea()).movedim(-1, 0).float() / 255


def cut_pieces(folder: Path) -> None:
    """Write 16 pieces of 200 x 200 pixels of each of the two photographs, to train on."""
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    side = 200
    for name in ("chelsea", "coffee"):
        pixels = getattr(data, name)()
        height, width, _ = pixels.shape
        for number in range(16):
            row, column = divmod(number, 4)
            y = row * (height - side) // 3
            x = column * (width - side) // 3
            piece = pixels[y : y + side, x : x + side]
            Image.fromarray(piece).save(folder / f"{name}-{number:02d}.png")


def train(folder: Path) -> Path:
    """Train on the pieces by adapt.py's demo; a finished run ends at once. Returns its folder."""
    pieces = folder / "pieces"
    run = folder / "adapt"
    cut_pieces(pieces)
    command = [sys.executable, str(ROOT / "recipes" / "adapt.py"), "--epochs", "32"]
    subprocess.run([*command, "--data", str(pieces), "--run", str(run)], check=True)
    return run


def find_clusters(maps: Tensor, count: int) -> Tensor:
    """k-means of the cells of all maps together, so that a label means the same in each of them."""
    rows = dk.l2_normalize(dk.map_to_rows(maps).flatten(0, 1))
    start = dk.kmeans_plus_plus(rows, count, generator=torch.Generator().manual_seed(0))
    return dk.kmeans(rows, start).labels.unflatten(0, (len(maps), *maps.shape[-2:]))


@torch.no_grad()
def draw(
    photo: Tensor, views: dk.View, before: Callable, after: Callable, *, side: int = SIDE
) -> Any:
    """The figure of two views (2,) of a photograph, and of two encoders that give maps of them."""
    from matplotlib.figure import Figure

    crops = dk.crop_views(photo.expand(2, -1, -1, -1), views, side)
    view1, view2 = dk.unstack_views(views)
    shared = dk.intersect_views(view1, view2)
    # One point in each row and each column of a grid, so that no two lines lie on each other.
    grid = dk.grid_points(shared.box, len(ROWS)).unflatten(0, (len(ROWS), len(ROWS)))
    points = grid[torch.tensor(ROWS), torch.arange(len(ROWS))]
    points1 = dk.image_to_view(view1, points)
    points2 = dk.image_to_view(view2, points)
    maps_before = before(crops)
    maps_after = after(crops)

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    parts = list(figure.subfigures(2, 2).flat)
    for part, title in zip(parts, TITLES, strict=True):
        part.suptitle(title, color=GRAY, size=17)
    matches, clusters, start, end = parts
    colors = viz.label_colors(torch.arange(len(points)))
    viz.plot_matches(*crops, points1, points2, colors=colors, axes=matches.subplots())
    viz.plot_clusters(crops, find_clusters(maps_after, CLUSTERS), axes=clusters.subplots(1, 2))
    panels = [*start.subplots(1, 2), *end.subplots(1, 2)]
    viz.plot_pca([*maps_before, *maps_after], axes=panels)
    return figure


def main() -> None:
    """Train, then write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/first-page"))
    folder = parser.parse_args().folder
    run = train(folder)

    sys.path.insert(0, str(ROOT / "recipes"))
    from downstream import encoders

    before = encoders.load_encoder("lite0")
    after = encoders.load_encoder(str(run))
    figure = draw(photograph(), VIEWS, before, after)
    figure.savefig(PICTURE, dpi=100, transparent=True, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
