"""Region proposals of a folder of images by selective search: once, offline, before d3ssl.py.

    python recipes/proposals.py --data FOLDER              # writes FOLDER.proposals.npz
    python recipes/d3ssl.py --preset paper --data FOLDER --proposals FOLDER.proposals.npz

The same command run again resumes, or adds new files. More: docs/recipes/proposals.md. The file:

    names     bytes (n,)        path of each image, relative to the data folder
    sizes     int32 (n, 2)      its height and width, upright
    offsets   int64 (n + 1,)    image i has boxes[offsets[i]:offsets[i + 1]], maybe none
    boxes     int32 (m, 4)      x0 y0 x1 y1 in its pixels, half-open, from large to small
    settings  JSON              of the search and the filter
"""

import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

SCHEMA = 1


@dataclass(frozen=True)
class Config:
    data: Path  # Folder of images, any tree, or a .txt file that lists them.
    out: Path | None = None  # The file to write; else DATA.proposals.npz, beside the data.
    mode: Literal["fast", "quality"] = "fast"  # Opencv's; fast is R-CNN's, quality finds more.
    longest: int = 640  # Longest side to search at, in pixels; larger images are shrunk (0: never).
    side: int = 32  # Least width and height of a box, in pixels of the image.
    aspect: float = 3.0  # Most that the longer side of a box may be of the shorter one.
    scale: tuple[float, float] = (0.3, 0.8)  # Range of the root of a box's share of the image.
    most: int = 0  # Boxes to keep of an image, the largest (0: all).
    workers: int = os.cpu_count() or 1  # Processes that search.


if __name__ == "__main__":  # the arguments before torch: --help answers at once
    CONFIG = tyro.cli(Config, description=__doc__)
    search_path = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(search_path)  # a fork server knows no other

import harness
import numpy as np
import torch
from harness import UserError
from tqdm import tqdm
import densekit


class Proposals(NamedTuple):
    """The content of a proposals file; see there."""

    names: list[str]
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray


# ---- one image ---------------------------------------------------------------------------------
def select(boxes: np.ndarray, size: tuple[int, int], config: Config) -> np.ndarray:
    """The boxes (m, 4) that pass the filter, each once, from large to small, then by x0 y0 x1."""
    boxes = np.unique(boxes.reshape(-1, 4).astype(np.int64), axis=0)
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    root, slack = np.sqrt(width * height / (size[0] * size[1])), 1 + 1e-9  # a tie passes
    keep = np.minimum(width, height) >= max(config.side, 1)
    keep &= np.maximum(width, height) <= config.aspect * slack * np.minimum(width, height)
    keep &= (config.scale[0] <= root * slack) & (root <= config.scale[1] * slack)
    order = np.argsort(-(width * height)[keep], kind="stable")  # unique has sorted the rest
    return boxes[keep][order[: config.most or None]].astype(np.int32)


def search(path: Path, config: Config) -> tuple[tuple[int, int], np.ndarray] | str:
    """The size and the proposals of one image file, or why there are none."""
    import cv2  # only the workers need it

    cv2.setNumThreads(1)
    finder = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    try:
        image = harness.read_image(path).numpy()[::-1].transpose(1, 2, 0)  # BGR
        height, width = image.shape[:2]
        ratio = min(1.0, (config.longest or max(height, width)) / max(height, width))
        w, h = max(1, round(width * ratio)), max(1, round(height * ratio))
        image = cv2.resize(np.ascontiguousarray(image), (w, h), interpolation=cv2.INTER_AREA)
        finder.setBaseImage(image)
        getattr(finder, f"switchToSelectiveSearch{config.mode.title()}")()
        found = np.asarray(finder.process()).reshape(-1, 4)  # x y width height, in random order
        found[:, 2:] += found[:, :2]
        boxes = np.rint(found * np.array([width, height] * 2) / np.array([w, h] * 2))
    except Exception as error:  # broken bytes raise nearly anything
        return " ".join(f"{path}: {error or type(error).__name__}".split())
    return (height, width), select(boxes, (height, width), config)


def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to heed
    torch.set_num_threads(1)
    parent: Any = multiprocessing.parent_process()  # if killed it would leave the workers behind
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---- all images --------------------------------------------------------------------------------
def search_all(folder: Path, names: list[str], config: Config) -> Iterator[tuple[str, Any]]:
    """Each name and what `search` says of it, in any order; a few are under way at any time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness"])
    pool = ProcessPoolExecutor(config.workers, context, start_worker)
    todo, flying, finished = iter(names), {}, False
    try:
        while True:
            for name in itertools.islice(todo, 4 * config.workers - len(flying)):
                flying[pool.submit(search, folder / name, config)] = name
            if finished := not flying:
                break
            done = wait(flying, return_when=FIRST_COMPLETED).done
            for future in sorted(done, key=lambda x: x.exception() is not None):  # keeps the good
                result = future.result()
                yield flying.pop(future), result
    except BrokenExecutor:
        suspects = ", ".join([*flying.values()][: config.workers])  # the first to start
        problem = f"A worker process died, out of memory or at one of {suspects}"
        raise UserError(f"{problem}: try fewer --workers, or without that image.") from None
    except (ImportError, AttributeError) as error:
        raise UserError(f"opencv-contrib-python-headless is missing ({error}).") from None
    finally:
        for child in multiprocessing.active_children() if not finished else ():
            child.terminate()  # Ctrl-C does not wait for what is under way
        pool.shutdown(cancel_futures=True)


def earlier(out: Path, partial: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Size and boxes of each image that the file, or the partial one, has of earlier runs."""
    found, rows = {}, []
    if out.exists():
        names, sizes, offsets, boxes = read_proposals(out)
        found = dict(zip(names, zip(sizes, np.split(boxes, offsets[1:-1]))))  # noqa: B905
        with np.load(out) as file:
            rows.append(json.loads(str(file["settings"])))
    with open(partial if partial.exists() else os.devnull, "rb") as lines:
        for line in lines:
            with suppress(ValueError):  # a kill may have halved it
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
                else:
                    found[row[0]] = row[1], np.array(row[2], np.int32).reshape(-1, 4)
    for old in rows:
        keys = [key for key in {**settings, **old} if old.get(key) != settings.get(key)]
        if which := ", ".join(f"{k} = {old.get(k)!r}, now {settings.get(k)!r}" for k in keys):
            raise UserError(f"{out}[.partial] has other settings ({which}): move it or set --out.")
    return found


def read_proposals(path: str | Path) -> Proposals:
    """The file that this recipe writes, validated; a UserError says what is wrong with it."""
    if not Path(path).is_file():
        raise UserError(f"There is no proposals file {path}: recipes/proposals.py writes one.")
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            schema = json.loads(str(file["settings"]))["schema"]
            names, sizes, offsets, boxes = (file[key] for key in Proposals._fields)
        n, m = len(names), len(boxes)
        shapes = [sizes.shape, offsets.shape, boxes.shape] == [(n, 2), (n + 1,), (m, 4)]
        if schema != SCHEMA or not shapes or offsets[[0, -1]].tolist() != [0, m]:
            raise ValueError(f"not schema {SCHEMA}")
    except Exception as error:  # broken bytes raise nearly anything
        raise UserError(f"{path} is no proposals file that this version reads ({error}).") from None
    return Proposals([os.fsdecode(name) for name in names.tolist()], sizes, offsets, boxes)


def default_path(data: Path) -> Path:
    data = Path(os.path.abspath(data))
    return data.with_name(f"{data.name}.proposals.npz")


class SceneProposals(list):
    """Procedural scenes, `source[i]` as of the harness, and their proposals, `boxes[i]` in [0, 1].

    The proposals are the boxes of the scene's objects and four random boxes, since selective search
    also finds boxes that hold no object. Boxes that cover less than 0.09 of the image are left out.
    """

    def __init__(self, count: int):
        super().__init__()
        self.boxes = []
        size = 64, 64
        for number, start in enumerate(range(0, count, 64)):  # bounds the memory
            n = min(64, count - start)
            generator = harness.generator(0, number)
            scenes = densekit.sample_scenes(n, size, generator=generator)
            others = densekit.sample_views(size, (n, 4), scale=(0.1, 0.4), generator=generator)

            images = (scenes.images * 255).round().byte()
            self.extend((image, ()) for image in images)
            proposals = torch.cat([scenes.boxes, others.box], 1) / 64
            large = densekit.box_area(proposals) > 0.09  # unused slots are empty boxes
            self.boxes.extend(x[keep] for x, keep in zip(proposals, large, strict=True))


def image_source(data: Path | None, path: Path | None, *, scenes: int) -> Any:
    """Images, and the proposals `boxes[i]` of each, in [0, 1]; without a folder, `scenes` scenes.

    The images of the folder that have no proposal are left out.
    """
    if data is None and path is not None:
        raise UserError("--proposals belong to images: name their folder with --data.")
    if data is None and not scenes:
        raise UserError("This preset trains on your images: name their folder with --data.")
    if data is None:
        return SceneProposals(scenes)

    path = path or default_path(data)
    images = harness.FolderImages(data)
    known = read_proposals(path)
    spans = itertools.pairwise(known.offsets.tolist())
    rows = {}  # of the boxes of each image that has any
    for name, (start, stop) in zip(known.names, spans, strict=True):
        if start < stop:
            rows[name] = slice(start, stop)

    found = [os.fsdecode(name) for name in images.names.tolist()]
    names = [name for name in found if name in rows]
    if not names:
        raise UserError(f"{path} has no proposal of any image of {data}.")
    if len(names) < len(images) and os.environ.get("RANK", "0") == "0":
        print(f"{len(names)} of {len(images)} images have proposals; the others are left out.")

    counts = np.diff(known.offsets)
    sides = np.tile(known.sizes[:, ::-1], 2)  # width, height, width, height
    boxes = torch.from_numpy(known.boxes / np.repeat(sides, counts, axis=0)).float()
    source: Any = harness.FolderImages(data, names)
    source.boxes = [boxes[rows[name]] for name in names]
    return source


def crop_objects(source: Any, count: int, side: int) -> torch.Tensor:
    """The first proposal of each of so many images, in [0, 1], (count, 3, side, side)."""
    pictures = []
    for i in range(min(count, len(source))):
        image, unreadable = source[i]  # or the next one that can be read
        box = source.boxes[(i + len(unreadable)) % len(source)][0]
        box = box * torch.tensor(image.shape[:0:-1]).repeat(2)
        view = densekit.View(box, torch.tensor(False))
        pictures.append(densekit.crop_views(image / 255, view, side))
    return torch.stack(pictures)


def propose(config: Config) -> None:
    if min(config.workers, config.aspect) < 1 or min(config.longest, config.side, config.most) < 0:
        raise UserError("--workers and --aspect are at least 1, and nothing is negative.")
    images, out = harness.FolderImages(config.data), config.out or default_path(config.data)
    names = list(dict.fromkeys(os.fsdecode(name) for name in images.names.tolist()))
    partial, temporary = (out.with_name(f"{out.name}.{end}") for end in ("partial", "tmp"))
    settings = {k: v for k, v in asdict(config).items() if k not in ("data", "out", "workers")}
    settings = json.loads(json.dumps({"schema": SCHEMA, **settings}))
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out.parent} is not a folder to write to: name another with --out.")
    found, bad = earlier(out, partial, settings), {}
    total, todo = sum(len(x) for _, x in found.values()), [x for x in names if x not in found]
    bar = tqdm(total=len(names), initial=len(names) - len(todo), unit="image")
    searching = closing(search_all(images.folder, todo, config))
    with partial.open("ab") as file, bar, searching as results:
        file.write(b"\n" * bool(file.tell()) + json.dumps(settings).encode() + b"\n")
        for name, result in results:
            if isinstance(result, str):
                bad[name] = result
            else:
                found[name], total = result, total + len(result[1])
                file.write(json.dumps([name, result[0], result[1].tolist()]).encode() + b"\n")
                file.flush()
            bar.set_postfix(boxes=total / max(1, len(found)), bad=len(bad), refresh=False)
            bar.update()
    unreadable = out.with_suffix(".unreadable.txt")
    if bad or unreadable.exists():
        unreadable.write_bytes(b"".join(os.fsencode(bad[x]) + b"\n" for x in names if x in bad))
    if not (names := [name for name in names if name in found]):
        partial.unlink()
        raise UserError(f"No image of {config.data} is readable, such as {min(bad.values())}.")
    sizes, boxes = zip(*(found[name] for name in names), strict=True)
    counts = np.array([len(x) for x in boxes])
    with temporary.open("wb") as file:
        np.savez_compressed(
            file, names=np.array([os.fsencode(name) for name in names]),
            sizes=np.array(sizes, np.int32), offsets=np.cumsum([0, *counts], dtype=np.int64),
            boxes=np.concatenate(boxes), settings=json.dumps(settings),
        )  # fmt: skip
    temporary.replace(out)  # it is there whole or not at all
    partial.unlink(missing_ok=True)
    print(
        f"{len(names)} images, {counts.sum()} proposals, {counts.mean():.1f} an image, "
        f"{(counts == 0).sum()} images without any, {len(bad)} unreadable files: {out}"
    )


if __name__ == "__main__":
    harness.main(propose, CONFIG)  # pyright: ignore[reportPossiblyUnboundVariable]
