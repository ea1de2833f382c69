"""benchmarks/demos.py: every demo is made once, by its own command, and the rule of a claim."""

import json
import sys
from dataclasses import replace

import pytest
from files import ROOT

# At the end: the recipes come first, because both they and the benchmarks have an adapt.py.
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "docs")]

import croc
import croc_control
import d3ssl
import demos
import densesiam
import densesiam_segment
import dupr
import evidence
import evidence_tables
import scene_labels

RECIPES = {
    "recipes/croc.py": croc,
    "recipes/d3ssl.py": d3ssl,
    "recipes/densesiam.py": densesiam,
    "recipes/densesiam_segment.py": densesiam_segment,
    "recipes/dupr.py": dupr,
}


def row(side, seed, last, **changes):
    """A row as a demo that ended has it."""
    start = {"study": demos.STUDY, "kind": "demo", "side": side, "seed": seed}
    end = {"seconds": 60.0, "commit": "c", "steps": 9, "scores": [[0, 0.05], [9, last]]}
    return {**start, "status": "done", **end, "terms": {"valid": 1 - last}, **changes}


def demos_in(folder, *sides):
    study = evidence.Study(folder, folder / "runs", folder / "rows.jsonl")
    return demos.Demos(study, sides, {"data": folder / "set", "densesiam": folder / "run"})


@pytest.mark.parametrize("side", demos.SIDES)
def test_each_command_is_accepted_by_its_recipe(side, tmp_path, monkeypatch):
    script = demos.SIDES[side].script
    words = demos.command_of(demos_in(tmp_path), side, 3)[1:]
    monkeypatch.setattr(sys, "argv", words)
    if script == "benchmarks/scene_labels.py":
        monkeypatch.setattr(scene_labels, "train", lambda *told: [{"told": told[:2]}])
        scene_labels.main()
        (row,) = (tmp_path / f"runs/demo-{side}-3/metrics.jsonl").read_text().splitlines()
        assert json.loads(row)["told"] == [side.removesuffix("-labels"), 3]
        return
    if script == "benchmarks/croc_control.py":  # it trains croc.py
        given = []
        monkeypatch.setattr(croc, "train", given.append)
        monkeypatch.setattr(croc.CrOC, "find_clusters", None)
        monkeypatch.setattr(croc_control.harness, "image_seeds", None)
        monkeypatch.setattr(croc_control, "true_regions", lambda count: None)
        with pytest.raises(FileNotFoundError):  # the log of a training that was not made
            croc_control.main()
        config = given[0]
    else:
        config = RECIPES[script].read_options()
    assert config.seed == 3
    assert (config.lr == 0) == side.endswith("-random")
    assert demos.needs(side) <= {"data", "densesiam"}
    assert config.data == (tmp_path / "set" if side.startswith("segment") else None)
    shown = demos.shown_command(demos_in(tmp_path), side, 3)
    assert str(tmp_path) not in shown


def test_pairs_name_sides_that_share_two_seeds_or_more():
    for side, other, measures in demos.PAIRS:
        shared = set(demos.SIDES[side].seeds) & set(demos.SIDES[other].seeds)
        assert len(shared) >= 2
        assert {*measures} <= {"score", *demos.TERMS}


def test_all_demos_are_made_once_and_compared_once(tmp_path, monkeypatch):
    some = demos_in(tmp_path, "densesiam", "simsiam")
    study = some.study
    names = []

    def call(study, command, log, name):
        names.append(name)
        run = study.runs / name
        run.mkdir(exist_ok=True)
        log.write_text("It broke.\n")
        step = {"step": 9, "probe_miou": 0.1 if "simsiam" in name else 0.2, "valid": 4.0}
        (run / "metrics.jsonl").write_text(json.dumps(step) + "\n")
        return 3 if name == "demo-simsiam-4" and names.count(name) < 2 else 0

    monkeypatch.setattr(evidence, "call", call)
    for _ in range(2):
        demos.make_all(some)
    assert len(names) == len(set(names)) == 10
    rows = evidence.read_rows(study.rows, demos.STUDY)
    assert [x["status"] for x in rows].count("failed") == 1
    assert rows[-1]["message"] == "It broke."
    assert evidence_tables.demo_tables(study.rows).count("failed: It broke.") == 1

    again = replace(some, study=replace(study, retry=True, tried=set()))
    for _ in range(2):
        demos.make_all(again)
    assert names.count("demo-simsiam-4") == 2
    rows = evidence.read_rows(study.rows, demos.STUDY)
    found = [x for x in rows if x["kind"] == "demo comparison"]
    assert len(found) == 1
    assert found[0]["difference"] == pytest.approx(0.1)
    assert found[0]["claim"] == "higher"
    assert "densesiam against simsiam | score | 0.100 [0.100, 0.100] | 5 of 5 | higher" in (
        evidence_tables.demo_tables(study.rows)
    )
    assert "failed and were made again: simsiam 4 (It broke.)" in (
        evidence_tables.demo_tables(study.rows)
    )

    # A row that replaces another one is compared anew, and the page shows the last comparison.
    evidence.add_row(study.rows, row("simsiam", 4, 0.3))
    for _ in range(2):
        demos.make_all(some)
    rows = evidence.read_rows(study.rows, demos.STUDY)
    found = [x for x in rows if x["kind"] == "demo comparison"]
    assert [x["claim"] for x in found] == ["higher", "no difference shown"]


@pytest.mark.parametrize(
    ("differences", "claim"),
    [
        ((0.010, 0.011, 0.012, 0.011, 0.010), "higher"),
        ((-0.010, -0.011, -0.012, -0.011, -0.010), "lower"),
        ((0.030, 0.030, 0.030, 0.030, -0.001), "no difference shown"),  # one seed is below
        ((0.001, 0.001, 0.001, 0.001, 0.090), "no difference shown"),  # the interval reaches 0
    ],
)
def test_a_claim_needs_every_seed_and_the_interval(differences, claim):
    rows = [row("simsiam", seed, 0.1) for seed in demos.SEEDS]
    rows += [row("densesiam", seed, 0.1 + x) for seed, x in enumerate(differences)]
    found = demos.compare(rows, "densesiam", "simsiam", "score")
    assert found["claim"] == claim
    assert demos.compare(rows[1:], "densesiam", "simsiam", "score") is None
    assert demos.compare(rows, "densesiam", "simsiam", "clusters") is None  # no run has it
    other = demos.compare(rows, "densesiam", "simsiam", "valid")
    assert other["difference"] == pytest.approx(-found["difference"])


def test_a_control_is_compared_on_the_seeds_that_it_has():
    rows = [row("croc", seed, 0.1) for seed in demos.SEEDS]
    rows += [row("croc-truth", seed, 0.2 + seed / 100) for seed in demos.CONTROL_SEEDS]
    found = demos.compare(rows, "croc-truth", "croc", "score")
    assert found["seeds"] == 3
    assert found["difference"] == pytest.approx(0.11)


@pytest.mark.parametrize("arch", ["tiny", "tiny-vit"])
def test_training_with_labels_moves_the_probe(arch, monkeypatch):
    monkeypatch.setattr(scene_labels, "BATCH", 4)
    probe = scene_labels.dk.probe_scenes
    monkeypatch.setattr(scene_labels.dk, "probe_scenes", lambda encode: probe(encode, count=8))
    before, after = scene_labels.train(arch, 0, steps=2, scenes=8)
    assert (before["step"], after["step"]) == (0, 2)
    assert before["probe_miou"] != after["probe_miou"]
