"""Make every demo, its baseline, its random network and controls with several seeds: what teaches?

    python benchmarks/demos.py --runs FOLDER          # some hours on one core
    python benchmarks/demos.py --runs FOLDER --plan   # what is missing, and its hours
    python benchmarks/demos.py --runs FOLDER --only densesiam simsiam densesiam-random
    python benchmarks/demos.py --runs FOLDER --data camvid --densesiam RUN   # the segmenter too

The random network is the demo for one epoch at learning rate 0: its weights stay as they were, and
its batch statistics become those of the scenes. The segmenters train on labeled photographs,
--data, and one of them starts from the encoder of a DenseSiam run on the same set. Run the same
command again after an interruption. docs/demos.jsonl has the rows of the page, so that nothing of
it is missing; with --rows FILE you make all of them. Start it in a checkout that stays as it is
until all runs are made. The rule and the results are in docs/evidence.md.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

sys.path.insert(0, str(Path(__file__).parent))

import evidence

# Raise it when losses change: earlier rows do not count. Where the settings of one demo change, the
# sides of its earlier rows get another name.
STUDY = 2
SECONDS = {"trained": 300.0, "random": 60.0}  # until one was timed
SEEDS = (0, 1, 2, 3, 4)
CONTROL_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Side:
    script: str
    options: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS
    score: str = "probe_miou"


# What a row holds besides the scores: the last values in the log of the run.
TERMS = (
    "coupling_rate_layer4", "mean_cosine_layer4",
    "clusters", "valid", "image_entropy", "cluster_entropy", "color_miou",
)  # fmt: skip
ONE_PROCESS = ("--device", "cpu", "--workers", "1")
TOGETHER = ("--co-occurrence", "0.8")
# Where {data} or {densesiam} stands, a folder is told by the command.
SEGMENTER = (
    "--data", "{data}", "--val-split", "test", "--image", "256", "--size", "128",
    "--hue", "0.1", "--blur", "0.1", "0.8", "--save-every", "55",
)  # fmt: skip


def demo(recipe: str, *options: str, seeds: tuple[int, ...] = SEEDS) -> Side:
    return Side(f"recipes/{recipe}.py", (*ONE_PROCESS, *options), seeds)


def control(clusters: str) -> Side:
    script = "benchmarks/croc_control.py"
    return Side(script, (*ONE_PROCESS, "--clusters", clusters), CONTROL_SEEDS)


def segmenter(*weights: str) -> Side:
    script = "recipes/densesiam_segment.py"
    return Side(script, (*ONE_PROCESS, *SEGMENTER, *weights), CONTROL_SEEDS, score="miou")


METHODS = evidence.METHODS
SIDES = {
    # The methods and baselines of the study, with the demos' own rates and banks.
    **{name: demo(method.recipe, *method.options) for name, method in METHODS.items()},
    **{
        f"{recipe}-random": demo(recipe, "--lr", "0", "--epochs", "1")
        for recipe in ("densesiam", "dupr", "croc", "d3ssl")
    },
    # CrOC with other clusters in the place of those that it finds.
    "croc-truth": control("truth"),
    "croc-places": control("places"),
    # Scenes in which an object's neighbor says what it is.
    **{
        f"{name}-together": demo("d3ssl", *METHODS[name].options, *TOGETHER, seeds=CONTROL_SEEDS)
        for name in ("region", "decoupling", "d3ssl")
    },
    # The networks of the demos, trained with labels.
    **{
        f"{arch}-labels": Side("benchmarks/scene_labels.py", ("--arch", arch), CONTROL_SEEDS)
        for arch in ("tiny", "tiny-vit")
    },
    "segment": segmenter(),
    "segment-densesiam": segmenter("--weights", "{densesiam}"),
    "segment-lite0": segmenter("--weights", "lite0"),
}
COUPLING = ("score", "coupling_rate_layer4", "mean_cosine_layer4")
# What each side is compared with, and in what.
PAIRS = [
    ("densesiam", "densesiam-random", ("score",)),
    ("densesiam", "simsiam", ("score",)),
    ("dupr", "dupr-random", ("score",)),
    ("dupr", "mocov2", ("score",)),
    ("croc", "croc-random", ("score",)),
    ("croc", "dino", ("score",)),
    ("croc-truth", "croc", ("score",)),
    ("croc-places", "croc", ("score",)),
    ("d3ssl", "d3ssl-random", ("score",)),
    ("d3ssl", "region", COUPLING),
    ("d3ssl", "decoupling", COUPLING),
    ("d3ssl-together", "region-together", COUPLING),
    ("d3ssl-together", "decoupling-together", COUPLING),
    ("segment-densesiam", "segment", ("score",)),
    ("segment-lite0", "segment", ("score",)),
]


@dataclass(frozen=True)
class Demos:
    study: evidence.Study  # the folder of the runs, and the file of their rows
    sides: tuple[str, ...]
    folders: dict[str, Path]  # by the names that stand in the options of the sides


def needs(side: str) -> set[str]:
    """The names of the folders that the options of a side hold."""
    fields = [Formatter().parse(word) for word in SIDES[side].options]
    return {name for field in fields for _, name, _, _ in field if name}


def missing_runs(demos: Demos, rows: list[dict]) -> list[tuple[str, int]]:
    """The sides and seeds without a row, seed by seed, so that pairs end early."""
    made = {}  # by side and seed, whether the last row stands
    for row in rows:
        if row["kind"] == "demo":
            side, seed = row["side"], row["seed"]
            made[side, seed] = evidence.stands(demos.study, row, run_name(side, seed))
    wanted = [(seed, side) for side in demos.sides for seed in SIDES[side].seeds]
    wanted.sort(key=lambda x: x[0])
    return [(side, seed) for seed, side in wanted if not made.get((side, seed))]


def run_name(side: str, seed: int) -> str:
    return f"demo-{side}-{seed}"


def command_of(demos: Demos, side: str, seed: int) -> list[str]:
    """The demo with the options of a side; everything that is not named is the demo's."""
    command = [sys.executable, str(evidence.ROOT / SIDES[side].script)]
    command += ["--run", str(demos.study.runs / run_name(side, seed)), "--seed", str(seed)]
    return [*command, *(word.format(**demos.folders) for word in SIDES[side].options)]


def shown_command(demos: Demos, side: str, seed: int) -> str:
    """The command as a page shows it: without the folders of this machine."""
    words = " ".join(["python", SIDES[side].script, *command_of(demos, side, seed)[2:]])
    for name, folder in demos.folders.items():
        words = words.replace(str(folder), name.upper())
    return words.replace(str(demos.study.runs), "RUNS")


def seconds_of(rows: list[dict], side: str) -> float:
    """What a run will take: the mean of those of its side, or a guess."""
    known = [row["seconds"] for row in rows if row["kind"] == "demo" and row["side"] == side]
    guess = SECONDS["random" if side.endswith("-random") else "trained"]
    return sum(known) / len(known) if known else guess


def make_run(demos: Demos, side: str, seed: int) -> dict:
    """Train a demo; return its row, with the score at each checkpoint."""
    name = run_name(side, seed)
    log = demos.study.runs / f"{name}.log"
    with evidence.timed(demos.study.runs / f"{name}.seconds.json") as spent:
        code = evidence.call(demos.study, command_of(demos, side, seed), log, name)
    row = {
        "kind": "demo",
        "side": side,
        "seed": seed,
        "status": "failed" if code else "done",
        "commit": evidence.commit(),
        "command": shown_command(demos, side, seed),
        "data": demos.folders["data"].name if "data" in needs(side) else "scenes",
        "seconds": round(spent["seconds"], 1),
    }
    if code:
        return {**row, "exit": code, "message": evidence.last_words(demos.study, log)}
    text = (demos.study.runs / name / "metrics.jsonl").read_text()
    metrics = [json.loads(line) for line in text.splitlines() if line]
    score = SIDES[side].score
    scores = [(x["step"], round(x[score], 5)) for x in metrics if score in x]
    terms = {name: round(x[name], 5) for x in metrics for name in TERMS if name in x}  # the last
    return {**row, "steps": scores[-1][0], "scores": scores, "terms": terms}


def compare(rows: list[dict], side: str, other: str, measure: str) -> dict | None:
    """The last values of two sides, seed by seed; None while a value is missing.

    The measure is the score or one of TERMS. The side is *higher* if the difference is above zero
    for every seed and Student's 95 % interval of the differences is too; *lower* likewise.
    """
    last = {}
    for row in rows:
        if row["kind"] == "demo" and row["status"] == "done":
            values = {"score": row["scores"][-1][1], **row["terms"]}
            if measure in values:
                last[row["side"], row["seed"]] = values[measure]
    seeds = [seed for seed in SIDES[side].seeds if seed in SIDES[other].seeds]
    if any((name, seed) not in last for name in (side, other) for seed in seeds):
        return None
    each = [last[side, seed] - last[other, seed] for seed in seeds]
    mean = sum(each) / len(each)
    variance = sum((x - mean) ** 2 for x in each) / (len(each) - 1)
    half = evidence.STUDENT[len(each)] * math.sqrt(variance / len(each))
    claim = "no difference shown"
    if min(each) > 0 and mean - half > 0:
        claim = "higher"
    elif max(each) < 0 and mean + half < 0:
        claim = "lower"
    return {
        "kind": "demo comparison",
        "side": side,
        "other": other,
        "measure": measure,
        "difference": round(mean, 5),
        "low": round(mean - half, 5),
        "high": round(mean + half, 5),
        "above": sum(x > 0 for x in each),
        "seeds": len(each),
        "claim": claim,
    }


def compare_all(demos: Demos) -> None:
    """Add a row for each comparison that is complete and is not the last one of its kind."""
    rows = evidence.read_rows(demos.study.rows, STUDY)
    known = {}  # the last comparison of each pair
    for row in rows:
        if row["kind"] == "demo comparison":
            known[row["side"], row["other"], row["measure"]] = row
    for side, other, measures in PAIRS:
        for measure in measures:
            found = compare(rows, side, other, measure)
            last = known.get((side, other, measure), {})
            if found is not None and not found.items() <= last.items():
                evidence.add_row(demos.study.rows, {"study": STUDY, **found})
                print(f"  {side} against {other}, {measure}: {found['claim']}", flush=True)


def make_all(demos: Demos) -> None:
    """Make one missing run after the other, and compare what is complete."""
    demos.study.runs.mkdir(parents=True, exist_ok=True)
    while True:
        compare_all(demos)
        rows = evidence.read_rows(demos.study.rows, STUDY)
        missing = missing_runs(demos, rows)
        if not missing:
            break
        hours = sum(seconds_of(rows, side) for side, _ in missing) / 3600
        side, seed = missing[0]
        clock = time.strftime("%H:%M")
        print(f"{clock} {side} {seed}: begins; {len(missing)} left, {hours:.1f} h", flush=True)
        row = make_run(demos, side, seed)
        if evidence.is_in_use(row):
            print("  another process makes it; asked again in a minute", flush=True)
            time.sleep(evidence.WAIT)
            continue
        if row["status"] == "failed":
            demos.study.tried.add(run_name(side, seed))  # once in a call
        evidence.add_row(demos.study.rows, {"study": STUDY, **row})
        minutes = row["seconds"] / 60
        print(f"  {row['status']} in {minutes:.1f} min, {row.get('scores')}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--rows", type=Path, default=evidence.ROOT / "docs" / "demos.jsonl")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--data", type=Path, help="folder of the labeled set of the segmenters")
    parser.add_argument("--densesiam", type=Path, help="run folder of DenseSiam on --data")
    parser.add_argument("--plan", action="store_true", help="print what is missing, and its hours")
    parser.add_argument("--retry", action="store_true", help="make failed runs once more")
    arguments = parser.parse_args()
    folders = {
        name: path.resolve()
        for name, path in (("data", arguments.data), ("densesiam", arguments.densesiam))
        if path is not None
    }
    sides = tuple(side for side in arguments.only if needs(side) <= folders.keys())
    left_out = [side for side in arguments.only if side not in sides]
    if left_out:
        print(f"Left out, for want of --data or --densesiam: {', '.join(left_out)}.")
    runs = arguments.runs.resolve()
    study = evidence.Study(runs, runs, arguments.rows.resolve(), retry=arguments.retry)
    demos = Demos(study, sides, folders)
    if arguments.plan:
        rows = evidence.read_rows(demos.study.rows, STUDY)
        missing = missing_runs(demos, rows)
        for side, seed in missing:
            print(f"{side} {seed}: {seconds_of(rows, side) / 60:.0f} min")
        hours = sum(seconds_of(rows, side) for side, _ in missing) / 3600
        print(f"{len(missing)} runs are missing: {hours:.1f} hours on one core.")
    else:
        evidence.stop(demos.study)
        make_all(demos)


if __name__ == "__main__":
    main()
