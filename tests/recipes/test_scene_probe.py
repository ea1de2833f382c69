"""downstream/scene_probe.py: the score of a probe and the picture beside it."""

import numpy as np
import pytest
import torch
from downstream import scene_probe
from PIL import Image
from torch.nn.functional import one_hot
import densekit as dk
from densekit import viz

GAP = 2  # pixels between two panels
SIDE = scene_probe.PANEL_SIDE


def panel(path, row, column):
    """One panel of the picture, as a label map of its colors."""
    with Image.open(path) as picture:
        pixels = np.array(picture)
    y, x = [GAP + number * (SIDE + GAP) for number in (row, column)]
    return pixels[y : y + SIDE, x : x + SIDE]


def test_an_encoder_that_knows_the_classes_has_their_maps_and_no_label_moves(tmp_path):
    known = {}
    for count, seed in ((scene_probe.FITTED, 2), (scene_probe.SHOWN, 3)):
        drawn = dk.sample_scenes(count, (64, 64), generator=torch.Generator().manual_seed(seed))
        pairs = zip(drawn.images, drawn.labels, strict=True)
        known |= {image.numpy().tobytes(): labels for image, labels in pairs}

    def encode(images):
        labels = torch.stack([known[image.numpy().tobytes()] for image in images])
        return one_hot(labels.long(), scene_probe.CLASSES).movedim(-1, 1).float()

    scene_probe.draw(encode, tmp_path / "probe.png")
    for row in range(scene_probe.SHOWN):
        truth, probed, clusters = [panel(tmp_path / "probe.png", row, x) for x in (1, 2, 3)]
        assert np.array_equal(truth, probed)
        assert np.array_equal(truth, clusters)
        labels = drawn.labels[row].repeat_interleave(SIDE // 64, 0).repeat_interleave(SIDE // 64, 1)
        want = viz.label_colors(labels).mul(255).add(0.5).clamp(0, 255).to(torch.uint8)
        assert np.array_equal(truth, want.numpy())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_encoder_that_knows_nothing_has_one_class_everywhere(value, tmp_path, monkeypatch):
    monkeypatch.setattr(scene_probe, "FITTED", 8)
    scene_probe.draw(lambda x: torch.full((len(x), 5, 4, 4), value), tmp_path / "probe.png")
    probed = np.stack([panel(tmp_path / "probe.png", row, 2) for row in range(scene_probe.SHOWN)])
    assert len(np.unique(probed.reshape(-1, 3), axis=0)) == 1


def test_the_score_is_that_of_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(scene_probe, "FITTED", 8)
    probe = dk.probe_scenes
    monkeypatch.setattr(dk, "probe_scenes", lambda encode: probe(encode, count=8))

    def encode(images):
        return images[..., ::8, ::8]

    terms = scene_probe.probe(encode, tmp_path / "probe.png")
    miou, prior = probe(encode, count=8)
    assert terms == {"probe_miou": miou, "prior_miou": prior}
    assert (tmp_path / "probe.png").is_file()
