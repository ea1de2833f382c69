"""The fields of an annotation: numbers in any spelling, boxes, flags, masks; else a FieldError.

This module is no command. A FieldError ends a sentence that begins with the annotation's name.
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np


class FieldError(ValueError):
    """What is wrong with a field: `has the height None: a whole number is needed`."""


def get(row: Any, key: str) -> Any:
    """A field that must be there."""
    if key not in table(row):
        raise FieldError(f"has no {key!r}")
    return row[key]


def table(row: Any) -> dict:
    """Fields by their names."""
    if not isinstance(row, dict):
        raise FieldError(f"is {short(row)}: fields by their names are needed")
    return row


def items(value: Any, key: str) -> list:
    """A list: a text or a table of fields would be taken for a list of its letters or names."""
    if not isinstance(value, list):
        raise FieldError(f"has the {key} {short(value)}: a list is needed")
    return value


def named_fields(content: Any, start: str = "it is") -> dict:
    """Fields by their names, of a whole file; else a ValueError that ends a sentence of the file.

    The `start` of the message is another one where the fields are a part of the file.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{start} {short(content)}: fields by their names are needed")
    return content


def list_of(content: Any, key: str) -> list:
    """A list of a whole file, by its key; else a ValueError that ends a sentence of the file."""
    if key not in named_fields(content):
        raise ValueError(f"it has no {key!r}")
    if not isinstance(content[key], list):
        raise ValueError(f"it has the {key} {short(content[key])}: a list is needed")
    return content[key]


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def text(value: Any, key: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise FieldError(f"has the {key} {short(value)}: a text is needed")
    return value


def to_float(value: Any) -> float:
    """4, 4.5 or "4.5" as a number; NaN where it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def number(value: Any, key: str) -> float:
    """A finite number: 4, 4.5 or "4.5"."""
    found = to_float(value)
    if not math.isfinite(found):
        raise FieldError(f"has the {key} {short(value)}: a finite number is needed")
    return found


def number_or_none(value: Any, key: str) -> float | None:
    return None if value is None else number(value, key)


LARGEST = 2**31 - 1  # of a whole number: what is larger fits into no image


def whole(value: Any, key: str, at_least: int = 0) -> int:
    """A whole number: 64, 64.0 or "64"."""
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    else:
        try:
            rounded = number(value, key)
            found = int(rounded) if rounded.is_integer() else at_least - 1
        except FieldError:
            found = at_least - 1
    if found < at_least:
        raise FieldError(
            f"has the {key} {short(value)}: a whole number, {at_least} or more, is needed"
        )
    if found > LARGEST:
        raise FieldError(f"has the {key} {short(value)}: at most {LARGEST} is possible")
    return found


def flag(value: Any, key: str) -> bool:
    """Yes or no: 0 or 1 in any spelling, true or false; nothing is no."""
    if value is None or isinstance(value, bool):
        return bool(value)
    words = {"true": True, "false": False}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    try:
        found = number(value, key)
    except FieldError:
        found = -1.0
    if found not in (0, 1):
        raise FieldError(f"has the {key} {short(value)}: 0 or 1 is needed")
    return bool(found)


def flags(row: dict, names: Collection[str]) -> dict[str, bool]:
    """Those of some flags that a row has, in any spelling of their keys.

    `crowd`, `iscrowd`, `is_crowd` and `isCrowd` are the flag `crowd`; what stands twice is yes if
    one of them is.
    """
    found: dict[str, bool] = {}
    for key, value in row.items():
        name = key.lower().replace("_", "").removeprefix("is")
        if name in names:
            found[name] = flag(value, key) or found.get(name, False)
    return found


def crowd_and_difficult(row: dict) -> tuple[bool, bool]:
    """Whether an object is a crowd, or to be ignored like one, and whether it is difficult."""
    found = flags(row, ("crowd", "ignore", "difficult"))
    crowd = found.get("crowd", False) or found.get("ignore", False)
    return crowd, found.get("difficult", False)


def four(value: Any, key: str) -> list[float]:
    """Four finite numbers."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise FieldError(f"has the {key} {short(value)}: four numbers are needed")
    return [number(x, key) for x in value]


def corners(value: Any, key: str) -> tuple[float, float, float, float]:
    """COCO's x, y, width, height as x0, y0, x1, y1."""
    x0, y0, width, height = four(value, key)
    return x0, y0, x0 + width, y0 + height


# ---- masks ---------------------------------------------------------------------------------------
FARTHEST = 1e6  # pixels; COCO's rasterizer holds every pixel of an outline, also outside the image


def segmentation(value: Any, size: tuple[int, int]) -> list | dict | None:
    """COCO's polygons, or run lengths, of an image of this size; None where there is no mask.

    Polygons of less than three corners enclose nothing and are dropped. They must not reach COCO's
    own program, which reads the whole list as boxes if the first one has four numbers.
    """
    if value in (None, [], {}):
        return None
    if isinstance(value, dict):
        return run_lengths(value, size)
    if not isinstance(value, list) or not all(isinstance(x, list) for x in value):
        raise FieldError(
            f"has the segmentation {short(value)}: a list of polygons, or run lengths, is needed"
        )
    polygons = [polygon(x) for x in value if len(x) >= 6 or any(isinstance(y, list) for y in x)]
    return polygons or None


def is_in_image(shape: list | dict, size: tuple[int, int]) -> bool:
    """Whether a polygon reaches into an image of this size, or any run length is of the inside."""
    if isinstance(shape, dict):
        counts = shape["counts"]
        runs = decode_counts(counts) if isinstance(counts, str) else counts
        return any(x > 0 for x in runs[1::2])
    height, width = size
    for outline in shape:
        xs = outline[0::2]
        ys = outline[1::2]
        if min(xs) < width and max(xs) > 0 and min(ys) < height and max(ys) > 0:
            return True
    return False


def polygon(value: list) -> list[float]:
    """x and y of three corners or more."""
    if any(isinstance(x, list) for x in value[:1]):
        raise FieldError(f"has a polygon of {short(value)}: x, y, x, y ... in one list are needed")
    try:
        total = sum(value)  # NaN and inf survive a sum, and text is refused
        largest = max(max(value), -min(value))
    except TypeError:
        value = [number(x, "polygon") for x in value]
        total = sum(value)
        largest = max(max(value), -min(value))
    if len(value) % 2:
        raise FieldError(f"has a polygon of {len(value)} numbers: an x and a y each are needed")
    if not math.isfinite(total) or largest > FARTHEST:
        raise FieldError("has a polygon with a corner that is not finite, or far off the image")
    return value


def run_lengths(value: dict, size: tuple[int, int]) -> dict:
    """Run lengths as COCO's program takes them, {"size", "counts"}, whose runs fill the image.

    They are checked here, because faster-coco-eval 1.7 takes runs that are too few, and what is
    then drawn behind them is arbitrary.
    """
    sides = get(value, "size")
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        raise FieldError(f"has run lengths of the size {short(sides)}: two numbers are needed")
    said = (whole(sides[0], "height"), whole(sides[1], "width"))
    if said != size:
        raise FieldError(f"has run lengths of the size {said}: the image has {size}")

    counts = get(value, "counts")
    if isinstance(counts, str):
        runs = decode_counts(counts)
    elif isinstance(counts, list):
        runs = np.array([whole(x, "count") for x in counts], dtype=np.int64)
        counts = runs.tolist()
    else:
        raise FieldError(f"has the counts {short(counts)}: a list or a text is needed")
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise FieldError(f"has run lengths of {runs.sum()} pixels: the image has {size}")
    return {"size": list(size), "counts": counts}


def decode_counts(text: str) -> np.ndarray:
    """The runs in COCO's text: 6 bits a character, the lowest first, from the third run on as
    differences to the run before the last.
    """
    codes = np.array([ord(x) - 48 for x in text], dtype=np.int64)
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise FieldError(f"has the counts {short(text)}: they are broken")
    is_last = (codes & 32) == 0
    starts = np.concatenate([[0], np.flatnonzero(is_last)[:-1] + 1])
    lengths = np.diff(np.append(starts, len(codes)))
    if lengths.max() > 7:  # more than 35 bits
        raise FieldError(f"has the counts {short(text)}: they are broken")

    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * places), starts)
    negative = (codes[is_last] & 16) > 0
    values = values - np.where(negative, 1 << (5 * lengths), 0)

    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs
