"""benchmarks/croc_control.py: its regions are those of the scenes, and a run takes them."""

import json
import sys

import harness
import pytest
import torch
from files import ROOT
import densekit as dk

# At the end: the recipes come first, because both they and the benchmarks have an adapt.py.
sys.path += [str(ROOT / "benchmarks")]

import croc
import croc_control

SCENES = 80  # of more than one drawing of 64


def test_a_true_region_has_one_class_and_is_an_object_or_a_ground():
    regions = croc_control.true_regions(SCENES)
    images = torch.stack([image for image, _ in harness.SceneImages(SCENES)])
    for number, start in enumerate((0, 64)):
        part = slice(start, min(start + 64, SCENES))
        drawn = dk.sample_scenes(
            len(regions[part]), (64, 64), generator=harness.generator(0, number)
        )
        assert torch.equal((drawn.images * 255).round().byte(), images[part])
        for region, label, instance in zip(
            regions[part], drawn.labels, drawn.instances, strict=True
        ):
            assert torch.equal(region >= 2, instance > 0)
            for name in region.unique():
                assert len(label[region == name].unique()) == 1
                assert len(instance[region == name].unique()) == 1
            grounds = label[instance == 0].unique()
            assert torch.equal(region[instance == 0].unique(), torch.arange(len(grounds)).byte())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["truth", "places", "none"])
def test_a_control_trains_with_the_demo_s_options(kind, tmp_path, monkeypatch, capsys):
    scenes = harness.SceneImages(SCENES)
    monkeypatch.setattr(harness, "SceneImages", lambda count: scenes)
    regions = croc_control.true_regions(SCENES)
    monkeypatch.setattr(croc_control, "true_regions", lambda count: regions)
    monkeypatch.setattr(harness, "image_seeds", harness.image_seeds)  # put back afterwards
    monkeypatch.setattr(croc.CrOC, "find_clusters", croc.CrOC.find_clusters)
    words = ["croc_control.py", "--clusters", kind, "--run", str(tmp_path / "run")]
    words += ["--epochs", "1", "--batch", "40", "--device", "cpu", "--workers", "0"]
    words += ["--log-every", "1"]
    monkeypatch.setattr(sys, "argv", words)
    croc_control.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["clusters"] == kind
    assert found["steps"] == 2
    assert len(found["probe"]) == 2
    if kind == "none":
        assert found["valid"] is None
    else:
        assert 1 < found["valid"] <= {"truth": 10, "places": 9}[kind]
