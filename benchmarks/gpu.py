"""Run densekit on one GPU for ten minutes at most, and write what it did to a JSON file.

    python benchmarks/gpu.py                         # all sections, to docs/gpu.json
    python benchmarks/gpu.py --only nccl croc        # these sections; the others' rows stay
    python benchmarks/gpu.py --device cpu --small    # the same calls without a GPU, tiny sizes

The sections, each with a limit in seconds (LIMITS):

* `contract`: each function gives on the GPU what it gives on the CPU (tests/test_contract.py);
* `nccl`: collectives, DistributedDataParallel and a checkpoint, in a NCCL group of one;
* a section for each training recipe: its own loop at the size of its paper, on synthetic images
  that lie on the GPU. Its rows have the time of a step, the peak memory, and the lines at which
  the host waited for the device in a step (there should be none);
* `table`: the rows of benchmarks/run.py;
* `compile-densesiam` and `compile-croc`: the loop again, with --compile.

Each section is a process of its own. The file is written after each of them. A section that fails
or runs over its limit leaves its message and the rows that it has made, and the next one begins.

It needs torch, torchvision, timm, einops, jaxtyping, hypothesis and beartype. What the recipes
import besides (tyro, tensorboard, matplotlib, faster-coco-eval) is not called here, and may be
missing. A machine without a network needs these wheels, if it lacks them, 38 MB in all:

    beartype    1.4 MB   for everything
    scipy      36   MB   for the rows of `match_clusters` in `contract`
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
# The recipes come before the benchmarks: both have an adapt.py.
sys.path[:0] = [str(ROOT / part) for part in ("recipes", "tests", "benchmarks", ".")]

RECIPES = ("densesiam", "croc", "dupr", "d3ssl", "adapt", "densesiam_segment", "minimal")
LIMITS = {
    "contract": 90,
    "nccl": 20,
    **dict.fromkeys(RECIPES, 30),
    "table": 120,
    "compile-densesiam": 70,
    "compile-croc": 70,
}
# Modules that are imported, but not called here, by the package that has them.
NOT_CALLED = {
    "tyro": ("tyro",),
    "tensorboard": ("torch.utils.tensorboard",),
    "matplotlib": ("matplotlib", "matplotlib.figure"),
    "faster_coco_eval": ("faster_coco_eval",),
    "pytest": ("pytest",),
}


class Settings(NamedTuple):
    """Where to run, and whether at a size that a test has time for."""

    device: str = "cuda"
    small: bool = False


Emit = Callable[[dict[str, Any]], None]


# ---- the runner ------------------------------------------------------------------------------
def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu.json")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a dry run at tiny sizes")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    settings = Settings(arguments.device, arguments.small)
    if arguments.rows:
        run_section(arguments.only[0], settings, arguments.rows)
        return
    run_all(arguments.only, settings, arguments.out)


def run_section(name: str, settings: Settings, rows: Path) -> None:
    """One section, in this process; each row is appended to a file at once."""
    with rows.open("a") as file:

        def emit(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        function_of(name)(settings, emit)


def function_of(name: str) -> Callable[[Settings, Emit], None]:
    if name in RECIPES:
        return lambda settings, emit: train(name, settings, emit)
    if name.startswith("compile-"):
        return lambda settings, emit: train(name[8:], settings, emit, compiled=True)
    return {"contract": contract, "nccl": nccl, "table": table}[name]


def run_all(names: list[str], settings: Settings, out: Path) -> None:
    """All sections, each in a process of its own; the file is written after each of them."""
    found = json.loads(out.read_text()) if out.exists() else {}
    found["machine"] = describe(settings.device)
    sections = found.setdefault("sections", {})
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder, "rows.jsonl")
            command = [sys.executable, __file__, "--only", name, "--device", settings.device]
            command += ["--rows", str(rows)] + ["--small"] * settings.small
            seconds, error = run_limited(command, LIMITS[name])
            lines = rows.read_text().splitlines() if rows.exists() else []
        whole = [line for line in lines if line.endswith("}")]  # a kill may halve the last one
        sections[name] = {
            "seconds": round(seconds, 1),
            "limit": LIMITS[name],
            "error": error,
            "rows": [json.loads(line) for line in whole],
        }
        temporary = out.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(out)
        print(f"{name}: {seconds:.0f} of {LIMITS[name]} s, {error or 'done'}", flush=True)


def describe(device: str) -> dict[str, str]:
    """The machine and the versions; torch is asked in a process of its own."""
    code = (
        "import json, torch, densekit;"
        "name = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU';"
        "print(json.dumps({'torch': torch.__version__, 'gpu': name,"
        " 'densekit': densekit.__version__}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    told = json.loads(done.stdout) if done.returncode == 0 else {"error": last_line(done.stderr)}
    return {"device": device, **told}


def run_limited(command: list[str], limit: float) -> tuple[float, str | None]:
    """The seconds that a command took, and what went wrong; it ends at the limit."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # What it has started, such as processes that compile, ends too.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.perf_counter() - start
        log.seek(0)
        text = log.read()
    if code is None:
        return seconds, f"over its limit of {limit:g} seconds"
    return seconds, None if code == 0 else last_line(text) or f"exit code {code}"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def message(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def stand_in() -> None:
    """Put something empty in the place of what is imported, but not called here, and missing."""
    for package, modules in NOT_CALLED.items():
        if importlib.util.find_spec(package) is None:
            for module in modules:
                sys.modules[module] = mock.MagicMock()


# ---- laws and collectives --------------------------------------------------------------------
def contract(settings: Settings, emit: Emit) -> None:
    """The column `cuda` of the table of laws: a row for each entry, with what went wrong."""
    stand_in()
    import test_contract

    entries = [entry for entry in test_contract.TABLE if "cuda" not in entry.without]
    for entry in entries[:: 40 if settings.small else 1]:
        error = None
        try:
            test_contract.device_gives_what_the_cpu_gives(entry, settings.device)
        except Exception as failure:
            error = message(failure)
        emit({"what": entry.name, "error": error})


def nccl(settings: Settings, emit: Emit) -> None:
    """What densekit and the recipes ask of a group, in a group of one, where it changes nothing."""
    stand_in()
    import harness
    import torch

    with harness.process_group(settings.device) as world:
        for check in (collectives, parallel_model, checkpoint):
            error = None
            try:
                check(world)
            except Exception as failure:
                error = message(failure)
            backend = torch.distributed.get_backend()
            emit({"what": check.__name__, "backend": backend, "error": error})


def collectives(world: Any) -> None:
    import torch
    import densekit as dk

    group = torch.distributed.group.WORLD
    x = torch.arange(12.0, device=world.device).view(4, 3)
    order = torch.tensor([2, 0, 3, 1], device=world.device)
    for function in (dk.all_gather, dk.all_sum, dk.all_mean, dk.all_max):
        assert torch.equal(function(x, group), x), function.__name__
    shuffled = dk.shuffle_batch(x, order, group)
    assert torch.equal(dk.unshuffle_batch(shuffled, order, group), x)
    assert torch.equal(dk.masked_mean(x, None, group=group), x.mean())


def parallel_model(world: Any) -> None:
    """DistributedDataParallel with synchronized batch statistics has the plain gradients."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).to(world.device)
    inputs = torch.randn(16, 3, device=world.device)
    wanted = torch.autograd.grad(plain(inputs).square().mean(), list(plain.parameters()))

    model = plain
    if world.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    nn.parallel.DistributedDataParallel(model)(inputs).square().mean().backward()
    found = [x.grad for x in model.parameters()]
    torch.testing.assert_close(found, list(wanted), rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class NoOptions:
    """The configuration of a run that has none."""


def checkpoint(world: Any) -> None:
    """A run that is saved and resumed has the same state, and its log."""
    import harness
    import torch
    from torch import nn

    with tempfile.TemporaryDirectory() as name:
        states = []
        for seed in range(2):
            torch.manual_seed(seed)
            model = nn.Linear(3, 2).to(world.device)
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            with harness.Run(Path(name, "run"), NoOptions(), world) as run:
                step = run.resume(model, optimizer)
                if step == 0:
                    loss = model(torch.ones(4, 3, device=world.device)).square().mean()
                    loss.backward()
                    run.record(step, {"loss": loss})
                    optimizer.step()
                    run.save(1, model, optimizer)
                states.append([x.detach().clone() for x in model.parameters()])
        assert step == 1
        assert all(torch.equal(x, y) for x, y in zip(*states, strict=True))


# ---- recipes ---------------------------------------------------------------------------------
class Size(NamedTuple):
    """The preset and the options of a recipe: on a GPU, and in a dry run.

    The batch is what one of eight GPUs has of the paper's.
    """

    preset: str
    options: dict[str, Any]
    small: dict[str, Any]


SIZES = {
    "densesiam": Size("paper", {"batch": 64, "loss": {"region_start": 0.0}}, {"batch": 4}),
    "croc": Size("coco", {"batch": 32}, {"batch": 4}),
    "dupr": Size("paper", {"batch": 32}, {"batch": 4}),
    "d3ssl": Size("paper", {"batch": 32}, {"batch": 4}),
    "adapt": Size(
        "images",
        {"batch": 64, "weights": "random:vit_small_patch16_224"},
        {"batch": 4, "weights": "random:tiny", "hidden": 16, "outputs": 8},
    ),
    # Under its own name, the preset would ask for a labeled set.
    "densesiam_segment": Size(
        "paper", {"preset": "demo", "batch": 32, "region_start": 0.0}, {"batch": 4}
    ),
    "minimal": Size("", {"arch": "resnet50", "size": 224, "batch": 64}, {"batch": 4}),
}
WARM_UP = 5  # steps
TIMED = 20
WATCHED = 3  # steps in which each wait for the device is noted
IMAGES = 118_287  # as many as COCO has: banks may hold that many keys


class Repeated:
    """A few items, as often as it takes; `boxes` are their proposals, if they have any."""

    def __init__(self, items: Any, count: int):
        self.items = items
        self.count = count
        if hasattr(items, "boxes"):
            self.boxes = Repeated(items.boxes, count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.items[index % len(self.items)]


class Clock:
    """The seconds of the first step, and of a step later on, and where the host waits in steps."""

    def __init__(self, device: str, steps: tuple[int, int, int]):
        self.is_cuda = device == "cuda"
        self.warm_up, self.timed, self.watched = steps
        self.steps = sum(steps) + 1
        self.times = {}
        self.waits = []

    def tick(self, step: int) -> None:
        """Call it before each step."""
        import torch

        marks = (0, 1, self.warm_up, self.warm_up + self.timed)
        if step in marks:
            if self.is_cuda:
                torch.cuda.synchronize()
            self.times[step] = time.perf_counter()
        if self.is_cuda and step == marks[-1]:
            torch.cuda.set_sync_debug_mode("warn")
            self.show = warnings.showwarning
            warnings.simplefilter("always")
            warnings.showwarning = self.note
        if self.is_cuda and step == self.steps - 1:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = self.show

    def note(self, text: Any, _: Any, file: str, line: int, *__: Any) -> None:
        if "synchronizing" in str(text):
            frames = traceback.extract_stack()
            own = [x for x in frames if Path(x.filename).is_relative_to(ROOT)]
            own = [x for x in own if Path(x.filename) != Path(__file__)]
            place = own[-1] if own else None
            name = f"{Path(place.filename).name}:{place.lineno}" if place else f"{file}:{line}"
            self.waits.append(name)

    @property
    def first_step(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def step(self) -> float:
        elapsed = self.times[self.warm_up + self.timed] - self.times[self.warm_up]
        return elapsed / self.timed


def configure(module: Any, size: Size, settings: Settings, compiled: bool, run: Path) -> Any:
    """The configuration of a recipe, for one epoch without rows and checkpoints between."""
    preset = size.preset
    options = dict(size.options)
    if settings.small:
        preset = "demo"
        options = dict(size.small)
    config = module.PRESETS[preset] if size.preset else module.Config()
    for name, value in options.items():
        if isinstance(value, dict):
            options[name] = replace(getattr(config, name), **value)
    if compiled and not settings.small:  # a compilation takes longer than a test may
        options["compile"] = True
    rest = {"epochs": 1, "workers": 0, "log_every": 10**9, "save_every": 10**9}
    return replace(config, run=run, device=settings.device, **options, **rest)


def open_images(name: str, settings: Settings) -> Any:
    """Procedural scenes, with proposals for the recipe that needs them."""
    import harness
    import proposals

    scenes = 4 if settings.small else 64
    count = 1024 if settings.small else IMAGES
    if name == "d3ssl":
        return Repeated(proposals.image_source(None, None, scenes=scenes), count)
    return Repeated(harness.image_source(None, scenes=scenes), count)


def train(name: str, settings: Settings, emit: Emit, *, compiled: bool = False) -> None:
    """A recipe's own loop, whose batches are all the same one, which lies on the device."""
    stand_in()
    import harness
    import torch

    module = importlib.import_module(name)
    steps = (1, 1, 1) if settings.small else (WARM_UP, TIMED, WATCHED)
    clock = Clock(settings.device, steps)
    load = harness.batches
    source = open_images(name, settings)

    def batches(
        dataset: Any, batch: int, world: Any, *, start: int, stop: int, **options: Any
    ) -> Iterator[Any]:
        options["workers"] = 0
        made = next(load(dataset, batch, world, start=0, stop=1, **options))
        is_training = stop - start > 1
        for step in range(start, stop):
            if is_training:
                clock.tick(step)
            yield made

    def nothing(*_: Any, **__: Any) -> float:
        return 0.0

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = configure(module, SIZES[name], settings, compiled, folder / "run")
        changes = [
            (harness, "batches", batches),
            (harness, "batches_per_epoch", lambda *_: clock.steps),
            (harness, "image_source", lambda *_, **__: source),
            (harness.Run, "save", nothing),
            (module, "image_source", lambda *_, **__: source),
            (module, "open_training", lambda *_: source),
            (module, "open_split", lambda *_, **__: mock.MagicMock(dataset=Classes)),
            (module, "evaluate", nothing),
            (module, "probe", nothing),
        ]
        for place, attribute, value in changes:
            if hasattr(place, attribute):
                stack.enter_context(mock.patch.object(place, attribute, value))
        module.train(config)

    row = {
        "what": name,
        "preset": getattr(config, "preset", ""),
        "batch": config.batch,
        "compiled": getattr(config, "compile", False),
        "first_step_s": round(clock.first_step, 2),
        "step_ms": round(clock.step * 1e3, 2),
        "images_per_s": round(config.batch / clock.step, 1),
    }
    if settings.device == "cuda":
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        row["waits"] = sorted(set(clock.waits))
    emit(row)


class Classes:
    """What densesiam_segment asks of the set that it scores."""

    classes = tuple(str(number) for number in range(27))


# ---- the table -------------------------------------------------------------------------------
# The most telling ones come first, should the time not suffice.
TABLE = ("step", "primitives", "moco", "regions", "growth", "clustering", "transport")


def table(settings: Settings, emit: Emit) -> None:
    """Rows of benchmarks/run.py; a part of it that fails is a row with its message."""
    stand_in()
    import run
    import torch

    run.DEVICE = torch.device(settings.device)
    run.row = lambda what, ours, rival, ratio: emit(
        {"what": what, "ours": ours, "rival": rival, "ratio": ratio, "error": None}
    )
    names = ("checks",) if settings.small else TABLE
    torch.manual_seed(0)
    for name in names:
        try:
            run.SECTIONS[name]()
        except Exception as failure:
            emit({"what": name, "error": message(failure)})


if __name__ == "__main__":
    main()
