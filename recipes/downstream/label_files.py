"""Files of labels and the names in them: read whole, or one sentence that names the file.

This module is no command. The readers of labeled sets use it; docs/recipes/labeled_images.md.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import UserError
from PIL import Image, TiffImagePlugin
from torch import Tensor
from downstream import bands

GRAY_MODES = ("L", "P", "1", "I", "I;16", "I;16B")


# ---- files ---------------------------------------------------------------------------------------
@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Any error inside says in one sentence that this file is broken."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # broken bytes raise nearly anything
        reason = harness.one_line(error)
        if isinstance(error, KeyError):
            reason = f"it has no {reason}"
        raise UserError(f"{path} cannot be used ({reason}).") from None


def read_frame(path: Path, value_range: tuple[float, float] | None = None) -> Tensor:
    """An upright RGB image, uint8 (3, H, W)."""
    with reading(path):
        return harness.read_image(path, value_range)


def upright_size(path: Path, channels: int | None = None) -> tuple[int, int]:
    """The height and the width of an image, upright, from its header: no pixel is decoded.

    A PNG that says more behind its pixels is the exception, since that may be its orientation.
    An array has `channels`, if they are known.
    """
    if path.suffix.lower() in bands.ARRAYS or (channels and path.suffix.lower() in bands.TIFF):
        with reading(path):
            return bands.image_size(path, channels)
    with reading(path), Image.open(path) as file:
        width, height = file.size
        if isinstance(file, TiffImagePlugin.TiffImageFile):
            # Pillow may have turned the size already.
            width = file.tag_v2[256]
            height = file.tag_v2[257]
        if file.format == "PNG" and has_late_chunks(path):
            file.load()
        # A PNG's own method would decode its pixels. The orientations 5 to 8 swap the sides.
        turned = Image.Image.getexif(file).get(274, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def has_late_chunks(path: Path) -> bool:
    """Whether a PNG has texts or EXIF behind its pixels."""
    with path.open("rb") as file:
        place = 8  # behind the signature
        pixels_began = False
        while True:
            file.seek(place)
            head = file.read(8)  # how many bytes follow, and of which kind
            kind = head[4:]
            if len(head) < 8 or kind == b"IEND":
                return False
            if pixels_began and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            pixels_began = pixels_began or kind == b"IDAT"
            place += 12 + int.from_bytes(head[:4], "big")


def read_json(path: Path) -> Any:
    with reading(path):
        return json.loads(path.read_bytes())


def read_small_json(path: Path) -> Any:
    """A JSON file in which no key may stand twice: Python's own reader keeps the last one."""
    with reading(path):
        return json.loads(path.read_bytes(), object_pairs_hook=_each_key_once)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in it")
        found[key] = value
    return found


def read_list(path: Path) -> list[str]:
    """The lines of a text file that are not empty; only a newline ends a line."""
    with reading(path):
        lines = [line.strip(" \t\r") for line in harness.read_list(path)]
        return [line for line in lines if line]


def read_mask(path: Path) -> Tensor:
    """The numbers in a gray or palette PNG, int64 (H, W)."""
    return read_pixels(path, GRAY_MODES)


def read_panoptic_mask(path: Path) -> Tensor:
    """The ids in a PNG of COCO panoptic, int64 (H, W): red counts 1, green 256, blue 65536."""
    return (read_pixels(path, ("RGB",)) * torch.tensor([1, 256, 65536])).sum(-1)


def read_pixels(path: Path, modes: tuple[str, ...]) -> Tensor:
    """The pixels of an image that has one of these modes, int64."""
    with reading(path), Image.open(path) as file:
        if file.mode not in modes:
            raise UserError(f"{path} is no label map: its mode is {file.mode}, not {modes[0]}.")
        if file.format == "JPEG":
            raise UserError(f"{path} is no label map: a JPEG changes the numbers. Use a PNG.")
        step = gray_step(file)  # before the pixels are read
        return torch.from_numpy(np.asarray(file).astype(np.int64)).div(step, rounding_mode="floor")


def gray_step(file: Image.Image) -> int:
    """How far apart Pillow puts the grays 0 and 1: it spreads those of 2 or 4 bits to 0 ... 255."""
    for tile in getattr(file, "tile", []):
        kind = tile[3][0] if isinstance(tile[3], tuple) else tile[3]
        if kind == "L;2":
            return 85
        if kind == "L;4":
            return 17
    return 1


def translate(ids: Tensor, table: dict[int, int], where: Any) -> Tensor:
    """The class of each id, by a table."""
    keys = torch.tensor(sorted(table))
    classes = torch.tensor([table[key] for key in sorted(table)])
    places = torch.searchsorted(keys, ids).clamp_(max=len(keys) - 1)
    unknown = ids[keys[places] != ids]
    if len(unknown):
        raise UserError(f"{where} has the id {unknown[0]}, which is none of the set's classes.")
    return classes[places]


# ---- names of files ------------------------------------------------------------------------------
def list_images(folder: Path) -> list[Path]:
    """The image files of a folder, sorted, no hidden ones.

    An array (npy) beside a picture of the same name belongs to it, and is no image.
    """
    paths = sorted(folder.glob("[!.]*.*"))
    files = [path for path in paths if path.suffix.lower() in bands.EXTENSIONS and path.is_file()]
    pictures = {path.stem for path in files if path.suffix.lower() in harness.EXTENSIONS}
    return [
        path
        for path in files
        if path.suffix.lower() in harness.EXTENSIONS or path.stem not in pictures
    ]


def by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Files by their names without the extension, by which an image finds its label map.

    Two files of one such name are an error that names both.
    """
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(path.stem, path)
        if other != path:
            raise UserError(
                f"{other} and {path} are both named {path.stem}: rename one, since one label map "
                "cannot belong to both."
            )
    return found


class ImageFolder:
    """The image files in and below a folder, by name. A folder is listed when it is first asked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.listed: dict[Path, dict[str, list[Path]]] = {}  # by folder and stem

    def same_stem(self, folder: Path, stem: str) -> list[Path]:
        if folder not in self.listed:
            found: dict[str, list[Path]] = {}
            for path in list_images(folder):
                found.setdefault(path.stem, []).append(path)
            self.listed[folder] = found
        return self.listed[folder].get(stem, [])

    def find(self, name: str) -> Path:
        """The file of this name, with or without its extension; else the path that is missed.

        Two files that differ in the extension alone are an error that names both.
        """
        place = Path(os.path.normpath(name))  # `./a` and `b/../a` are `a`
        if place.is_absolute() or place.parts[:1] in ((), ("..",)):
            raise UserError(f"{name!r} is no image of {self.folder}: give its name in that folder.")

        wanted = self.folder / place
        for stem in (wanted.stem, wanted.name):  # `a.jpg` itself comes before `a.jpg.png`
            files = self.same_stem(wanted.parent, stem)
            if files and (stem == wanted.name or wanted in files):
                return by_stem(files)[stem]
        is_file_name = wanted.suffix.lower() in bands.EXTENSIONS
        return wanted if is_file_name else wanted.with_name(f"{wanted.name}.jpg")


def missing_files(paths: Iterable[Path]) -> list[Path]:
    """Those of some files that are missing. Each folder is listed once."""
    known: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        if path.parent not in known:
            folder = path.parent
            known[folder] = set()
            if folder.is_dir():
                with os.scandir(folder) as entries:
                    known[folder] = {entry.name for entry in entries if entry.is_file()}
        if path.name not in known[path.parent]:
            missing.append(path)
    return missing


def check_files(paths: Iterable[Path]) -> None:
    """A sentence that counts the files that are missing."""
    missing = missing_files(paths)
    if missing:
        raise UserError(f"{len(missing)} files are missing, such as {missing[0]}.")


# ---- choices -------------------------------------------------------------------------------------
class UnknownNameError(UserError):
    """A name that is none of those to choose from."""


def choose(wanted: str, found: Iterable[str], where: Any) -> str:
    """The name that is wanted, or the only one that begins so: val2017 for val."""
    names = sorted(found)
    if wanted in names:
        return wanted
    fits = [name for name in names if name.startswith(wanted)]
    if len(fits) != 1:
        count = len(fits) or "no"
        raise UnknownNameError(f"{where} has {count} {wanted!r}: choose one of {names}.")
    return fits[0]


def choose_file(wanted: str, folder: Path, before: str, after: str) -> Path:
    """The file whose name lies between `before` and `after`, as `choose` understands it."""
    paths = {}
    for path in folder.glob(f"{before}*{after}"):
        paths[path.name.removeprefix(before).removesuffix(after)] = path
    return paths[choose(wanted, paths, folder)]


def choose_folder(wanted: str, parent: Path) -> tuple[str, Path]:
    """The folder below `parent` with this name, as `choose` understands it."""
    paths = {path.name: path for path in parent.glob("*/")}
    name = choose(wanted, paths, parent)
    return name, paths[name]


def folder_names(*parents: Path) -> set[str]:
    """The names of the folders below some others, no hidden ones."""
    return {path.name for parent in parents for path in parent.glob("[!.]*/")}
