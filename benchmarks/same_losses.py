"""Does a change move the losses? Two commits train the demos of the recipes; one table compares.

    python benchmarks/same_losses.py OLD NEW
    python benchmarks/same_losses.py HEAD~1 HEAD --recipes croc dupr --steps 1 5

Each recipe's demo runs from both commits on the CPU: the same seed, one thread, float32. The two
commits run at the same time. A relative difference may be 1e-6 in the first loss that is not 0
(the banks of DUPR and D3SSL are empty at step 1), and 1e-3 later, since a training amplifies
whatever rounds differently. The exit code is 1 if a loss is beyond its bound, or if a run fails.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

REPOSITORY = Path(__file__).parents[1]

# What the demos would show only later: the losses that begin late, and the layers that are frozen.
OPTIONS = {
    "densesiam": ["--precision", "fp32", "--loss.region-start", "0"],
    "croc": ["--precision", "fp32", "--freeze", "0.1"],
    "dupr": ["--precision", "fp32"],
    "d3ssl": ["--precision", "fp32"],
    "soco": ["--precision", "fp32"],
    "densesiam_segment": ["--precision", "fp32", "--region-start", "0"],
    "detect": [],
    "fcn": [],
}
SHARED = [
    "--preset", "demo", "--device", "cpu", "--workers", "0", "--seed", "0",
    "--log-every", "1", "--save-every", "1000000",
]  # fmt: skip

# The older name of an option above. It is used where a commit's recipe does not know the new name.
OLDER_NAMES: dict[str, str] = {}


def git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def environment(checkout: Path) -> dict[str, str]:
    """One thread, and densekit from the checkout."""
    return {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def check_out(commit: str, checkout: Path) -> None:
    git("worktree", "add", "--quiet", "--detach", str(checkout), commit)
    where = subprocess.check_output(
        [sys.executable, "-c", "import densekit; print(densekit.__file__)"],
        cwd=checkout / "recipes",
        env=environment(checkout),
        text=True,
    )
    found = Path(where.strip()).resolve()
    if not found.is_relative_to(checkout.resolve()):
        sys.exit(f"densekit comes from {found}, not from the checkout of {commit}.")


def options_of(recipe: str, checkout: Path) -> list[str]:
    """The recipe's options, by the names that this checkout knows."""
    fields = (checkout / "recipes" / f"{recipe}.py").read_text()
    options = []
    for option in SHARED + OPTIONS[recipe]:
        field = option.split(".")[-1].removeprefix("--").replace("-", "_")
        if option in OLDER_NAMES and f"{field}: " not in fields:
            option = OLDER_NAMES[option]
        options.append(option)
    return options


def start(recipe: str, checkout: Path, run: Path) -> subprocess.Popen:
    command = [sys.executable, str(checkout / "recipes" / f"{recipe}.py")]
    command += [*options_of(recipe, checkout), "--run", str(run)]
    with run.with_suffix(".txt").open("w") as output:
        return subprocess.Popen(
            command, cwd=checkout, env=environment(checkout), stdout=output, stderr=output
        )


def losses_of(run: Path) -> dict[int, float]:
    """The loss after each step that the log holds so far."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def train(recipe: str, checkouts: list[Path], runs: list[Path], last: int) -> list[dict]:
    """The losses of both commits; each run is stopped as soon as it has logged the last step."""
    processes = []
    try:
        for checkout, run in zip(checkouts, runs, strict=True):
            processes.append(start(recipe, checkout, run))
        for process, run in zip(processes, runs, strict=True):
            while process.poll() is None and last not in losses_of(run):
                time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()  # the run folder is temporary: no checkpoint is needed
            process.wait()
    return [losses_of(run) for run in runs]


def compare(recipe: str, old: dict, new: dict, steps: list[int], outputs: list[Path]) -> bool:
    """Print a row of the table for each step; return whether all are within their bounds."""
    fine = True
    first = min((step for step, loss in old.items() if loss), default=1)

    for step in steps:
        if step not in old or step not in new:
            print(f"| {recipe} | {step} | {old.get(step)} | {new.get(step)} | missing | |")
            for output in outputs:
                print(f"The end of {output.name}:\n{output.read_text()[-2000:]}", file=sys.stderr)
            return False

        a = old[step]
        b = new[step]
        bound = 1e-6 if step <= first else 1e-3
        difference = 0.0 if a == b else abs(a - b) / max(abs(a), 1e-12)
        within = math.isfinite(difference) and difference <= bound
        shown = "bit-equal" if a == b else f"{difference:.1e}"
        allowed = f"{bound:.0e}" if within else f"{bound:.0e} **broken**"
        print(f"| {recipe} | {step} | {a:.9g} | {b:.9g} | {shown} | {allowed} |", flush=True)
        fine = fine and within
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="commit to compare with")
    parser.add_argument("new", help="commit to compare")
    parser.add_argument("--recipes", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 20, 40])
    arguments = parser.parse_args()

    fine = True
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkouts = [folder / "old", folder / "new"]
        try:
            for commit, checkout in zip((arguments.old, arguments.new), checkouts, strict=True):
                check_out(commit, checkout)
            print("| recipe | step | old | new | relative difference | bound |")
            print("|---|---|---|---|---|---|", flush=True)
            for recipe in arguments.recipes:
                runs = [folder / f"{recipe}-old", folder / f"{recipe}-new"]
                old, new = train(recipe, checkouts, runs, max(arguments.steps))
                outputs = [run.with_suffix(".txt") for run in runs]
                fine = compare(recipe, old, new, arguments.steps, outputs) and fine
        finally:
            for checkout in checkouts:
                if checkout.exists():
                    git("worktree", "remove", "--force", str(checkout))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
