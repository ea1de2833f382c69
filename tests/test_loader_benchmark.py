"""benchmarks/loader.py: a small run of it, and the law behind its memory formula."""

import sys

from files import ROOT
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(ROOT / "benchmarks"))

import loader


def test_a_small_run_makes_a_row_for_each_pair_of_sides(capsys, monkeypatch):
    monkeypatch.setattr(loader, "METHODS", {"CrOC": loader.METHODS["CrOC"]})
    loader.main(["views", "draft"], 1, None)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    own = [line for line in rows if "two views of CrOC," in line]
    assert len(own) == 3
    assert all(line.endswith(" x |") for line in own)
    assert any("gray levels apart at most" in line for line in rows)


@given(st.integers(1, 8), st.integers(2, 512), st.integers(1, 64))
def test_what_waits_is_at_least_two_batches_and_at_most_two_items_a_worker_more(
    workers, batch, side
):
    image = 2 * 3 * side**2
    waiting = loader.bytes_in_flight(workers, batch, side)
    plan = loader.harness.plan_loader(batch, workers)
    assert waiting >= 2 * batch * image
    assert (
        waiting
        <= (2 * batch + 3 * workers * plan.images_per_item + 2 * plan.images_per_item) * image
    )
