"""benchmarks/conformance.py: it passes what is right, sees what is not, and its rows are of now."""

import importlib.metadata
import json
import sys
from functools import partial

import pytest
import torch
from files import ROOT
import densekit as dk
from densekit.testing import check_view_geometry

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "docs")]

import conformance
import conformance_table

ROWS = [json.loads(line) for line in (ROOT / "docs" / "conformance.jsonl").read_text().splitlines()]


def of_densekit(image, points, box=None, size=None, flips=(False, False), angle=0, off=0.0):
    """A library that is right by edges; it may be a bit off."""
    if angle:
        raise conformance.NotOfferedError("a rotation")
    height, width = image.shape[-2:]
    box = box or (0, 0, width, height)
    size = size or (int(box[3] - box[1]), int(box[2] - box[0]))
    view = dk.View(torch.tensor(box).to(points), *map(torch.tensor, flips))
    moved = dk.image_to_view(view, points + off) * points.new_tensor([size[1], size[0]])
    return dk.crop_views(image, view, size), moved


def test_what_is_right_by_one_way_of_counting_passes():
    check_view_geometry(conformance.as_map(of_densekit, 0.0))
    for convention, shift in conformance.CONVENTIONS.items():
        found = conformance.vectors(of_densekit, shift)
        assert found["offered"] == len(dk.testing.view_geometry_cases()) - 1  # one has no point
        assert (found["passed"] == found["offered"]) == (convention == "edges")
        errors = {each: conformance.pixels(of_densekit, shift, each) for each in ("flip", "resize")}
        right = {"flip": 0.0, "resize": 0.0}
        wrong = {"flip": 1.0, "resize": 0.333}  # 1 - 20 / 60, half of it on each side of the center
        assert errors == pytest.approx(right if convention == "edges" else wrong, abs=2e-3)
    assert conformance.pixels(of_densekit, 0.0, "rotate by 30") is None


def test_half_a_pixel_is_seen():
    found = conformance.vectors(partial(of_densekit, off=0.5), 0.0)
    assert found["passed"] == 0
    for each in ("crop", "flip", "resize"):
        assert conformance.pixels(partial(of_densekit, off=0.5), 0.0, each) == 0.5


@pytest.mark.parametrize("name", ["torchvision", "kornia"])
def test_the_rows_are_those_of_the_version_that_is_installed(name):
    pytest.importorskip(name)
    own = [row for row in ROWS if row["library"] == name]
    if own[0]["version"] != importlib.metadata.version(name):
        pytest.skip(f"the rows are of {name} {own[0]['version']}")
    assert json.loads(json.dumps(conformance.rows_of(name))) == own


def test_the_tables_have_all_rows(monkeypatch):
    monkeypatch.chdir(ROOT)
    ways = {(row["library"], row.get("what")) for row in ROWS if row["check"] == "vectors"}
    assert {library for library, _ in ways} >= {*conformance.LIBRARIES, "albumentationsx"}
    assert conformance_table.vectors_table().count("\n") == len(ways) + 2
    assert conformance_table.pixels_table().count("\n") == 2 * len(ways) + 2
