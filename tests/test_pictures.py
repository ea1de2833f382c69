"""docs/pictures.py without weights: what it draws, what it trains on, and the picture of README."""

import sys

import torch
from files import ROOT
from PIL import Image
from torch import nn
import densekit as dk
from densekit.scenes import sample_scenes

sys.path.append(str(ROOT / "docs"))

import pictures


def test_the_figure_has_eight_pictures_and_four_titles():
    scene = sample_scenes(1, (60, 90), generator=torch.Generator().manual_seed(0)).images[0]
    views = dk.View(pictures.VIEWS.box / 5, pictures.VIEWS.flip)
    encoders = [nn.Conv2d(3, 6, 8, 8), nn.Conv2d(3, 6, 8, 8)]
    figure = pictures.draw(scene, views, *encoders, side=64)
    panels = {part.get_suptitle(): len(part.axes) for part in figure.subfigs}
    assert panels == dict(zip(pictures.TITLES, (1, 2, 2, 2), strict=True))
    first, second = figure.axes[0].collections[-2:]
    assert len(first.get_offsets()) == len(second.get_offsets()) == len(pictures.ROWS)


def test_clusters_of_two_maps_have_the_same_labels():
    maps = torch.rand(1, 4, 3, 5).expand(2, -1, -1, -1).clone()
    labels = pictures.find_clusters(maps, 3)
    assert labels.shape == (2, 3, 5)
    assert torch.equal(*labels)


def test_the_pieces_to_train_on_are_of_the_two_photographs(tmp_path):
    pictures.cut_pieces(tmp_path)
    pieces = sorted(tmp_path.iterdir())
    assert [path.name.split("-")[0] for path in pieces] == 16 * ["chelsea"] + 16 * ["coffee"]
    for path in pieces:
        with Image.open(path) as piece:
            assert piece.size == (200, 200)
    assert pictures.photograph().shape == (3, 300, 451)


def test_the_picture_of_the_readme_is_small_and_has_no_ground():
    assert f"](docs/{pictures.PICTURE.name})" in (ROOT / "README.md").read_text()
    assert pictures.PICTURE.stat().st_size <= 300_000
    with Image.open(pictures.PICTURE) as picture:
        assert picture.getpixel((0, 0))[3] == 0
