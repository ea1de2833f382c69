"""benchmarks/evidence.py: what is missing, resuming, the rule of a claim, and a small whole run."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from files import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

# At the end: the recipes come first, because both they and the benchmarks have an adapt.py.
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "docs")]

import evidence
import evidence_tables


def labeled_set(folder, count=6, side=64):
    """Images and label maps of two classes, in the layout of CamVid."""
    splits = {"train": range(0, count, 3), "val": range(1, count, 3), "test": range(2, count, 3)}
    names = {split: [f"{i:02d}" for i in numbers] for split, numbers in splits.items()}
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(256, (side, side, 3), generator=generator).byte()
        Image.fromarray(pixels.numpy()).save(folder / "images" / f"{i:02d}.jpg")
        labels = (torch.arange(side)[:, None] > side // 2).expand(side, side)
        Image.fromarray(labels.byte().numpy()).save(folder / "labels" / f"{i:02d}.png")
    (folder / "splits.json").write_text(json.dumps(names))
    (folder / "classes.json").write_text(json.dumps({"labels": ["up", "down"]}))
    return folder


@pytest.fixture
def study(tmp_path):
    data = labeled_set(tmp_path / "set")
    return evidence.Study(
        data, tmp_path / "runs", tmp_path / "rows.jsonl", steps=2, batch=4, size=(64, 64)
    )


def made(run, **changes):
    """A row as a run that ended has it."""
    row = {"kind": run.kind, "method": run.method, "seed": run.seed, "rate": run.rate}
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    rest = {"steps": 2, "batch": 4, "commit": "c", "command": "", "data": "set", "prior": 0.1}
    return {
        **row,
        **rest,
        "status": "done",
        "seconds": 6.0,
        "scores": {"ridge-seg": score},
        **changes,
    }


def test_the_plan_is_what_has_no_row(study, capsys):
    rows = []
    todo = evidence.missing_runs(study, rows)
    assert len(todo) == len(set(todo)) == 9 * (3 + 3)
    assert [run.kind for run in todo] == ["grid"] * 27 + ["run"] * 27
    for run in todo[:3]:
        evidence.add_row(study.rows, made(run, status="failed" if run is todo[1] else "done"))
    rows = evidence.read_rows(study.rows)
    # The lower of two rates with equal scores is taken, once their grid is complete.
    left = [replace(x, rate=0.4) if x.method == "simsiam" else x for x in todo[3:]]
    assert evidence.missing_runs(study, rows) == left
    assert evidence.missing_runs(replace(study, retry=True), rows) == [todo[1], *todo[3:]]
    assert evidence.seconds_of(study, rows, todo[0]) == 6
    evidence.print_plan(study)
    printed = capsys.readouterr().out
    # The curve of a run of two steps has one point before the last one.
    assert "51 runs and 9 points of curves are missing" in printed
    at_rates_of_demos = [x.split(":")[0] for x in printed.splitlines() if "until its grid" in x]
    assert at_rates_of_demos == [x.name for x in todo[27:] if x.method != "simsiam"]


def test_rows_of_another_study_and_torn_lines_do_not_count(study):
    run = evidence.missing_runs(study, [])[0]
    evidence.add_row(study.rows, made(run, study=evidence.STUDY + 1))
    with study.rows.open("a") as file:
        file.write('{"study": 1, "ki')  # a crash in the middle of a row
    assert evidence.read_rows(study.rows) == []
    evidence.add_row(study.rows, made(run))
    assert evidence.find_row(study, evidence.read_rows(study.rows), run)["status"] == "done"
    assert "0.500 [0.400, 0.600]" in evidence_tables.tables(study.rows)  # the torn line is left out


def test_a_folder_without_splits_is_one_sentence(study):
    with pytest.raises(SystemExit, match=r"^--data is .*splits.json cannot be read"):
        evidence.print_plan(replace(study, data=study.data / "images"))


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, None]), min_size=3, max_size=3))
def test_the_rate_with_the_best_score_on_the_scenes_is_taken(values):
    study = evidence.Study(ROOT, ROOT, ROOT)
    grid = evidence.grid_runs(study, "croc")
    rows = []
    for run, value in zip(grid, values, strict=True):
        assert evidence.chosen_rate(study, rows, "croc") is None
        status = "failed" if value is None else "done"
        rows.append(made(run, status=status, scores={"ridge-seg": {"value": value}}))
    ended = [(-value, run.rate) for run, value in zip(grid, values, strict=True) if value]
    want = min(ended)[1] if ended else evidence.METHODS["croc"].rate
    assert evidence.chosen_rate(study, rows, "croc") == want


def test_each_command_is_accepted_by_its_recipe(study):
    """Options have the names and types that the recipes read, for both kinds of runs."""
    import tyro

    sys.path.insert(0, str(ROOT / "recipes"))
    for method in evidence.METHODS:
        recipe = __import__(evidence.METHODS[method].recipe)
        for kind in ("grid", "run"):
            words = evidence.command_of(study, evidence.Run(kind, method, 0, 0.1))[2:]
            config = tyro.cli(recipe.Config, default=recipe.PRESETS["demo"], args=words)
            assert (config.batch, config.lr, config.seed) == (4, 0.1, 0)
    assert evidence.shown_command(study, evidence.Run("run", "croc", 0, 0.1)).startswith(
        "python recipes/croc.py --run RUNS/run-croc-0-0.1 --batch 4"
    )


# ---- the rule ----------------------------------------------------------------------------------


def mean_iou(counts):
    """Of the classes that occur, number by number."""
    values = []
    for k in range(len(counts)):
        union = counts[k].sum() + counts[:, k].sum() - counts[k, k]
        if union:
            values.append((counts[k, k] / union).item())
    return sum(values) / max(len(values), 1)


@st.composite
def counts(draw, images=12, seeds=3):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (2, seeds, images, 3, 3)
    return torch.randint(draw(st.integers(1, 50)), shape, generator=generator)


@given(counts())
def test_the_difference_is_that_of_the_mean_iou_over_the_seeds(found):
    result = evidence.compare(list(found[0]), list(found[1]), draws=20)
    own, other = ([mean_iou(x.sum(0).double()) for x in side] for side in found)
    want = [a - b for a, b in zip(own, other, strict=True)]
    assert result["each"] == pytest.approx(want, abs=1e-6)
    assert result["difference"] == pytest.approx(sum(want) / 3, abs=1e-6)
    swapped = evidence.compare(list(found[1]), list(found[0]), draws=20)
    assert swapped["low"] == pytest.approx(-result["high"], abs=1e-6)
    unlabeled = torch.cat([found, torch.zeros_like(found)], 2)
    assert evidence.compare(list(unlabeled[0]), list(unlabeled[1]), draws=20) == result
    same = evidence.compare(list(found[0]), list(found[0]), draws=20)
    assert same["low"] == same["high"] == 0
    assert same["claim"] == "no difference at this budget"


def test_the_bootstrap_resamples_the_same_images_for_both_sides():
    """Its interval is that of a loop with NumPy, and narrower than one of unpaired images."""
    generator = torch.Generator().manual_seed(0)
    hard = torch.randint(1, 200, (60, 1), generator=generator)  # images differ much, sides little
    right = torch.stack([hard, 300 - hard], -1).expand(60, 2, 2)
    found = torch.where(torch.eye(2).bool(), right[:, :1].mT, 300 - right[:, :1].mT).long()
    better = found + 6 * torch.eye(2).long()
    result = evidence.compare([better] * 3, [found] * 3)
    draws = torch.randint(60, (2000, 60), generator=generator)
    differences, unpaired = [], []
    for number, rows in enumerate(draws):
        own = mean_iou(better[rows].sum(0).double())
        differences.append(own - mean_iou(found[rows].sum(0).double()))
        unpaired.append(own - mean_iou(found[draws[number - 1]].sum(0).double()))
    low, high = torch.tensor(differences).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert (result["low"], result["high"]) == pytest.approx((low, high), rel=0.1)
    assert torch.tensor(unpaired).std() > 3 * torch.tensor(differences).std()


def test_a_claim_takes_both_intervals():
    """A difference that is certain for these images is none if the seeds disagree."""
    right, wrong = torch.eye(2).long() * 100, torch.ones(2, 2).long() * 50
    base = [wrong.expand(20, 2, 2)] * 3
    good = [(wrong + right * part).expand(20, 2, 2) for part in (3, 4, 5)]
    assert evidence.compare(good, base)["claim"] == "better"
    assert evidence.compare(base, good)["claim"] == "worse"
    uneven = [(wrong + right * part).expand(20, 2, 2) for part in (0, 0, 9)]
    result = evidence.compare(uneven, base)
    assert result["low"] > 0 > result["seeds_low"]
    assert result["claim"] == "no difference at this budget"
    assert evidence.compare(good[:1], base[:1])["claim"] == "no difference at this budget"


# ---- making runs -------------------------------------------------------------------------------


def test_all_runs_are_made_once_and_a_stopped_one_goes_on(study, monkeypatch):
    """Of a stopped run there is no row, so the same command starts it again."""
    study = replace(study, methods=("simsiam", "densesiam"), factors=(1.0,), seeds=(0, 1))
    commands = []

    def call(study, command, log, watch=""):
        commands.append(command)
        if len(commands) == 4:
            raise KeyboardInterrupt
        name = command[3] if "--score" in command else command[command.index("--run") + 1]
        run = study.runs / name
        if "--score" not in command:
            run.mkdir(exist_ok=True)
            (run / "encoder.safetensors").touch()
            (run / "metrics.jsonl").write_text('{"step": 2}\n')
            (run / "checkpoints" / "step-00000002").mkdir(parents=True, exist_ok=True)
            return 0 if run.name != "run-simsiam-1-0.8" else 3
        score = {"value": 0.5, "low": 0.4, "high": 0.6}
        scores = {"scores": dict.fromkeys(evidence.PROTOCOLS, score), "prior": 0.1, "images": 2}
        (study.runs / f"{name}.scores.json").write_text(json.dumps(scores))
        return 0

    monkeypatch.setattr(evidence, "call", call)
    with pytest.raises(KeyboardInterrupt):
        evidence.make_all(study)
    assert len(evidence.read_rows(study.rows)) == 1
    evidence.make_all(study)
    assert commands[2] == commands[4]  # trained again by the same command, which resumes
    rows = evidence.read_rows(study.rows)
    assert [row["status"] for row in rows] == ["done"] * 4 + ["failed", "done"] + ["done"] * 2
    assert rows[4]["exit"] == 3
    # Of two steps, the curves of the first seed have the first one; the run itself is the second.
    assert [(row["of"], row["steps"]) for row in rows[6:]] == [
        ("run-simsiam-0-0.8", 1),
        ("run-densesiam-0-0.8", 1),
    ]
    keeping = {x[x.index("--run") + 1] for x in commands if "--keep" in x}
    assert {name.rpartition("/")[2] for name in keeping} == {
        "run-simsiam-0-0.8",
        "run-densesiam-0-0.8",
    }
    before = len(commands)
    evidence.make_all(study)
    assert len(commands) == before
    assert len(list(study.photographs.iterdir())) == 4  # of train and val, none of test

    page = evidence_tables.tables(study.rows)
    assert page.count("failed: ") == 1
    assert page.count("0.500 [0.400, 0.600]") == 2 + 3 * 3


def test_what_failed_is_made_once_more_and_stays_on_the_page(study, monkeypatch):
    """With --retry, each failed run and point has one more try in a call."""
    study = replace(study, methods=("simsiam", "densesiam"), factors=(), seeds=(0,))
    is_broken = True
    trained = []

    def call(study, command, log, watch=""):
        name = command[3] if "--score" in command else command[command.index("--run") + 1]
        run = study.runs / name
        if "--score" not in command:
            trained.append(run.name)
            run.mkdir(exist_ok=True)
            (run / "encoder.safetensors").touch()
        if is_broken and ("--score" not in command or "@" in name):
            log.write_text("It broke.\n")
            return 3
        score = {"value": 0.5, "low": 0.4, "high": 0.6}
        scores = {"scores": dict.fromkeys(evidence.PROTOCOLS, score), "prior": 0.1, "images": 2}
        (study.runs / f"{name}.scores.json").write_text(json.dumps(scores))
        return 0

    monkeypatch.setattr(evidence, "call", call)
    for _ in range(2):
        evidence.make_all(study)
    assert trained == ["run-simsiam-0-0.8", "run-densesiam-0-0.8"]
    evidence.make_all(replace(study, retry=True, tried=set()))
    assert len(trained) == 4  # both failed again, and neither is tried a third time
    is_broken = False
    for _ in range(2):
        evidence.make_all(replace(study, retry=True, tried=set()))
    assert len(trained) == 6
    page = evidence_tables.tables(study.rows)
    assert page.count("failed: It broke.") == 4
    assert page.count("0.500 [0.400, 0.600]") == 2 * 3


def test_a_failed_point_is_made_once_more(study, monkeypatch):
    study = replace(study, methods=("simsiam",), factors=(), seeds=(0,))
    evidence.prepare(study)
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    scores = dict.fromkeys(evidence.PROTOCOLS, score)
    evidence.add_row(study.rows, made(evidence.missing_runs(study, [])[0], scores=scores))
    codes = [3, 0]

    def call(study, command, log, watch=""):
        log.write_text("It broke.\n")
        score = {"value": 0.25, "low": 0.2, "high": 0.3}
        scores = {"scores": dict.fromkeys(evidence.PROTOCOLS, score), "prior": 0.1, "images": 2}
        (study.runs / f"{command[3]}.scores.json").write_text(json.dumps(scores))
        return codes.pop(0)

    monkeypatch.setattr(evidence, "call", call)
    for _ in range(2):
        evidence.make_all(study)
    assert "These points failed: simsiam at step 1." in evidence_tables.tables(study.rows)
    for _ in range(2):
        evidence.make_all(replace(study, retry=True, tried=set()))
    assert not codes
    page = evidence_tables.tables(study.rows)
    assert "| simsiam | 1 | 0.250 | 0.250 | 0.250 |" in page
    assert page.count("failed: It broke.") == 1  # it is reported still


def test_a_run_of_another_process_is_waited_for(study, monkeypatch):
    """It is no failure, and its row is that of the other process."""
    study = replace(study, methods=("simsiam",), factors=(), seeds=(1,))
    run = evidence.missing_runs(study, [])[0]

    def call(study, command, log, watch=""):
        log.write_text("The run folder is in use by another process (7): wait for its end.\n")
        return 2

    monkeypatch.setattr(evidence, "call", call)
    monkeypatch.setattr(evidence, "curve_epochs", lambda study, run: [])
    other = lambda seconds: evidence.add_row(study.rows, made(run))  # noqa: E731
    monkeypatch.setattr(evidence.time, "sleep", other)
    evidence.make_all(study)
    assert [row["status"] for row in evidence.read_rows(study.rows)] == ["done"]


def test_a_pair_is_compared_once_when_all_its_runs_have_ended(study):
    study = replace(study, methods=("simsiam", "densesiam"), factors=(), seeds=(0, 1))
    study.runs.mkdir()
    right = np.tile(np.eye(2, dtype=np.int32), (4, 1, 1))
    for run in evidence.missing_runs(study, []):
        evidence.compare_all(study)
        assert len(evidence.read_rows(study.rows)) < 4
        evidence.add_row(study.rows, made(run))
        counts = right if run.method == "densesiam" else right + 1
        files = dict.fromkeys(evidence.PROTOCOLS, counts)
        np.savez(study.runs / f"{run.name}.counts.npz", **files)
    for _ in range(2):
        evidence.compare_all(study)
        rows = study.rows.read_text().splitlines(keepends=True)
        study.rows.write_text("".join(rows[:6]))  # as if it was stopped after two comparisons
        evidence.compare_all(study)
        found = [x for x in evidence.read_rows(study.rows) if x["kind"] == "comparison"]
        assert [row["protocol"] for row in found] == list(evidence.PROTOCOLS)
    for row in found:
        assert (row["method"], row["baseline"]) == ("densesiam", "simsiam")
        assert row["commit"] == evidence.commit()
        # Its two classes are all right; of its baseline's, 2 of 4 pixels are in both.
        assert row["difference"] == pytest.approx(1 - 2 / 4)


@pytest.mark.slow
def test_a_small_run_has_scores_and_counts_of_each_image(study):
    study = replace(study, methods=("simsiam",), factors=(), seeds=(0,))
    evidence.make_all(study)
    row, point = evidence.read_rows(study.rows)
    assert row["status"] == point["status"] == "done", (row, point)
    assert point["steps"] == 1
    assert point["scores"] != row["scores"]
    assert row["steps"] == 2
    assert row["images"] == 2
    assert set(row["scores"]) == set(evidence.PROTOCOLS)

    found = np.load(study.runs / "run-simsiam-0-0.8.counts.npz")
    for protocol, score in row["scores"].items():
        total = torch.from_numpy(found[protocol]).sum(0).double()
        assert found[protocol].shape[0] == 2
        assert mean_iou(total) == pytest.approx(score["value"], abs=1e-5)


def test_the_page_is_drawn_from_the_rows(tmp_path):
    assert "No run" in evidence_tables.tables(tmp_path / "none.jsonl")
    rows = tmp_path / "rows.jsonl"
    result = evidence.compare([torch.ones(3, 2, 2).long()] * 3, [torch.ones(3, 2, 2).long()] * 3)
    pair = {"method": "croc", "baseline": "dino", "protocol": "ridge-seg", "runs": []}
    evidence.add_row(rows, made(evidence.Run("run", "croc", 0, 0.004)))
    evidence.add_row(rows, {"kind": "comparison", **pair, **result})
    page = evidence_tables.tables(rows)
    assert "croc against dino | ridge-seg | 0.000 [0.000, 0.000]" in page
    assert "no difference at this budget |" in page
