"""Post-training from EfficientNet-lite0 by every method: scores before and after, with intervals.

    python benchmarks/adapt.py FOLDER FOLDER                    # labeled folders; prints a table
    python benchmarks/adapt.py FOLDER --methods paka --try '{"lr": 3e-4}'    # another setting

Each run is a process of its own, and its row is appended to --rows when it is done; what is there
already is not run again. A folder has images/, labels/, classes.json and splits.json: it trains on
the images of the split --train, without their labels, and scores on --split.
"""

import argparse
import hashlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "docs" / "recipes")]

SIZE = (224, 288)  # of the images that are scored; the masks keep their own size
METHODS = ("paka", "cosine", "gram", "neighbors", "neco")  # in the order in which they run
SEEDS = (0, 1, 2)
# What every run has in common, by the names of the recipe's options. All stages train, and nothing
# is whitened; the numbers of steps, views and outputs are those of a CPU.
COMMON = {
    "preset": "images", "batch": 16, "workers": 0, "device": "cpu", "precision": "fp32",
    "weight_decay": (0.04, 0.04), "hidden": 512, "outputs": 128, "momentum": 0.99,
    "views": {"size": 160, "small_size": 64, "small": 2, "blur": (0.1, 1.0)},
}  # fmt: skip
STEPS = 60  # rounded to whole epochs
# What is different for each method. All settings were chosen on CamVid's val split alone, before
# the runs of the page; those that were tried are in docs/recipes/adapt-tried.jsonl.
CHOSEN = {
    "paka": {"lr": 1e-4, "head_lr": 1e-3},
    "cosine": {"lr": 1e-4, "head_lr": 1e-3},
    "gram": {"lr": 3e-5},
    "neighbors": {"lr": 1e-4, "head": "none"},
    "neco": {"lr": 1e-4, "head_lr": 1e-3, "references": 16},  # 49 would take 7 GB
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("docs/recipes/adapt-runs.jsonl"))
    parser.add_argument("--train", default="train", help="split to train and to fit on")
    parser.add_argument("--split", default="val", help="split to score")
    parser.add_argument(
        "--try",
        dest="tried",
        type=json.loads,
        help="options of the recipe, as JSON: a setting to try",
    )
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.job:
        run_job(json.loads(arguments.job))
        return
    for folder in arguments.folders:
        check_folder(folder, arguments.train, arguments.split)
    known = read_rows(arguments.rows)
    jobs = list_jobs(arguments)
    for job in jobs:
        if any(same_job(row, job) for row in known):
            continue
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"failed: {job}", file=sys.stderr)
            continue
        line = done.stdout.splitlines()[-1]
        arguments.rows.parent.mkdir(parents=True, exist_ok=True)
        with arguments.rows.open("a") as file:
            file.write(line + "\n")
        print(line[:200], flush=True)

    import adapt_table

    rows = read_rows(arguments.rows)
    print(adapt_table.results([row for row in rows if any(same_job(row, job) for job in jobs)]))


def check_folder(folder: Path, *splits: str) -> None:
    """End with a sentence, unless it is a folder of labeled images with these splits."""
    for name in ("images", "labels", "classes.json", "splits.json"):
        if not (folder / name).exists():
            sys.exit(f"{folder} has no {name}: give a folder of labeled images.")
    known = json.loads((folder / "splits.json").read_text())
    for split in splits:
        if split not in known:
            sys.exit(f"{folder} has no split {split}: give one of {', '.join(known)}.")


def list_jobs(arguments: argparse.Namespace) -> list[dict]:
    jobs = []
    search = arguments.tried is not None
    for method, seed, folder in itertools.product(
        arguments.methods, arguments.seeds, arguments.folders
    ):
        job = {
            "folder": str(folder.resolve()), "set": folder.resolve().name,
            "train": arguments.train, "split": arguments.split, "method": method, "seed": seed,
            "setting": {"steps": STEPS, **CHOSEN[method], **(arguments.tried or {})},
            "search": search,
        }  # fmt: skip
        jobs.append(job)
    return jobs


def read_rows(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def same_job(row: dict, job: dict) -> bool:
    names = ("set", "train", "split", "method", "seed", "setting", "search")
    return all(row[name] == json.loads(json.dumps(job[name])) for name in names)


def run_job(job: dict) -> None:
    """One run in this process; its row is the last line that it prints."""
    import adapt
    import torch
    from downstream import encoders

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = Path(job["folder"])
    names = json.loads((folder / "splits.json").read_text())[job["train"]]
    files = sorted(x for x in (folder / "images").iterdir() if {x.name, x.stem} & set(names))
    with tempfile.TemporaryDirectory() as name:
        listed = Path(name, "images.txt")
        listed.write_text("".join(f"{x}\n" for x in files))
        config = make_config(adapt, job, listed, Path(name, "run"), len(files))
        start = encoders.load_encoder(config.weights)
        began = time.process_time()
        adapt.train(config)
        seconds = time.process_time() - began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows = [json.loads(x) for x in (config.run / "metrics.jsonl").read_text().splitlines()]
        network = encoders.load_encoder(str(config.run)).network

    labeled = adapt.Score(folder, job["train"], job["split"], SIZE)
    config = replace(config, score=labeled)
    before = score_start(adapt, start, config)
    after = adapt.score(network, start, config)
    scores = {}
    for name, counts in before.items():
        found = adapt.compare_scores(counts, after[name])
        figures = zip(("before", "after", "difference"), found, strict=True)
        scores[name] = {x: [round(float(y), 4) for y in interval[:3]] for x, interval in figures}
    losses = [row["loss"] for row in rows if "loss" in row]
    health = {x: [rows[0][x], rows[-1][x]] for x in ("effective_rank", "off_diagonal_cosine")}
    row = {
        **job, "images": len(files), "scored": len(counts), "size": SIZE, "scores": scores,
        "seconds": round(seconds), "gigabytes": round(memory, 2), "health": health,
        "loss": [losses[0], losses[-1]],
    }  # fmt: skip
    row.pop("folder")
    print("\n" + json.dumps(row))


def score_start(adapt, start, config) -> dict:
    """The scores of the start weights, which are kept until the machine starts again."""
    import safetensors.torch

    scored = f"{config.score.data} {config.score.fit} {config.score.split} {SIZE}"
    key = f"{scored} {config.weights} {adapt.CLUSTERINGS} clusterings"
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir(), f"densekit-adapt-{name}.safetensors")
    if not path.exists():
        counts = adapt.score(start.network, start, config)
        own = path.with_suffix(f".{os.getpid()}")  # another run may write at the same time
        safetensors.torch.save_file(counts, own)
        own.replace(path)
    return safetensors.torch.load_file(path)


def make_config(adapt, job: dict, listed: Path, run: Path, images: int):
    options = {**COMMON, **job["setting"]}
    steps = options.pop("steps")
    preset = options.pop("preset")
    method = options.pop("method", job["method"])
    views = adapt.Views(**options.pop("views"))
    per_epoch = images // options["batch"]
    return replace(
        adapt.PRESETS[preset], **options, views=views, data=listed, run=run,
        method=method, seed=job["seed"], epochs=max(1, round(steps / per_epoch)),
        log_every=per_epoch, save_every=10**9,
    )  # fmt: skip


if __name__ == "__main__":
    main()
