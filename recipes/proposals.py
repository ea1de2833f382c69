"""Region proposals of a folder of images, by selective search: made once, for d3ssl.py and soco.py.

    python recipes/proposals.py --data FOLDER              # writes FOLDER.proposals.npz
    python recipes/d3ssl.py --preset paper --data FOLDER --proposals FOLDER.proposals.npz

Run the same command again to resume, or to add new images. More: docs/recipes/proposals.md.
The file:

    names     bytes (n,)        path of each image, relative to the data folder
    sizes     int32 (n, 2)      height and width of each image, upright
    offsets   int64 (n + 1,)    image i has boxes[offsets[i]:offsets[i + 1]], maybe none
    boxes     int32 (m, 4)      x0 y0 x1 y1 in pixels of the image, half-open, from large to small
    settings  JSON              settings of the search and of the filter
"""

import io
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Config:
    data: Path  # Folder of images, any tree, or a .txt file that lists them.
    out: Path | None = None  # File to write; by default DATA.proposals.npz, beside the data.
    mode: Literal["fast", "quality"] = "fast"  # Mode of opencv: quality finds more, but is slower.
    longest: int = 640  # Larger images are shrunk to this longest side, in pixels; 0: never.
    side: int = 32  # Smallest width and height of a box, in pixels of the image.
    aspect: float = 3.0  # Largest ratio of a box's longer side to its shorter side.
    scale: tuple[float, float] = (0.3, 0.8)  # Range of the root of a box's share of the image.
    most: int = 0  # Number of boxes to keep of each image, the largest ones; 0: all.
    workers: int = os.cpu_count() or 1  # Processes that search.
    # Range of values that is mapped to black ... white, for images whose file tells none.
    value_range: tuple[float, float] | None = None
    warn_after: float = 60.0  # Seconds without a new result or listed file, then a warning.
    give_up_after: float = 600.0  # Seconds without a new result or listed file, then the end.


def read_options() -> Config:
    """Read the command line."""
    return tyro.cli(Config, description=__doc__)


if __name__ == "__main__":
    # The options are read before torch is imported, so that --help answers at once. This file then
    # runs a second time, as a module, and that time also the part below. The script itself ends at
    # sys.exit.
    config = read_options()
    import harness

    recipe = harness.module_of(__file__)
    sys.exit(harness.main(recipe.propose, config))

import harness
import numpy as np
import torch
from downstream.fields import four, text, whole
from downstream.label_files import upright_size
from harness import UserError
from tqdm import tqdm
import densekit as dk


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before any data is read."""
    harness.check(config.longest >= 0, f"--longest is {config.longest}: give 0 pixels or more.")
    harness.check(config.side >= 0, f"--side is {config.side}: give 0 pixels or more.")
    harness.check(config.aspect >= 1, f"--aspect is {config.aspect}: give 1 or more.")
    low, high = config.scale
    harness.check(
        0 <= low <= high <= 1,
        f"--scale is {harness.as_typed(config.scale)}: give two shares from 0 to 1, the smaller "
        "first.",
    )
    harness.check(config.most >= 0, f"--most is {config.most}: give 0 boxes or more.")
    harness.check(config.workers >= 1, f"--workers is {config.workers}: give 1 process or more.")
    harness.check_value_range(config.value_range)
    harness.check_patience(config)


# ==== one image ===================================================================================
class Found(NamedTuple):
    """The result of the search in one image."""

    size: tuple[int, int]  # height and width
    boxes: np.ndarray  # int32 (m, 4), in pixels of the image


def select(boxes: np.ndarray, size: tuple[int, int], config: Config) -> np.ndarray:
    """The boxes (m, 4) that pass the filter, each once, from large to small, then by x0 y0 x1."""
    boxes = np.unique(boxes.reshape(-1, 4).astype(np.int64), axis=0)
    width = boxes[:, 2] - boxes[:, 0]
    height = boxes[:, 3] - boxes[:, 1]
    shorter = np.minimum(width, height)
    longer = np.maximum(width, height)
    area = width * height
    scale = np.sqrt(area / (size[0] * size[1]))

    slack = 1 + 1e-9  # a box on a limit passes, whatever the rounding
    low, high = config.scale
    keep = shorter >= max(config.side, 1)
    keep &= longer <= config.aspect * slack * shorter
    keep &= low <= scale * slack
    keep &= scale <= high * slack

    boxes = boxes[keep]
    order = np.argsort(-area[keep], kind="stable")  # np.unique has sorted boxes of the same area
    if config.most:
        order = order[: config.most]
    return boxes[order].astype(np.int32)


def search(path: Path, config: Config) -> Found | str:
    """The result for one image file, or a sentence that says why there is none."""
    import cv2  # only the workers need it

    cv2.setNumThreads(1)
    finder = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    try:
        image = harness.read_image(path, config.value_range)
        height, width = image.shape[-2:]
        shrunk_width, shrunk_height = shrunk_size(width, height, config.longest)
        bgr = np.ascontiguousarray(image.flip(0).permute(1, 2, 0).numpy())
        bgr = cv2.resize(bgr, (shrunk_width, shrunk_height), interpolation=cv2.INTER_AREA)

        finder.setBaseImage(bgr)
        if config.mode == "fast":
            finder.switchToSelectiveSearchFast()
        else:
            finder.switchToSelectiveSearchQuality()
        boxes = np.asarray(finder.process()).reshape(-1, 4)  # x y width height, in random order

        boxes[:, 2:] += boxes[:, :2]
        full_size = np.array([width, height, width, height])
        searched_size = np.array([shrunk_width, shrunk_height, shrunk_width, shrunk_height])
        boxes = np.rint(boxes * full_size / searched_size)
    except Exception as error:  # broken bytes raise nearly anything
        return f"{path}: {harness.one_line(error)}"
    return Found((height, width), select(boxes, (height, width), config))


def shrunk_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """Width and height at which no side is longer than `longest`; 0 allows any."""
    if longest == 0 or max(width, height) <= longest:
        return width, height
    ratio = longest / max(height, width)
    return max(1, round(width * ratio)), max(1, round(height * ratio))


# ==== all images ==================================================================================
def start_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that search. A fork server starts them, and imports torch once for all of them."""
    recipes = str(Path(__file__).parent)
    module_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if recipes not in module_path:
        # The fork server looks for modules where the environment says, and nowhere else.
        os.environ["PYTHONPATH"] = os.pathsep.join([recipes, *filter(None, module_path)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness"])
    return ProcessPoolExecutor(workers, context, start_worker)


def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to heed
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this worker when the main process ends, even if that was killed."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def search_all(folder: Path, names: list[str], config: Config) -> Iterator[tuple[str, Any]]:
    """Each name with what `search` returns for it, in any order.

    Only a few images are under way at any time, so that results do not pile up.
    """
    patience = harness.patience_of(config)
    pool = start_pool(config.workers)
    remaining = iter(names)
    pending: dict[Future, str] = {}
    try:
        while True:
            room = 4 * config.workers - len(pending)
            for name in itertools.islice(remaining, room):
                future = pool.submit(search, folder / name, config)
                pending[future] = name
            if not pending:
                break

            with harness.Watch("No image has been searched", patience):
                done = wait(pending, return_when=FIRST_COMPLETED).done
            # A dead worker fails every pending search: the results that came before it count.
            for future in sorted(done, key=has_failed):
                result = future.result()
                name = pending.pop(future)
                yield name, result
    except BrokenExecutor:
        oldest = list(pending.values())[: config.workers]
        raise UserError(
            f"A worker process died, out of memory or at one of {', '.join(oldest)}: try fewer "
            "--workers, or without that image."
        ) from None
    except (ImportError, AttributeError) as error:
        raise UserError(f"opencv-contrib-python-headless is missing ({error}).") from None
    finally:
        if pending:  # Ctrl-C does not wait for what is under way
            for child in multiprocessing.active_children():
                child.terminate()
        pool.shutdown(cancel_futures=True)


def has_failed(future: Future) -> bool:
    return future.exception() is not None


# ==== the file ====================================================================================
SCHEMA = 1  # version of the layout


class Proposals(NamedTuple):
    """The content of a proposals file, which the docstring of this recipe describes."""

    names: list[str]
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray


def default_path(data: Path) -> Path:
    """FOLDER.proposals.npz, beside the folder or the list."""
    data = Path(os.path.abspath(data))
    return data.with_name(f"{data.name}.proposals.npz")


def read_proposals(path: str | Path) -> Proposals:
    """The content of a proposals file; a UserError says what is wrong with it."""
    if not Path(path).is_file():
        raise UserError(f"There is no proposals file {path}: recipes/proposals.py writes one.")
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            schema = json.loads(str(file["settings"]))["schema"]
            names = [os.fsdecode(name) for name in file["names"].tolist()]
            found = Proposals(names, file["sizes"], file["offsets"], file["boxes"])
        images = len(found.names)
        boxes = len(found.boxes)
        valid = (
            schema == SCHEMA
            and found.sizes.shape == (images, 2)
            and found.offsets.shape == (images + 1,)
            and found.boxes.shape == (boxes, 4)
        )
        if not valid:
            raise ValueError(f"not schema {SCHEMA}")
        check_content(found)
    except Exception as error:  # broken bytes raise nearly anything
        raise UserError(f"{path} is no proposals file that this version reads ({error}).") from None
    return found


def check_content(found: Proposals) -> None:
    """Each box belongs to one image: else an image would take the boxes of another."""
    numbers = (found.sizes, found.offsets, found.boxes)
    if not all(np.issubdtype(x.dtype, np.integer) for x in numbers):
        raise ValueError("its sizes, offsets and boxes are not all whole numbers")
    if (found.sizes < 1).any():
        raise ValueError("it has an image without a pixel")

    starts = found.offsets[:-1]
    stops = found.offsets[1:]
    if found.offsets[0] != 0 or found.offsets[-1] != len(found.boxes) or (starts > stops).any():
        raise ValueError(f"its offsets do not rise from 0 to the {len(found.boxes)} boxes")

    heights_and_widths = found.sizes.repeat(np.diff(found.offsets), axis=0)
    corners = found.boxes[:, 2:]
    is_inside = (found.boxes[:, :2] >= 0) & (corners <= heights_and_widths[:, ::-1])
    if not (is_inside & (found.boxes[:, :2] <= corners)).all():
        raise ValueError("it has a box that does not lie in its image")


def write_proposals(out: Path, found: dict[str, Found], settings: dict[str, Any]) -> None:
    """Write the file; it is there whole or not at all."""
    counts = [len(image.boxes) for image in found.values()]
    content = io.BytesIO()
    np.savez_compressed(
        content,
        names=np.array([os.fsencode(name) for name in found]),
        sizes=np.array([image.size for image in found.values()], np.int32),
        offsets=np.cumsum([0, *counts], dtype=np.int64),
        boxes=np.concatenate([image.boxes for image in found.values()]),
        settings=json.dumps(settings),
    )
    harness.write(out, content.getvalue())


def read_earlier(out: Path, partial: Path, settings: dict[str, Any]) -> dict[str, Found]:
    """The results of earlier runs, which the file or the partial file holds.

    A partial file has the settings and then the result of one image a line, each as JSON.
    """
    results: dict[str, Found] = {}
    if out.exists():
        known = read_proposals(out)
        for row, name in enumerate(known.names):
            start, stop = known.offsets[row : row + 2]
            results[name] = Found(tuple(known.sizes[row].tolist()), known.boxes[start:stop])
        with np.load(out) as file:
            check_settings(out, json.loads(str(file["settings"])), settings)

    if partial.exists():
        with partial.open("rb") as lines:
            for line in lines:
                row = parse_line(line)
                if isinstance(row, dict):
                    check_settings(partial, row, settings)
                elif row is not None:
                    name, found = parse_row(row, partial)
                    results[name] = found
    return results


def parse_row(row: Any, partial: Path) -> tuple[str, Found]:
    """The name of an image and what was found in it, of a line of the partial file."""
    try:
        name, size, boxes = row
        height, width = (whole(x, "size", 1) for x in size)
        rows = [[whole(x, "box") for x in four(box, "box")] for box in boxes]
        found = Found((height, width), np.array(rows, np.int32).reshape(-1, 4))
        return text(name, "name"), found
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{partial} has a line that is no result ({error}): remove the file, and the images "
            "that it names are searched again."
        ) from None


def parse_line(line: bytes) -> Any:
    """A line of the partial file; None for a line that was cut when its run was killed."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def check_settings(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Proposals that were found with other settings do not go into the same file."""
    difference = harness.difference_of(old, new)
    harness.check(
        not difference,
        f"{path} has other settings ({difference}): move it, or choose another file with --out.",
    )


# ==== images for a training =======================================================================
class ImagesWithProposals(harness.FolderImages):
    """The images of a folder or list that have proposals, `boxes[i]` of each, in [0, 1]."""

    def __init__(
        self,
        data: Path,
        path: Path,
        *,
        value_range: tuple[float, float] | None = None,
        patience: harness.Patience = harness.PATIENCE,
    ):
        super().__init__(data, patience=patience)
        known = read_proposals(path)
        counts = np.diff(known.offsets)
        rows = {name: row for row, name in enumerate(known.names) if counts[row] > 0}

        warn_of_shapes(self, known, path)
        listed = [os.fsdecode(name) for name in self.names.tolist()]
        names = [name for name in listed if name in rows]
        if not names:
            raise UserError(f"{path} has no proposal of any image of {data}.")
        if len(names) < len(listed) and harness.is_main_process():
            harness.tell(
                f"{len(names)} of {len(listed)} images have proposals; the others are left out."
            )
        super().__init__(data, names, value_range=value_range)

        widths_and_heights = np.tile(known.sizes[:, ::-1], 2)
        boxes = torch.from_numpy(known.boxes / widths_and_heights.repeat(counts, axis=0)).float()
        self.boxes = []
        for name in names:
            start, stop = known.offsets[rows[name] : rows[name] + 2]
            self.boxes.append(boxes[start:stop])


FIRST_FEW = 16  # images whose shapes are compared: reading the headers of all would take long


def warn_of_shapes(images: harness.FolderImages, known: Proposals, path: Path) -> None:
    """Say where the first images have other shapes than those of their proposals.

    A resized copy of an image may use its proposals. An image of another shape is likely another.
    """
    sizes = dict(zip(known.names, known.sizes.tolist(), strict=True))
    names = [os.fsdecode(name) for name in images.names[:FIRST_FEW].tolist()]
    for name in names:
        if name not in sizes:
            continue
        try:
            size = upright_size(images.folder / name)
        except UserError:  # what cannot be read is passed over later
            continue
        said = sizes[name]
        gap = abs(size[0] * said[1] - size[1] * said[0])
        is_rounded = gap <= max(*size, *said)  # a side may be off by a pixel
        if not is_rounded and harness.is_main_process():
            harness.say(
                f"warning: {images.folder / name} is {size[0]} x {size[1]} pixels, but {path} has "
                f"proposals of an image of {said[0]} x {said[1]}: if it was not resized, make new "
                "ones with recipes/proposals.py."
            )
            return


class SceneProposals(list):
    """Procedural scenes, `source[i]` as of the harness, and their proposals, `boxes[i]` in [0, 1].

    The proposals are the boxes of the scene's objects and four random boxes, since selective search
    also finds boxes that hold no object. Boxes that cover less than 0.09 of the image are left out.
    With `co_occurrence` objects come in pairs: see `densekit.sample_scenes`.
    """

    def __init__(self, count: int, *, co_occurrence: float = 0.0):
        super().__init__()
        self.boxes = []
        size = 64, 64
        for number, start in enumerate(range(0, count, 64)):  # bounds the memory
            n = min(64, count - start)
            generator = harness.generator(0, number)
            scenes = dk.sample_scenes(n, size, generator=generator, co_occurrence=co_occurrence)
            others = dk.sample_views(size, (n, 4), scale=(0.1, 0.4), generator=generator)

            images = (scenes.images * 255).round().byte()
            self.extend((image, ()) for image in images)
            proposals = torch.cat([scenes.boxes, others.box], 1) / 64
            large = dk.box_area(proposals) > 0.09  # unused slots are empty boxes
            self.boxes.extend(x[keep] for x, keep in zip(proposals, large, strict=True))


def image_source(
    data: Path | None,
    path: Path | None,
    *,
    scenes: int,
    co_occurrence: float = 0.0,
    value_range: tuple[float, float] | None = None,
    patience: harness.Patience = harness.PATIENCE,
) -> Any:
    """Images and the proposals `boxes[i]` of each, in [0, 1]; without a folder, `scenes` scenes."""
    if data is None and path is not None:
        raise UserError("--proposals belong to images: name their folder with --data.")
    if data is None and not scenes:
        raise UserError("This preset trains on your images: name their folder with --data.")
    if data is None:
        return SceneProposals(scenes, co_occurrence=co_occurrence)
    path = path or default_path(data)
    return ImagesWithProposals(data, path, value_range=value_range, patience=patience)


def crop_objects(source: Any, count: int, side: int) -> torch.Tensor:
    """The first proposal of each of the first `count` images, in [0, 1], (count, 3, side, side)."""
    crops = []
    for i in range(min(count, len(source))):
        image, unreadable = source[i]
        read = (i + len(unreadable)) % len(source)  # the next image that can be read
        height, width = image.shape[-2:]
        box = source.boxes[read][0] * torch.tensor([width, height, width, height])
        view = dk.View(box, torch.tensor(False))
        crops.append(dk.crop_views(image / 255, view, side))
    return torch.stack(crops)


# ==== loop ========================================================================================
def propose(config: Config) -> None:
    """Search all images that no earlier run has searched, and write the file."""
    check_options(config)
    patience = harness.patience_of(config)
    images = harness.FolderImages(config.data, patience=patience)
    names = [os.fsdecode(name) for name in images.names.tolist()]
    names = list(dict.fromkeys(names))  # a list may name an image twice
    out = config.out or default_path(config.data)
    if out.is_dir():
        example = out / default_path(config.data).name
        raise UserError(f"--out is {out}: give a file, such as {example}, instead of a folder.")
    partial = out.with_name(f"{out.name}.partial")
    for path in (out, partial, out.with_suffix(".unreadable.txt")):
        harness.check_output("--out", path)

    settings = {"schema": SCHEMA, **asdict(config)}
    for name in ("data", "out", "workers", "warn_after", "give_up_after"):
        del settings[name]
    if config.value_range is None:
        del settings["value_range"]  # so that files of earlier versions, without it, fit
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file

    results = read_earlier(out, partial, settings)
    todo = [name for name in names if name not in results]
    boxes = sum(len(found.boxes) for found in results.values())
    unreadable = {}

    bar = tqdm(total=len(names), initial=len(names) - len(todo), unit="image")
    searching = closing(search_all(images.folder, todo, config))
    with partial.open("ab") as file, bar, searching as found_in_any_order:
        if file.tell():
            file.write(b"\n")  # ends a line that a kill has cut
        file.write(json.dumps(settings).encode() + b"\n")
        for name, found in found_in_any_order:
            if isinstance(found, str):
                unreadable[name] = found
            else:
                results[name] = found
                boxes += len(found.boxes)
                row = [name, found.size, found.boxes.tolist()]
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
            bar.set_postfix(boxes=boxes / max(1, len(results)), bad=len(unreadable), refresh=False)
            bar.update()

    write_unreadable(out.with_suffix(".unreadable.txt"), names, unreadable)
    results = {name: results[name] for name in names if name in results}
    if not results:
        partial.unlink()
        example = min(unreadable.values())
        raise UserError(f"No image of {config.data} is readable, such as {example}.")
    write_proposals(out, results, settings)
    partial.unlink()

    counts = np.array([len(found.boxes) for found in results.values()])
    harness.tell(
        f"{len(results)} images, {counts.sum()} proposals, {counts.mean():.1f} an image, "
        f"{(counts == 0).sum()} images without any, {len(unreadable)} unreadable files: {out}"
    )


def write_unreadable(path: Path, names: list[str], unreadable: dict[str, str]) -> None:
    """Name the unreadable files, in the order of the images; an older list is replaced."""
    if not unreadable and not path.exists():
        return
    lines = [
        harness.printable(unreadable[name]).encode() + b"\n" for name in names if name in unreadable
    ]
    path.write_bytes(b"".join(lines))
