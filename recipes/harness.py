"""What no method owns: processes, seeds, image sources, the run folder, checkpoints, the way out.

A run folder: config.json, metrics.jsonl, tensorboard, checkpoints/step-* (two), unreadable.txt.
"""

import copy
import dataclasses
import gc
import glob
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dsd
from PIL import Image, ImageOps
from torch import Tensor, nn, optim
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
import densekit.scenes

PLACE = ("run", "workers", "device", "log_every", "save_every")  # may change when a run resumes
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


# ---- processes and randomness ----------------------------------------------------------------
class UserError(Exception):
    """Something the user can put right, in one sentence."""


class NonFiniteError(Exception):
    """A loss term became infinite or NaN."""


def main(function: Callable[[Any], None], config: Any) -> None:
    """Run `function(config)`; exit with 2 on a UserError, 3 on NonFiniteError, 130 on Ctrl-C."""
    codes = {UserError: 2, NonFiniteError: 3, KeyboardInterrupt: 130}
    try:
        function(config)
    except tuple(codes) as error:
        sentence = str(error).rsplit("UserError: ")[-1].strip()  # a loader's worker says more
        print(f"error: {sentence or 'interrupted'}", file=sys.stderr)
        sys.exit(codes[type(error)])


class World(NamedTuple):  # this process among all, and the device it works on
    rank: int
    size: int
    device: torch.device
    is_main = property(lambda self: self.rank == 0)


@contextmanager
def process_group(device: str = "auto") -> Iterator[World]:
    """Join the group that torchrun describes in the environment, or make a group of one."""
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    place = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu")
    if cuda:
        if not torch.cuda.is_available():
            raise UserError("No GPU is visible: use --device cpu.")
        torch.cuda.set_device(place)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))  # one core for the loader
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", device_id=place if cuda else None, **alone)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
    finally:
        if not (cuda and dist.get_world_size() > 1 and sys.exc_info()[0]):  # NCCL could hang
            dist.destroy_process_group()


def generator(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose stream belongs to the key alone, such as (seed, epoch, index)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()  # torch uses 32 bits
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, torch's global CPU generator follows the key; outside it goes on as if untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator(*key).get_state())
        yield


# ---- images ----------------------------------------------------------------------------------
def read_image(path: str | Path) -> Tensor:
    """The file as an upright RGB image, uint8 (3, H, W); transparency is composited on white."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # 16 bit, float: scaled, since convert("RGB") would clip
            values = np.nan_to_num(np.asarray(image, dtype=np.float64))
            low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
            low, high = min(low, values.min()), max(high, values.max())
            values = (values - low) / (high - low) * 255
            image = Image.fromarray(values.round().astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


class FolderImages:
    """Every image file below a folder, sorted, no hidden ones; or those of a .txt list; or `names`.

    `source[i]` is an image, uint8 (3, H, W), and "path: reason" of each unreadable file before it.
    """

    def __init__(self, folder: str | Path, names: Any = None):
        self.folder = Path(folder)
        if self.folder.suffix == ".txt" and self.folder.is_file():
            names = names or os.fsdecode(self.folder.read_bytes()).splitlines()
            self.folder = self.folder.parent
        elif not self.folder.is_dir():
            raise UserError(f"The image folder {folder} does not exist or is not a folder.")
        if names is None:
            names = glob.glob("**/*", root_dir=folder, recursive=True)
            names = sorted(name for name in names if name.lower().endswith(EXTENSIONS))
        if not (names := [name for name in names if name]):
            raise UserError(f"No image file ({' '.join(EXTENSIONS)}) lies below {folder}.")
        self.names = np.array([os.fsencode(name) for name in names])  # which forks share

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[str, ...]]:
        name, unreadable = self.names[index], []
        while len(unreadable) < len(self):
            path = self.folder / os.fsdecode(name)
            try:
                return read_image(path), tuple(unreadable)
            except Exception as error:  # broken bytes raise nearly anything
                unreadable.append(" ".join(f"{path}: {error or type(error).__name__}".split()))
            name = self.names[(index + len(unreadable)) % len(self)]
        raise UserError(f"No image below {self.folder} is readable, such as {unreadable[0]}.")


class SceneImages(list):  # a source of procedural scenes; their proposals, in [0, 1]
    def __init__(self, count: int):
        self.boxes = []
        for number, start in enumerate(range(0, count, 64)):  # bounds the memory
            n, draws = min(64, count - start), generator(0, number)
            drawn = densekit.scenes.sample_scenes(n, (64, 64), generator=draws)
            self += [(image, ()) for image in (drawn.images * 255).round().byte()]
            others = densekit.sample_views((64, 64), (n, 4), scale=(0.1, 0.4), generator=draws)
            boxes = torch.cat([drawn.boxes, others.box], 1) / 64  # of objects, or not; unused: 0
            large = densekit.box_area(boxes) > 0.09  # the smallest that D3SSL takes
            self.boxes += [x[keep] for x, keep in zip(boxes, large, strict=True)]


def image_source(data: Path | None, *, scenes: int) -> Any:
    """The images below a folder, or in a list (.txt); without either that many 64 x 64 scenes."""
    if data is None and not scenes:
        raise UserError("This preset trains on your images: name their folder with --data.")
    return SceneImages(scenes) if data is None else FolderImages(data)


def batches_per_epoch(images: int, batch: int, world: World) -> int:
    """How many whole batches an epoch of so many images has; `batch` counts all processes'."""
    if batch % world.size or batch < 2 * world.size:
        raise UserError(f"--batch {batch} must give each of {world.size} processes 2 or more.")
    if batch > images:
        raise UserError(f"Only {images} images for a batch of {batch}: lower --batch or add some.")
    return images // batch


def _start_worker(_: int) -> None:
    gc.freeze()  # a dead process group, collected here, would wait for threads that a fork lacks
    os.setpgrp()  # a signal to all, as torchrun sends it, is for the main process to heed


def batches(
    dataset: Any, batch: int, world: World, *, seed: int, start: int, stop: int, workers: int = 0
) -> Iterator[Any]:
    """The batches of steps `start` to `stop` for this process, on its device, epoch after epoch."""
    count = batches_per_epoch(len(dataset), batch, world)
    while start < stop:
        epoch, skip = divmod(start, count)
        order = torch.randperm(len(dataset), generator=generator(seed, epoch))
        mine = order[world.rank : count * batch : world.size].view(count, -1)[skip:]
        dataset.epoch, mine = epoch, mine[: stop - start].tolist()
        loader = DataLoader(  # batch_size=None: the dataset itself makes the batches
            dataset, batch_size=None, sampler=mine, num_workers=workers,
            multiprocessing_context="fork" if workers else None, worker_init_fn=_start_worker,
            pin_memory=world.device.type == "cuda", generator=generator(seed, epoch),
        )  # fmt: skip
        for items in loader:  # `dataset[indices]`: to draw from (seed, epoch, indices) alone
            yield tree_map_only(Tensor, lambda x: x.to(world.device, non_blocking=True), items)
        start += len(mine)


# ---- the run folder --------------------------------------------------------------------------
def write(path: Path, content: bytes) -> None:
    """Make or replace a file: it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    items = tree.items() if isinstance(tree, dict) else ()
    return {k: v for a, b in items for k, v in _flat(b, f"{name}.{a}").items()} or {name[1:]: tree}


def _tensors(extra: Any) -> Any:
    """Nested dicts of the tensors themselves, which a checkpoint loads in place."""
    if isinstance(extra, nn.Module):
        return dsd.get_model_state_dict(extra)
    fields = extra._asdict() if hasattr(extra, "_asdict") else extra
    return fields if isinstance(fields, Tensor) else {k: _tensors(v) for k, v in fields.items()}


class Run(ExitStack):
    """A folder, its log and its checkpoints, for a `with`; all processes see it and call it alike.

    A folder with a run of the same `config` (a dataclass, but for the fields in `ignore`), or one
    that never got to `resume`, goes on; any other is a UserError. First `resume`, `log`, `save`.
    """

    def __init__(self, folder: Path, config: Any, world: World, ignore: tuple = PLACE):
        super().__init__()
        self.folder, self.world, self._stop = Path(folder), world, False
        answer: list[Any] = [*self._prepare(config, ignore)] if world.is_main else [0, 0]
        dist.broadcast_object_list(answer, src=0, device=world.device)
        problem, self._saved = answer  # the newest checkpoint is the last
        if problem:
            raise UserError(f"The run folder {folder} {problem}: choose another with --run.")
        self.note_unreadable(())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self.callback(signal.signal, number, signal.signal(number, self._on_signal))

    def _prepare(self, config: Any, ignore: tuple) -> tuple[str, list[Path]]:
        path = self.folder / "config.json"
        text = json.dumps(dataclasses.asdict(config), indent=2, default=str)
        if path.exists():
            old, new = _flat(json.loads(path.read_text())), _flat(json.loads(text))
            fields = [k for k in {**new, **old} if not {k, k.split(".")[-1]} & set(ignore)]
            differ = [k for k in fields if old.get(k) != new.get(k)]
            which = ", ".join(f"{k} = {old.get(k)!r}, now {new.get(k)!r}" for k in differ)
            if which and (old.keys() != new.keys() or (self.folder / "metrics.jsonl").exists()):
                return f"holds a run with another configuration ({which})", []
        elif self.folder.is_file() or any(p.name[0] != "." for p in self.folder.glob("*")):
            return "is neither empty nor an earlier run's", []
        self.folder.mkdir(parents=True, exist_ok=True)
        write(path, text.encode())
        for leftover in self.folder.glob("checkpoints/.*"):  # of a save that was killed
            shutil.rmtree(leftover)
        return "", sorted(self.folder.glob("checkpoints/step-*"))

    def save(self, step: int, model: nn.Module, optimizer: optim.Optimizer, **extra: Any) -> None:
        """Save the state after `step` steps; extras: modules, tensors, NamedTuples and dicts."""
        folder = self.folder / "checkpoints" / f"step-{step:08d}"
        temporary = folder.with_name(f".{folder.name}")
        state = _tensors({"model": model, "extra": extra})
        # In a tuple it is one object to DCP: an optimizer without moments yet may load it.
        state["optimizer"] = (tree_map_only(Tensor, Tensor.cpu, optimizer.state_dict()),)
        # Where processes differ (batch-norm statistics) the first one's count, as in DDP.
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        dcp.save(state, checkpoint_id=temporary, planner=planner)
        self._saved = [folder]
        if self.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # the same step again
            temporary.replace(folder)
            for old in sorted(self.folder.glob("checkpoints/step-*"))[:-2]:
                shutil.rmtree(old)
        dist.barrier()

    def resume(self, model: nn.Module, optimizer: optim.Optimizer, **extra: Any) -> int:
        """Load the newest checkpoint in place, extras too, and return its step; 0 without one."""
        step = -1
        for newest in self._saved[-1:]:
            step = int(newest.name.removeprefix("step-"))
            state = {**_tensors({"model": model, "extra": extra}), "optimizer": ()}
            dcp.load(state, checkpoint_id=newest)
            optimizer.load_state_dict(state["optimizer"][0])
        if self.world.is_main:
            path = self.folder / "metrics.jsonl"
            rows = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            rows = [row for row in rows if row.endswith(b"\n")]  # a kill may halve the last one
            write(path, b"".join(row for row in rows if json.loads(row)["step"] <= step))
            self._metrics = self.enter_context(path.open("a", buffering=1))
            self._curves = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
            self.callback(self._curves.close)
        return max(step, 0)

    def log(self, step: int, **terms: float | Tensor) -> None:
        """Append one row, on the main process."""
        if self.world.is_main:
            row = {k: float(v.detach() if isinstance(v, Tensor) else v) for k, v in terms.items()}
            self._metrics.write(json.dumps({"step": step, **row}) + "\n")
            for name, value in row.items():
                self._curves.add_scalar(name, value, step)

    def rows(self, name: str) -> list[dict[str, float]]:
        """The logged rows that hold a number of this name, in order."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if name in row]

    def reduce(self, step: int, terms: dict[str, Tensor]) -> dict[str, float]:
        """Each term's mean over the processes in one all-reduce; NonFiniteError on all alike."""
        total = torch.stack([term.detach().double() for term in terms.values()])
        dist.all_reduce(total)  # NaN and inf survive a sum
        means = dict(zip(terms, (total / self.world.size).tolist(), strict=True))
        if bad := ", ".join(f"{k} = {v}" for k, v in means.items() if not np.isfinite(v)):
            kept = f"the last good checkpoint is {self._saved[-1]}" if self._saved else ""
            raise NonFiniteError(f"Not finite at step {step}: {bad}; {kept or 'none is saved'}.")
        return means

    def _on_signal(self, *_: object) -> None:
        self._stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C from now on is at once

    def stop_requested(self) -> bool:
        """Whether SIGTERM, SIGINT or SIGUSR1 reached any process; all processes ask together."""
        flag = torch.tensor(int(self._stop), device=self.world.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def note_unreadable(self, names: Iterable[str]) -> None:
        """Name each unreadable file once in unreadable.txt; `unreadable` counts them."""
        path = self.folder / "unreadable.txt"
        known = set(path.read_bytes().splitlines()) if path.exists() else set()
        if new := {os.fsencode(name) for name in names} - known:
            with path.open("ab") as file:
                file.writelines(name + b"\n" for name in sorted(new))
        self.unreadable = len(known | new)


def save_encoder(
    path: Path, encoder: nn.Module, *, architecture: str, mean: Any, std: Any, method: str, **more
) -> None:
    """Save the weights as safetensors (plain keys, float32) with a JSON side-car."""
    plain = copy.deepcopy(encoder).to(memory_format=torch.contiguous_format).cpu().float()
    facts = {"architecture": architecture, "mean": mean, "std": std, "color_order": "RGB"}
    facts |= {"method": method, "densekit": densekit.__version__, **more}
    write(path, safetensors.torch.save(_tensors(plain)))
    write(path.with_suffix(".json"), (json.dumps(facts, indent=2) + "\n").encode())
