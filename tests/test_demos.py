"""benchmarks/demos.py: every demo is made once, by its own command, and the rule of a claim."""

import json
import sys

import pytest
from files import ROOT

# At the end: the recipes come first, because both they and the benchmarks have an adapt.py.
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "docs")]

import croc
import d3ssl
import demos
import densesiam
import dupr
import evidence
import evidence_tables

RECIPES = {"croc": croc, "d3ssl": d3ssl, "densesiam": densesiam, "dupr": dupr}


def row(side, seed, last, **changes):
    """A row as a demo that ended has it."""
    start = {"study": evidence.STUDY, "kind": "demo", "side": side, "seed": seed}
    end = {"seconds": 60.0, "commit": "c", "steps": 9, "probes": [[0, 0.05], [9, last]]}
    return {**start, "status": "done", **end, **changes}


@pytest.mark.parametrize("side", demos.SIDES)
def test_each_command_is_accepted_by_its_recipe(side, tmp_path, monkeypatch):
    words = demos.command_of(tmp_path, side, 3)
    monkeypatch.setattr(sys, "argv", words[1:])
    config = RECIPES[demos.SIDES[side][0]].read_options()
    assert config.seed == 3
    assert config.data is None
    assert (config.lr == 0) == side.endswith("-random")


def test_all_demos_are_made_once_and_compared_once(tmp_path, monkeypatch):
    study = evidence.Study(tmp_path, tmp_path / "runs", tmp_path / "rows.jsonl")
    names = []

    def call(study, command, log, name):
        names.append(name)
        run = study.runs / name
        run.mkdir()
        log.write_text("It broke.\n")
        step = {"step": 9, "probe_miou": 0.1 if "simsiam" in name else 0.2}
        (run / "metrics.jsonl").write_text(json.dumps(step) + "\n")
        return 3 if name == "demo-simsiam-4" else 0

    monkeypatch.setattr(evidence, "call", call)
    sides = ["densesiam", "simsiam"]
    for _ in range(2):
        demos.make_all(study, sides)
    assert len(names) == len(set(names)) == 10
    rows = evidence.read_rows(study.rows)
    assert [x["status"] for x in rows].count("failed") == 1
    assert rows[-1]["message"] == "It broke."
    assert evidence_tables.demo_tables(study.rows).count("failed: It broke.") == 1

    evidence.add_row(study.rows, row("simsiam", 4, 0.1))
    for _ in range(2):
        demos.make_all(study, sides)
    found = [x for x in evidence.read_rows(study.rows) if x["kind"] == "demo comparison"]
    assert len(found) == 1
    assert found[0]["difference"] == pytest.approx(0.1)
    assert found[0]["claim"] == "shown"
    assert "densesiam against simsiam | 0.100 [0.100, 0.100] | 5 of 5 | shown" in (
        evidence_tables.demo_tables(study.rows)
    )


@pytest.mark.parametrize(
    ("differences", "claim"),
    [
        ((0.010, 0.011, 0.012, 0.011, 0.010), "shown"),
        ((0.030, 0.030, 0.030, 0.030, -0.001), "not shown"),  # one seed is below
        ((0.001, 0.001, 0.001, 0.001, 0.090), "not shown"),  # the interval reaches below zero
    ],
)
def test_a_claim_needs_every_seed_and_the_interval(differences, claim):
    rows = [row("simsiam", seed, 0.1) for seed in demos.SEEDS]
    rows += [row("densesiam", seed, 0.1 + x) for seed, x in enumerate(differences)]
    assert demos.compare(rows, "densesiam", "simsiam")["claim"] == claim
    assert demos.compare(rows[1:], "densesiam", "simsiam") is None
