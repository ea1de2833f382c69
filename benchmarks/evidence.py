"""Train every method and its baseline with three seeds, score them, and compare them by one rule.

    python benchmarks/evidence.py --data camvid --runs FOLDER          # some hours on one core
    python benchmarks/evidence.py --data camvid --runs FOLDER --plan   # what is missing
    python benchmarks/evidence.py --data camvid --runs FOLDER --only densesiam simsiam
    python benchmarks/evidence.py --data camvid --runs FOLDER --long dupr mocov2

With --long some methods have a run of 6,000 steps too. The runs of the first seed, and the long
ones, are scored at some earlier steps as well, when all runs are made. Run the same command again
after an interruption: a row that is there is not made again, and a run that has begun goes on.
docs/evidence.jsonl has the rows of the page, so that nothing of it is missing; with --rows FILE a
study of your own begins. Start it in a checkout that stays as it is until all runs are made.
Several processes may share the folder. The rule, which stood before the first run, and the results
are in docs/evidence.md.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
STUDY = 3  # raise it when losses or settings change: the rows of an earlier number do not count
BATCH = 48
STEPS = 1140  # at least
SEEDS = (0, 1, 2)
PROTOCOLS = ("ridge-seg", "retrieval-seg", "kmeans-seg")
GALLERY = 10_000  # cells of retrieval-seg
SIZE = (256, 352)  # of the images that are scored
FACTORS = (0.5, 1.0, 2.0)  # the grid: of the demo's learning rate
GRID_EPOCHS = 5  # of the demo's 4,096 scenes
GRID_SEED = 10
LONG_STEPS = 6000  # of --long, at least
CURVE_SHARES = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the steps: where a curve has a point
BANK = 432  # keys: one of each image that an epoch of CamVid has
DRAWS = 2000  # of the bootstrap
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % point of Student's t, by seeds
SECONDS_A_STEP = 0.4  # until a run was timed
SCORE_SECONDS = {"grid": 15.0, "run": 60.0}
WAIT = 60.0  # seconds, for a run that another process makes


@dataclass(frozen=True)
class Method:
    recipe: str
    rate: float  # the demo's learning rate
    options: tuple[str, ...] = ()
    baseline: str = ""  # the method it is compared with


NO_AUGMENTATION = ("--depositioning", "0", "--cut", "0", "0", "--mask", "0", "0")
METHODS = {
    "simsiam": Method("densesiam", 0.8, ("--loss.dense", "0", "--loss.region", "0")),
    "densesiam": Method("densesiam", 0.8, baseline="simsiam"),
    "mocov2": Method(
        "dupr",
        0.8,
        ("--alpha", "0", "0", "0", "1", "--beta", "0", "0", "0", "0"),
    ),
    "dupr": Method("dupr", 0.8, baseline="mocov2"),
    "dino": Method("croc", 4e-3, ("--alpha", "0")),
    "croc": Method("croc", 4e-3, baseline="dino"),
    "region": Method("d3ssl", 0.8, (*NO_AUGMENTATION, "--jitter", "1", "1")),
    "decoupling": Method("d3ssl", 0.8, ("--depositioning", "0"), baseline="region"),
    "d3ssl": Method("d3ssl", 0.8, baseline="region"),
}


# ---- rows ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    kind: str  # "grid" on the scenes, or "run" or "long" on the photographs
    method: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.method}-{self.seed}-{self.rate:g}"


@dataclass
class Study:
    data: Path  # the labeled set
    runs: Path  # folder of runs, logs and scores
    rows: Path  # file of rows
    steps: int = STEPS
    batch: int = BATCH
    seeds: tuple[int, ...] = SEEDS
    factors: tuple[float, ...] = FACTORS
    methods: tuple[str, ...] = tuple(METHODS)
    long: tuple[str, ...] = ()  # methods with a long run too
    retry: bool = False  # make what failed once more
    tried: set[str] = field(default_factory=set)  # names of what failed in this call
    grid_options: tuple[str, ...] = ("--epochs", str(GRID_EPOCHS))
    size: tuple[int, int] = SIZE
    limit: int = 0  # at most this many images of a split
    child: list[subprocess.Popen] = field(default_factory=list)

    @property
    def photographs(self) -> Path:
        return self.runs / "photographs"


def read_rows(path: Path, study: int = STUDY) -> list[dict]:
    """The rows of a study. A line that was cut off by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if row["study"] == study:
                rows.append(row)
    return rows


def add_row(path: Path, row: dict) -> None:
    """Append a row in one write, so that several processes may do it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        torn = path.stat().st_size and not path.read_bytes().endswith(b"\n")
        line = json.dumps({"study": STUDY, **row}) + "\n"
        file.write(("\n" + line if torn else line).encode())


def find_row(study: Study, rows: list[dict], run: Run) -> dict | None:
    """The last row of a run; a failed one counts too, unless it is to be tried again."""
    for row in reversed(rows):
        same = row["kind"] == run.kind and row["method"] == run.method and row["seed"] == run.seed
        if same and row["rate"] == run.rate:
            return row if stands(study, row, run.name) else None
    return None


def stands(study: Study, row: dict, name: str) -> bool:
    """Whether the row of a run or a point stands, or is to be made once more."""
    return row["status"] == "done" or not study.retry or name in study.tried


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found.stdout.strip() or "unknown"


# ---- what is to do -------------------------------------------------------------------------------
def grid_runs(study: Study, method: str) -> list[Run]:
    rate = METHODS[method].rate
    return [Run("grid", method, GRID_SEED, round(rate * x, 6)) for x in study.factors]


def chosen_rate(study: Study, rows: list[dict], method: str) -> float | None:
    """The rate with the highest ridge mIoU on the scenes; None while a run of the grid is missing.

    Of equal ones it is the smallest. Without any run that ended, it is the demo's.
    """
    found = [find_row(study, rows, run) for run in grid_runs(study, method)]
    if any(row is None for row in found):
        return None
    done = [row for row in found if row is not None and row["status"] == "done"]
    if not done:
        return METHODS[method].rate
    best = max(done, key=lambda row: (row["scores"]["ridge-seg"]["value"], -row["rate"]))
    return best["rate"]


def missing_runs(study: Study, rows: list[dict]) -> list[Run]:
    """The runs without a row: all grids first, then seed by seed, so that pairs end early.

    The rate of a run whose grid is not complete is the demo's, for the time being.
    """
    grids = [run for method in study.methods for run in grid_runs(study, method)]
    runs = []
    for seed in study.seeds:
        for method in study.methods:
            rate = chosen_rate(study, rows, method) or METHODS[method].rate
            runs.append(Run("run", method, seed, rate))
    for method in study.long:
        rate = chosen_rate(study, rows, method) or METHODS[method].rate
        runs.append(Run("long", method, study.seeds[0], rate))
    return [run for run in grids + runs if find_row(study, rows, run) is None]


def read_splits(study: Study) -> dict[str, list[str]]:
    """The names of the images of each split."""
    path = study.data / "splits.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        sentence = f"--data is {study.data}: {path} cannot be read ({error.strerror}), give the "
        raise SystemExit(f"{sentence}folder of a labeled set, with images and labels.") from error


def count_photographs(study: Study) -> int:
    splits = read_splits(study)
    return len(splits["train"]) + len(splits["val"])


def steps_an_epoch(study: Study) -> int:
    """An incomplete batch is left out."""
    return max(1, count_photographs(study) // study.batch)


def epochs_of(study: Study, run: Run) -> int:
    """Epochs that make at least the wanted steps."""
    steps = LONG_STEPS if run.kind == "long" else study.steps
    return -(-steps // steps_an_epoch(study))


def curve_epochs(study: Study, run: Run) -> list[int]:
    """The epochs before the last one at whose end a run is scored too, for a curve."""
    if run.kind == "grid" or run.seed != study.seeds[0]:
        return []
    epochs = epochs_of(study, run)
    points = {max(1, round(epochs * share)) for share in CURVE_SHARES}
    return sorted(points - {epochs})


def command_of(study: Study, run: Run) -> list[str]:
    method = METHODS[run.method]
    command = [sys.executable, str(ROOT / "recipes" / f"{method.recipe}.py")]
    command += ["--run", str(study.runs / run.name), "--batch", str(study.batch)]
    command += ["--seed", str(run.seed), "--lr", f"{run.rate:g}"]
    command += ["--device", "cpu", "--workers", "1", "--save-every", "300", *method.options]
    if method.recipe == "densesiam":
        # The paper's views: the demo's cover more, and are flipped top to bottom too.
        command += ["--views.scale", "0.2", "1.0", "--views.vertical-flip", "0"]
    if method.recipe in ("dupr", "d3ssl"):
        command += ["--bank", str(BANK)]
    if run.kind == "grid":
        return command + list(study.grid_options)
    command += ["--data", str(study.photographs), "--epochs", str(epochs_of(study, run))]
    kept = curve_epochs(study, run)
    if kept:
        command += ["--keep", *(str(epoch) for epoch in kept)]
    if method.recipe == "d3ssl":
        command += ["--proposals", str(study.runs / "proposals.npz")]
    return command


def shown_command(study: Study, run: Run) -> str:
    """The command as a page shows it: without the folders of this machine."""
    words = command_of(study, run)
    words[:2] = ["python", f"recipes/{METHODS[run.method].recipe}.py"]
    return " ".join(words).replace(str(study.runs), "RUNS")


def seconds_of(study: Study, rows: list[dict], run: Run) -> float:
    """What a run will take: as its method took, else as its recipe did, else a guess."""
    same_kind = [x for x in rows if x["kind"] == run.kind and x["status"] == "done"]
    recipe = METHODS[run.method].recipe
    of_method = [x["seconds"] for x in same_kind if x["method"] == run.method]
    of_recipe = [x["seconds"] for x in same_kind if METHODS[x["method"]].recipe == recipe]
    known = of_method or of_recipe
    if known:
        return sum(known) / len(known)
    if run.kind == "grid":
        return GRID_EPOCHS * 4096 // study.batch * SECONDS_A_STEP + SCORE_SECONDS["grid"]
    steps = epochs_of(study, run) * steps_an_epoch(study)
    return steps * SECONDS_A_STEP + SCORE_SECONDS["run"]


def print_plan(study: Study) -> None:
    rows = read_rows(study.rows)
    missing = missing_runs(study, rows)
    total = 0.0
    for run in missing:
        seconds = seconds_of(study, rows, run)
        total += seconds
        is_open = run.kind != "grid" and chosen_rate(study, rows, run.method) is None
        note = " (at the demo's rate, until its grid is made)" if is_open else ""
        print(f"{run.name}: {seconds / 60:.0f} min{note}: {shown_command(study, run)}")
    points = len(missing_points(study, rows))
    points += sum(len(curve_epochs(study, run)) for run in missing)
    total += points * SCORE_SECONDS["run"]
    print(f"{len(missing)} runs and {points} points of curves are missing:", end=" ")
    print(f"{total / 3600:.1f} hours on one core.")


# ---- making the runs -----------------------------------------------------------------------------
def prepare(study: Study) -> None:
    """Copy the photographs to train on, train and val: no image that is scored is among them."""
    if study.photographs.exists():
        return
    study.runs.mkdir(parents=True, exist_ok=True)
    splits = read_splits(study)
    names = {*splits["train"], *splits["val"]}
    part = study.runs / f"photographs.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for path in sorted((study.data / "images").iterdir()):
        if path.stem in names or path.name in names:
            shutil.copyfile(path, part / path.name)
    found = len(list(part.iterdir()))
    if found != len(names):
        raise SystemExit(f"{study.data} has {found} images of the {len(names)} of its splits.")
    with contextlib.suppress(OSError):  # another process was quicker
        part.rename(study.photographs)
    shutil.rmtree(part, ignore_errors=True)


def call(study: Study, command: list[str], log: Path, watch: str = "") -> int:
    """Run a command on one thread, with its output in a log; say once a minute how far it is."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment["PYTHONPATH"] = path
    with log.open("ab") as file:
        # In a session of its own, so that Ctrl-C reaches it once: a second signal ends it at once.
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, cwd=ROOT, start_new_session=True
        )
        study.child[:] = [process]
        while True:
            try:
                code = process.wait(60)
                break
            except subprocess.TimeoutExpired:
                step = last_step(study.runs / watch) if watch else 0
                print(f"  {time.strftime('%H:%M')} {log.stem}: step {step}", flush=True)
        study.child.clear()
    return code


def last_step(run: Path) -> int:
    """The step of the newest checkpoint of a run; 0 before there is one."""
    steps = [int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*")]
    return max(steps, default=0)


@contextlib.contextmanager
def timed(path: Path) -> Iterator[dict]:
    """Count the seconds of a run over all its parts, also if this process is stopped."""
    spent = {"seconds": 0.0}
    with contextlib.suppress(OSError, json.JSONDecodeError):  # none yet, or a disk that was full
        spent = json.loads(path.read_text())
    start = time.monotonic()
    try:
        yield spent
    finally:
        spent["seconds"] += time.monotonic() - start
        path.write_text(json.dumps(spent))


def make_run(study: Study, run: Run) -> dict:
    """Train and score one run; return its row."""
    log = study.runs / f"{run.name}.log"
    score = score_command(study, run.name)

    with timed(study.runs / f"{run.name}.seconds.json") as spent:
        code = 0
        proposals = study.runs / "proposals.npz"
        on_photographs = run.kind != "grid"
        if on_photographs and METHODS[run.method].recipe == "d3ssl" and not proposals.exists():
            make = [sys.executable, str(ROOT / "recipes" / "proposals.py")]
            make += ["--data", str(study.photographs), "--out", str(proposals)]
            code = call(study, make, study.runs / "proposals.log")
        if not code:
            code = call(study, command_of(study, run), log, run.name)
        finished = (study.runs / run.name / "encoder.safetensors").exists()
        if not code and not finished:
            code = -1
        if not code:
            code = call(study, score, log)

    row = {"kind": run.kind, "steps": last_step(study.runs / run.name)}
    return {**row, **outcome(study, run, run.name, code, spent["seconds"])}


def outcome(study: Study, run: Run, name: str, code: int, seconds: float) -> dict:
    """What a row says of a run, or of one of its points: how it was made, and its scores."""
    row = {
        "method": run.method,
        "seed": run.seed,
        "rate": run.rate,
        "status": "failed" if code else "done",
        "commit": commit(),
        "command": shown_command(study, run),
        "data": data_name(study, run),
        "batch": study.batch,
        "seconds": round(seconds, 1),
    }
    if code:
        log = study.runs / f"{run.name}.log"
        return {**row, "exit": code, "message": last_words(study, log)}
    return {**row, **json.loads((study.runs / f"{name}.scores.json").read_text())}


def last_words(study: Study, log: Path) -> str:
    """The last line of a log, without the folders of this machine."""
    words = log.read_bytes().decode(errors="replace") if log.exists() else ""
    last = [line for line in words.replace("\r", "\n").splitlines() if line.strip()][-1:]
    return "".join(last).replace(str(study.runs), "RUNS").replace(str(ROOT), ".")[-300:]


def is_in_use(row: dict) -> bool:
    """Whether a run did not begin, because its folder is another process's."""
    return row["status"] == "failed" and "is in use by another process" in row["message"]


def score_command(study: Study, name: str) -> list[str]:
    """This program, as a child that scores a run, or one of its checkpoints: RUN@CHECKPOINT."""
    command = [sys.executable, str(Path(__file__).resolve()), "--score", name]
    command += ["--data", str(study.data.resolve()), "--runs", str(study.runs.resolve())]
    return [*command, "--size", *(str(x) for x in study.size), "--limit", str(study.limit)]


def missing_points(study: Study, rows: list[dict]) -> list[tuple[Run, int]]:
    """The points of curves without a row: a run that has ended, and an epoch before its last."""
    made = set()
    for row in rows:
        if row["kind"] == "point" and stands(study, row, f"{row['of']}@{row['steps']}"):
            made.add((row["of"], row["steps"]))
    points = []
    for row in rows:
        if row["kind"] in ("run", "long") and row["status"] == "done":
            run = Run(row["kind"], row["method"], row["seed"], row["rate"])
            for epoch in curve_epochs(study, run):
                wanted = run.method in (*study.methods, *study.long)
                if wanted and (run.name, epoch * steps_an_epoch(study)) not in made:
                    points.append((run, epoch))
    return points


def make_points(study: Study) -> None:
    """Score the runs at the earlier steps of their curves; a run's own row is the last point."""
    for run, epoch in missing_points(study, read_rows(study.rows)):
        step = epoch * steps_an_epoch(study)
        name = f"{run.name}@step-{step:08d}-epoch-{epoch}"
        log = study.runs / f"{run.name}.log"
        start = time.monotonic()
        code = call(study, score_command(study, name), log)
        row = {"kind": "point", "of": run.name, "steps": step}
        row |= outcome(study, run, name, code, time.monotonic() - start)
        if code:
            study.tried.add(f"{run.name}@{step}")
            print(f"  the point at step {step} of {run.name} failed: {row['message']}", flush=True)
        add_row(study.rows, row)


def data_name(study: Study, run: Run) -> str:
    return "scenes" if run.kind == "grid" else study.data.resolve().name


def make_all(study: Study) -> None:
    """Make one missing run after the other, and compare what is complete."""
    prepare(study)
    made = 0
    while True:
        rows = read_rows(study.rows)
        missing = missing_runs(study, rows)
        if not missing:
            break
        run = missing[0]
        left = sum(seconds_of(study, rows, x) for x in missing) / 3600
        clock = time.strftime("%H:%M")
        print(f"{clock} {run.name}: begins; {len(missing)} left, {left:.1f} h", flush=True)
        row = make_run(study, run)
        if is_in_use(row):
            print("  another process makes it; asked again in a minute", flush=True)
            time.sleep(WAIT)
            continue
        add_row(study.rows, row)
        if row["status"] == "failed":
            print(f"  failed ({row['exit']}): {row['message']}", flush=True)
            study.tried.add(run.name)  # once in a call
        else:
            figures = ", ".join(f"{x} {y['value']:.3f}" for x, y in row["scores"].items())
            print(f"  done in {row['seconds'] / 60:.1f} min, {figures}", flush=True)
        made += 1
        compare_all(study)
    compare_all(study)
    make_points(study)
    print(f"{made} runs made, none is missing.", flush=True)


# ---- scores --------------------------------------------------------------------------------------
def score_run(name: str, study: Study) -> None:
    """Score a run by evaluate.py's protocols, and keep the confusion matrix of each image.

    RUN@CHECKPOINT is one of its checkpoints. A run of the grid is scored on scenes, by the ridge.
    """
    sys.path.insert(0, str(ROOT / "recipes"))
    import evaluate
    import numpy as np
    import torch
    from downstream import protocols
    from downstream.encoders import load_encoder

    torch.set_num_threads(1)
    on_scenes = name.startswith("grid-")
    wanted = PROTOCOLS[:1] if on_scenes else PROTOCOLS
    run, _, checkpoint = name.partition("@")
    folder = study.runs / run
    if checkpoint:
        folder = folder / "checkpoints" / checkpoint
    config = evaluate.Config(encoders=(str(folder),), workers=0, device="cpu", limit=study.limit)
    if on_scenes:
        config = replace(config, size=(64, 64))
    else:
        config = replace(config, data=study.data, split="test", size=study.size)

    kept = []  # of the protocol that is scored

    def keep(found: torch.Tensor, test: protocols.Features, config: evaluate.Config) -> dict:
        kept.append(found.numpy().astype("int32"))
        return figures(found, test, config)

    figures = protocols.segmentation_figures
    encoder = load_encoder(str(folder), seed=0)
    evaluation = evaluate.Evaluation(encoder, evaluate.open_samples(config), None, config)
    scores = {}
    counts = {}
    with (
        mock.patch.object(protocols, "segmentation_figures", keep),
        mock.patch.object(protocols, "GALLERY", GALLERY),
    ):
        for protocol in wanted:
            value, low, high, _ = evaluation.score(protocol)["miou"]
            scores[protocol] = {"value": float(value), "low": float(low), "high": float(high)}
            counts[protocol] = kept.pop()
        prior = float(evaluation.score_prior()["miou"].value)
        counts["prior"] = kept.pop()

    np.savez_compressed(study.runs / f"{name}.counts.npz", **counts)
    text = json.dumps({"scores": scores, "prior": prior, "images": len(counts["prior"])})
    (study.runs / f"{name}.scores.json").write_text(text)


def compare(methods: list, baselines: list, draws: int = DRAWS) -> dict:
    """Compare the runs of a method with those of its baseline, seed by seed.

    The difference is that of the mIoU, as the mean over the seeds. Its bootstrap resamples images,
    the same ones for both sides and all seeds. Student's interval is over the seeds.

    Args:
        methods: A confusion matrix of each image, (images, classes, classes), for each seed.
        baselines: The same for the baseline.
        draws: Draws of the bootstrap.

    Returns:
        The difference, both intervals, the difference of each seed, and the claim.
    """
    import torch
    import densekit as dk

    both = [torch.stack([torch.as_tensor(x).long() for x in y], 1) for y in (methods, baselines)]
    states = torch.stack(both, 1)  # (images, 2, seeds, classes, classes)
    is_labeled = states.flatten(1).any(1)
    if is_labeled.any():  # an image without a labeled pixel does not count
        states = states[is_labeled]

    def differences(sums: torch.Tensor) -> torch.Tensor:
        own, other = dk.mean_iou(sums).unbind(-2)
        return own - other

    def mean_difference(sums: torch.Tensor) -> torch.Tensor:
        return differences(sums).mean(-1)

    generator = torch.Generator().manual_seed(0)
    interval = dk.bootstrap(states, mean_difference, draws=draws, generator=generator)
    each = differences(states.sum(0))
    seeds = len(each)
    half = math.inf
    if seeds > 1:
        half = STUDENT[seeds] * each.std().item() / seeds**0.5
    low = interval.low.item()
    high = interval.high.item()
    mean = each.mean().item()
    if min(low, mean - half) > 0:
        claim = "better"
    elif max(high, mean + half) < 0:
        claim = "worse"
    else:
        claim = "no difference at this budget"
    return {
        "difference": mean,
        "low": low,
        "high": high,
        "seeds_low": mean - half,
        "seeds_high": mean + half,
        "each": each.tolist(),
        "claim": claim,
    }


def compare_all(study: Study) -> None:
    """Add a row for each protocol in which a complete pair was not compared yet."""
    rows = read_rows(study.rows)
    for name, method in METHODS.items():
        if not method.baseline:
            continue
        pair = []  # the runs of all seeds, of both
        for side in (name, method.baseline):
            rate = chosen_rate(study, rows, side)
            runs = [Run("run", side, seed, rate or method.rate) for seed in study.seeds]
            found = [find_row(study, rows, run) for run in runs]
            files = [study.runs / f"{run.name}.counts.npz" for run in runs]
            complete = all(row is not None and row["status"] == "done" for row in found)
            if complete and all(file.exists() for file in files):
                pair.append(files)
        names = [[x.name for x in files] for files in pair]
        compared = [x for x in rows if x["kind"] == "comparison" and x["runs"] == names]
        known = {x["protocol"] for x in compared}
        if len(pair) < 2:
            continue

        import numpy as np

        for protocol in PROTOCOLS:
            if protocol in known:
                continue
            confusions = [[np.load(file)[protocol] for file in files] for files in pair]
            result = compare(*confusions)
            row = {"kind": "comparison", "method": name, "baseline": method.baseline}
            row |= {"protocol": protocol, "runs": names, "commit": commit()}
            add_row(study.rows, {**row, **result})
            print(f"  {name} against {method.baseline}, {protocol}: {result['claim']}", flush=True)


# ---- command -------------------------------------------------------------------------------------
def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the labeled set")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--rows", type=Path, default=ROOT / "docs" / "evidence.jsonl")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--long", nargs="+", choices=METHODS, default=[], help="6,000 steps too")
    parser.add_argument("--plan", action="store_true", help="print what is missing, and its hours")
    parser.add_argument("--retry", action="store_true", help="make failed runs once more")
    parser.add_argument("--score", help=argparse.SUPPRESS)  # this program calls itself
    parser.add_argument("--size", nargs=2, type=int, default=SIZE, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def stop(study: Study) -> None:
    """End on a signal: the recipe saves a checkpoint first."""

    def handler(number: int, frame: object) -> None:
        for process in study.child:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(120)
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, handler)


def main() -> None:
    arguments = read_arguments()
    study = Study(arguments.data.resolve(), arguments.runs.resolve(), arguments.rows.resolve())
    study = replace(study, methods=tuple(arguments.only), retry=arguments.retry)
    study = replace(study, long=tuple(arguments.long))
    study = replace(study, size=tuple(arguments.size), limit=arguments.limit)
    if arguments.score:
        score_run(arguments.score, study)
    elif arguments.plan:
        print_plan(study)
    else:
        stop(study)
        make_all(study)


if __name__ == "__main__":
    main()
