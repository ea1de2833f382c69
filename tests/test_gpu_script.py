"""benchmarks/gpu.py without a GPU: its sections at tiny sizes, its limits, its file, its page."""

import importlib.util
import itertools
import json
import sys

import pytest
from files import ROOT

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "docs")]

import gpu
import gpu_table

SMALL = gpu.Settings("cpu", small=True)


def test_the_limits_are_ten_minutes_in_all():
    assert sum(gpu.LIMITS.values()) <= 600


@pytest.mark.parametrize("name", ["contract", "nccl", *gpu.RECIPES, "compile-croc"])
def test_each_section_makes_rows_without_a_gpu(name, tmp_path):
    gpu.run_section(name, SMALL, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows
    assert not any(row.get("error") for row in rows), rows
    for row in rows:
        assert row.get("step_ms", 1.0) > 0


def test_the_table_keeps_the_rows_before_and_after_a_failure(monkeypatch):
    import run

    def fails():
        run.row("one", "", "", "")
        raise ValueError("no such kernel")

    monkeypatch.setattr(run, "row", run.row)
    monkeypatch.setattr(run, "DEVICE", run.DEVICE)
    sections = {"checks": fails, "step": lambda: run.row("two", "", "", "")}
    monkeypatch.setattr(run, "SECTIONS", sections)
    monkeypatch.setattr(gpu, "TABLE", ("checks", "step"))
    rows = []
    gpu.table(gpu.Settings("cpu"), rows.append)
    assert [row["what"] for row in rows] == ["one", "checks", "two"]
    assert rows[1]["error"] == "ValueError: no such kernel"


SCRIPT = """
import pathlib, sys, time
name, rows = sys.argv[1:]
pathlib.Path(rows).write_text('{"what": "first"}\\n{"wha')
if name == "dupr":
    raise ValueError("out of memory")
if name == "croc":
    time.sleep(60)
"""


def test_a_section_that_fails_or_runs_over_its_limit_leaves_its_rows(tmp_path, monkeypatch, capsys):
    run_limited = gpu.run_limited
    script = tmp_path / "section.py"
    script.write_text(SCRIPT)

    def run_script(command, limit):
        values = dict(itertools.pairwise(command))
        return run_limited([sys.executable, str(script), values["--only"], values["--rows"]], limit)

    monkeypatch.setattr(gpu, "run_limited", run_script)
    monkeypatch.setattr(gpu, "describe", lambda device: {"device": device})
    monkeypatch.setitem(gpu.LIMITS, "croc", 0.5)
    out = tmp_path / "gpu.json"
    gpu.run_all(["dupr", "croc"], SMALL, out)
    gpu.run_all(["minimal"], SMALL, out)  # the others' rows stay
    sections = json.loads(out.read_text())["sections"]
    assert {name: section["error"] for name, section in sections.items()} == {
        "dupr": "ValueError: out of memory",
        "croc": "over its limit of 0.5 seconds",
        "minimal": None,
    }
    assert all(section["rows"] == [{"what": "first"}] for section in sections.values())
    page = gpu_table.tables(out)
    assert "| dupr | 0 of 30 s | failed: ValueError: out of memory |" in page
    capsys.readouterr()


def test_the_page_shows_steps_and_waits_and_is_empty_without_a_file(tmp_path):
    assert "has not run on a GPU yet" in gpu_table.tables(tmp_path / "none.json")
    row = {"what": "croc", "batch": 32, "step_ms": 20.0, "images_per_s": 1600.0}
    row |= {"first_step_s": 3.0, "peak_gb": 12.0, "waits": []}
    compared = {"what": "`sinkhorn`", "ours": "1 ms", "rival": "2 ms", "ratio": "0.5 x"}
    sections = {
        "croc": {"seconds": 20.0, "limit": 30, "error": None, "rows": [row]},
        "table": {"seconds": 9.0, "limit": 120, "error": None, "rows": [compared]},
    }
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"machine": {"gpu": "H"}, "sections": sections}))
    page = gpu_table.tables(path)
    assert "| croc, 32 images | 20.0 ms | 1600 | 3.0 s | 12.0 GB | none |" in page
    assert "| `sinkhorn` | 1 ms | 2 ms | 0.5 x |" in page


def test_what_is_not_called_may_be_missing(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in gpu.NOT_CALLED else find_spec(name),
    )
    for modules in gpu.NOT_CALLED.values():
        for module in modules:
            monkeypatch.setitem(sys.modules, module, sys.modules.get(module))
    gpu.stand_in()
    from faster_coco_eval import mask
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

    assert all(type(x).__name__ == "MagicMock" for x in (mask, Figure, SummaryWriter))
