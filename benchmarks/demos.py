"""Make every demo, its baseline and its random network with five seeds: which demos teach?

    python benchmarks/demos.py --runs FOLDER          # some hours on one core
    python benchmarks/demos.py --runs FOLDER --plan   # what is missing, and its hours
    python benchmarks/demos.py --runs FOLDER --only densesiam simsiam densesiam-random

The random network is the demo for one epoch at learning rate 0: its weights stay as they were, and
its batch statistics become those of the scenes. Run the same command again after an interruption.
Start it in a checkout that stays as it is until all runs are made. The rule and the results are in
docs/evidence.md.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import evidence

SEEDS = (0, 1, 2, 3, 4)
SECONDS = {"trained": 300.0, "random": 60.0}  # until one was timed


RANDOM = ("--lr", "0", "--epochs", "1")
# The methods and baselines of the study, with the demos' own rates and banks.
SIDES = {
    **{name: (method.recipe, method.options) for name, method in evidence.METHODS.items()},
    **{f"{recipe}-random": (recipe, RANDOM) for recipe in ("densesiam", "dupr", "croc", "d3ssl")},
}
# What each demo should be better than.
OTHERS = {
    "densesiam": ("densesiam-random", "simsiam"),
    "dupr": ("dupr-random", "mocov2"),
    "croc": ("croc-random", "dino"),
    "d3ssl": ("d3ssl-random", "region", "decoupling"),
}


def missing_runs(rows: list[dict], sides: Iterable[str]) -> list[tuple[str, int]]:
    """The sides and seeds without a row, seed by seed, so that pairs end early."""
    made = {(row["side"], row["seed"]) for row in rows if row["kind"] == "demo"}
    return [(side, seed) for seed in SEEDS for side in sides if (side, seed) not in made]


def command_of(runs: Path, side: str, seed: int) -> list[str]:
    """The demo with the options of a side; everything that is not named is the demo's."""
    recipe, options = SIDES[side]
    command = [sys.executable, str(evidence.ROOT / "recipes" / f"{recipe}.py")]
    command += ["--run", str(runs / f"demo-{side}-{seed}"), "--seed", str(seed)]
    return [*command, "--device", "cpu", "--workers", "1", *options]


def seconds_of(rows: list[dict], side: str) -> float:
    """What a run will take: the mean of those of its side, or a guess."""
    known = [row["seconds"] for row in rows if row["kind"] == "demo" and row["side"] == side]
    guess = SECONDS["random" if side.endswith("-random") else "trained"]
    return sum(known) / len(known) if known else guess


def make_run(study: evidence.Study, side: str, seed: int) -> dict:
    """Train a demo; return its row, with the probe at each checkpoint."""
    name = f"demo-{side}-{seed}"
    command = command_of(study.runs, side, seed)
    log = study.runs / f"{name}.log"
    with evidence.timed(study.runs / f"{name}.seconds.json") as spent:
        code = evidence.call(study, command, log, name)
    shown = " ".join(["python", f"recipes/{SIDES[side][0]}.py", *command[2:]])
    row = {
        "kind": "demo",
        "side": side,
        "seed": seed,
        "status": "failed" if code else "done",
        "commit": evidence.commit(),
        "command": shown.replace(str(study.runs), "RUNS"),
        "seconds": round(spent["seconds"], 1),
    }
    if code:
        last = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-1:]
        return {**row, "exit": code, "message": "".join(last)[-300:]}
    metrics = [
        json.loads(x) for x in (study.runs / name / "metrics.jsonl").read_text().split("\n") if x
    ]
    probes = [(x["step"], round(x["probe_miou"], 5)) for x in metrics if "probe_miou" in x]
    return {**row, "steps": probes[-1][0], "probes": probes}


def compare(rows: list[dict], side: str, other: str) -> dict | None:
    """The last probes of two sides, seed by seed; None while a seed is missing.

    A demo *shows* that it is better if the difference is above zero for every seed and Student's
    95 % interval of the differences is too.
    """
    last = {
        (row["side"], row["seed"]): row["probes"][-1][1]
        for row in rows
        if row["kind"] == "demo" and row["status"] == "done"
    }
    if any((name, seed) not in last for name in (side, other) for seed in SEEDS):
        return None
    each = [last[side, seed] - last[other, seed] for seed in SEEDS]
    mean = sum(each) / len(each)
    variance = sum((x - mean) ** 2 for x in each) / (len(each) - 1)
    half = evidence.STUDENT[len(each)] * math.sqrt(variance / len(each))
    return {
        "kind": "demo comparison",
        "side": side,
        "other": other,
        "difference": round(mean, 5),
        "low": round(mean - half, 5),
        "high": round(mean + half, 5),
        "above": sum(x > 0 for x in each),
        "seeds": len(each),
        "claim": "shown" if min(each) > 0 and mean - half > 0 else "not shown",
    }


def make_all(study: evidence.Study, sides: list[str]) -> None:
    """Make one missing run after the other, and compare what is complete."""
    study.runs.mkdir(parents=True, exist_ok=True)
    while True:
        rows = evidence.read_rows(study.rows)
        known = {(x["side"], x["other"]) for x in rows if x["kind"] == "demo comparison"}
        for side, other in ((x, y) for x in sides for y in OTHERS.get(x, ())):
            found = None if (side, other) in known else compare(rows, side, other)
            if found is not None:
                evidence.add_row(study.rows, found)
                print(f"  {side} against {other}: {found['claim']}", flush=True)

        missing = missing_runs(rows, sides)
        if not missing:
            break
        hours = sum(seconds_of(rows, side) for side, _ in missing) / 3600
        side, seed = missing[0]
        clock = time.strftime("%H:%M")
        print(f"{clock} {side} {seed}: begins; {len(missing)} left, {hours:.1f} h", flush=True)
        row = make_run(study, side, seed)
        evidence.add_row(study.rows, row)
        print(
            f"  {row['status']} in {row['seconds'] / 60:.1f} min, {row.get('probes')}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--rows", type=Path, default=evidence.ROOT / "docs" / "demos.jsonl")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--plan", action="store_true", help="print what is missing, and its hours")
    arguments = parser.parse_args()
    runs = arguments.runs.resolve()
    study = evidence.Study(runs, runs, arguments.rows.resolve())
    if arguments.plan:
        rows = evidence.read_rows(study.rows)
        missing = missing_runs(rows, arguments.only)
        for side, seed in missing:
            print(f"{side} {seed}: {seconds_of(rows, side) / 60:.0f} min")
        hours = sum(seconds_of(rows, side) for side, _ in missing) / 3600
        print(f"{len(missing)} runs are missing: {hours:.1f} hours on one core.")
    else:
        evidence.stop(study)
        make_all(study, arguments.only)


if __name__ == "__main__":
    main()
