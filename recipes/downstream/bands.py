"""Images of any number of channels and any values: multi-band TIFF, npy, and pictures as stored.

Most recipes read pictures: RGB of 8 bits. `adapt.py` and `evaluate.py` also read bands: images of
other channels or of more bits, whose values stay as they are in the file.

This module is no command. More: docs/recipes/adapt.md, "Images as you have them".
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import tifffile
import torch
from harness import UserError
from PIL import Image, ImageOps
from torch import Tensor
import densekit as dk
from downstream.crops import crop_floats

ARRAYS = (".npy",)
EXTENSIONS = (*harness.EXTENSIONS, *ARRAYS)
TIFF = (".tif", ".tiff")
PICTURE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")
# Where nothing says which axis of an array has the channels, it is the one that is at most so long.
MOST_CHANNELS = 32
FILE_ORDER = "file"  # what a side-car says of the order of the channels
SAMPLED = 256  # images that mean and standard deviation are measured on
SAMPLED_SIDE = 256  # pixels along each side of them


# What is wrong with a file is said in a sentence of ours.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class Bands(NamedTuple):
    """How the values in files of bands become those of images."""

    channels: int
    value_range: tuple[float, float]  # the values that become 0 and 1
    clip: bool  # whether values outside become 0 and 1, too
    mean: tuple[float, ...]  # of each channel, of images; pixels without data have it
    std: tuple[float, ...]

    def side_car(self) -> dict[str, Any]:
        """What the side-car of an encoder tells that was trained on such images."""
        return {
            "channels": self.channels,
            "color_order": FILE_ORDER,
            "value_range": self.value_range,
            "clip": self.clip,
            "mean": self.mean,
            "std": self.std,
        }


def bands_of(facts: dict[str, Any]) -> Bands | None:
    """What `Bands.side_car` told; None for an encoder of pictures."""
    if facts.get("color_order", "RGB") != FILE_ORDER:
        return None
    low, high = facts["value_range"]
    mean = tuple(facts["mean"])
    return Bands(len(mean), (low, high), bool(facts["clip"]), mean, tuple(facts["std"]))


# ---- files ---------------------------------------------------------------------------------------
class Stored(NamedTuple):
    """An image as its file has it."""

    values: Tensor  # (c, H, W), in the type of the file
    no_data: float | None = None  # the value of pixels without data, where the file names one

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


def is_picture(path: str | Path) -> bool:
    """Whether `harness.read_image` loses nothing of a file: it has 8 bits, and is RGB or gray."""
    suffix = Path(path).suffix.lower()
    if suffix in ARRAYS:
        return False
    if suffix not in TIFF:
        with Image.open(path) as file:
            return file.mode in PICTURE_MODES
    with tifffile.TiffFile(path) as file:
        check_pages(file)
        page: Any = file.pages[0]
        samples = page.samplesperpixel
        alpha = sum(x != tifffile.EXTRASAMPLE.UNSPECIFIED for x in page.extrasamples)
        has_bytes = page.dtype in (np.uint8, np.bool_)
        is_stack = samples == 1 and len(file.pages) > 1
        grays = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE)
        colors = 3 if page.photometric == tifffile.PHOTOMETRIC.RGB else samples - alpha
        if page.photometric in grays:
            colors = 1
    return has_bytes and not is_stack and samples == colors + alpha


def read_stored(path: str | Path, channels: int | None = None) -> Stored:
    """An image with all channels of its file; what can be mapped into memory is read when used.

    Args:
        path: An array (npy), a TIFF, or a picture.
        channels: The number of channels, if it is known. An array of three axes has them on the
            first or on the last one.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is no regular file")  # a pipe would be waited for
    suffix = Path(path).suffix.lower()
    no_data = None
    if suffix in TIFF:
        values, no_data = _read_tiff(path)
    elif suffix in ARRAYS:
        values = np.load(path, mmap_mode="c", allow_pickle=False)  # a pickle would run code
        if not isinstance(values, np.ndarray):
            raise ValueError("it holds several arrays")
        if values.ndim != 2:
            values = np.moveaxis(values, channel_axis(values.shape, channels), 0)
    else:
        values = _read_picture(path)
    if values.ndim == 2:
        values = values[None]
    return Stored(_as_tensor(values), no_data)


def _as_tensor(values: np.ndarray) -> Tensor:
    if values.size == 0:
        raise ValueError(f"it has no pixel: its shape is {_product(values.shape)}")
    if values.dtype.kind not in "buif":
        raise ValueError(f"its values are of the type {values.dtype}, which is no number")
    if values.dtype.itemsize > 8:  # floats of 128 bits
        values = values.astype(np.float64)
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    if min(values.strides) < 0 or not values.flags.writeable:
        values = values.copy()  # torch takes no others
    return torch.from_numpy(values)


def _product(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "empty"


def channel_axis(shape: Sequence[int], channels: int | None = None) -> int:
    """Which axis of an array has the channels, 0 or 2; a ValueError where that is not clear."""
    if len(shape) != 3:
        raise ValueError(
            f"its shape is {_product(shape)}: an image has two axes, or three with the channels "
            "on the first or the last one"
        )
    ends = (0, 2)
    fits = [axis for axis in ends if shape[axis] == channels]
    if not fits:  # the number is not known, or it is another one
        fits = [axis for axis in ends if shape[axis] <= MOST_CHANNELS]
        if len(fits) == 2 and shape[0] != shape[2]:
            fits = [0 if shape[0] < shape[2] else 2]  # a small image
    if len(fits) != 1:
        raise ValueError(
            f"its shape is {_product(shape)}: whether the channels are on the first or on the last "
            "axis is not clear, so give their number with --channels, or save it as a TIFF"
        )
    return fits[0]


def _read_picture(path: str | Path) -> np.ndarray:
    """All channels of a file that Pillow reads."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        keeps_values = image.mode in ("L", "LA", "RGB", "RGBA") or image.mode[0] in "IF"
        if not keeps_values:
            mode = "RGBA" if image.has_transparency_data else "RGB"
            image = image.convert(mode)
        values = np.array(image)
    return values if values.ndim == 2 else np.moveaxis(values, -1, 0)


# How an image (c, H, W) of each orientation is turned upright; those from 5 on swap the sides.
ORIENTATION = 274
UPRIGHT = {
    2: lambda x: x[:, :, ::-1],
    3: lambda x: x[:, ::-1, ::-1],
    4: lambda x: x[:, ::-1],
    5: lambda x: x.swapaxes(1, 2),
    6: lambda x: x.swapaxes(1, 2)[:, :, ::-1],
    7: lambda x: x.swapaxes(1, 2)[:, ::-1, ::-1],
    8: lambda x: x.swapaxes(1, 2)[:, ::-1],
}


class TiffLayout(NamedTuple):
    """How the first image of a TIFF lies in its array."""

    order: tuple[int, ...]  # of the axes that make it (..., c, H, W), or (..., H, W) without c
    shape: tuple[int, ...]  # of the array
    orientation: int
    no_data: float | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, upright."""
        height, width = [self.shape[axis] for axis in self.order[-2:]]
        return (width, height) if self.orientation >= 5 else (height, width)


def check_pages(file: tifffile.TiffFile) -> None:
    """A ValueError where pages are missing: a file that was cut off would have fewer channels."""
    pages: Any = file.pages
    count = len(pages)  # all are looked for
    file.filehandle.seek(pages.next_page_offset)
    link = file.filehandle.read(file.tiff.offsetsize)
    if link != bytes(file.tiff.offsetsize):  # the last page has no next one
        raise ValueError(f"its page {count + 1} is missing: the file is cut off")


def tiff_layout(file: tifffile.TiffFile) -> TiffLayout:
    """Where the channels are in a TIFF: its samples are the channels, or else its pages."""
    check_pages(file)
    series = file.series[0]
    axes = series.axes
    others = [i for i, name in enumerate(axes) if name not in "YX" and series.shape[i] > 1]
    single = [i for i, name in enumerate(axes) if name not in "YX" and series.shape[i] == 1]
    is_image = axes.count("Y") == 1 and axes.count("X") == 1
    names = [axes[i] for i in others]
    # S are samples and C channels; Q and I are pages of which nothing more is said.
    if not is_image or len(names) > 1 or not set(names) <= set("SCQI"):
        raise ValueError(
            f"it is a stack with the axes {axes} of {_product(series.shape)}: one image with its "
            "channels is needed"
        )
    order = (*single, *others, axes.index("Y"), axes.index("X"))
    tags = series.keyframe.tags
    no_data = tags.get(harness.NO_DATA)
    marked = None if no_data is None else harness.as_number(no_data.value)
    orientation = tags.get(ORIENTATION)
    turned = 1 if orientation is None else int(orientation.value)
    return TiffLayout(order, tuple(series.shape), turned, marked)


def _read_tiff(path: str | Path) -> tuple[np.ndarray, float | None]:
    """The first image of a TIFF, (c, H, W), and its value of pixels without data."""
    with tifffile.TiffFile(path) as file:
        layout = tiff_layout(file)
        if file.series[0].dataoffset is None:  # compressed, or in tiles
            values = file.series[0].asarray()
        else:
            values = tifffile.memmap(path, series=0, mode="c")
    sides = [layout.shape[axis] for axis in layout.order[-2:]]
    values = values.transpose(layout.order).reshape(-1, *sides)
    turn = UPRIGHT.get(layout.orientation)
    return (values if turn is None else turn(values)), layout.no_data


def image_size(path: str | Path, channels: int | None = None) -> tuple[int, int]:
    """The height and the width of a TIFF or an array, upright, from its header."""
    if Path(path).suffix.lower() in TIFF:
        with tifffile.TiffFile(path) as file:
            return tiff_layout(file).size
    _, height, width = read_stored(path, channels).shape
    return height, width


# ---- values --------------------------------------------------------------------------------------
FLOATS = (0.0, 1.0)  # the range of what tells none: its values stay as they are


def range_of(dtype: torch.dtype) -> tuple[float, float]:
    """The values that become 0 and 1; those of floats and of 32 bits stay as they are."""
    bits = {torch.uint8: 8, torch.int8: 7, torch.uint16: 16, torch.int16: 15}.get(dtype)
    return FLOATS if bits is None else (0.0, 2.0**bits - 1)


def scale_values(
    stored: Stored, value_range: tuple[float, float], *, clip: bool
) -> tuple[Tensor, Tensor]:
    """The values of an image as floats, and where it has data, both (c, H, W)."""
    low, high = value_range
    values = stored.values.float()
    has_data = values.abs() < harness.HUGE  # NaN has none
    if stored.no_data is not None:
        has_data &= values != torch.tensor(stored.no_data).float()
    scaled = (values - low) / (high - low)
    return (scaled.clamp(0, 1) if clip else scaled), has_data


def to_floats(stored: Stored, bands: Bands) -> Tensor:
    """An image for an encoder of bands, float (c, H, W); pixels without data have the mean."""
    scaled, has_data = scale_values(stored, bands.value_range, clip=bands.clip)
    mean = torch.tensor(bands.mean).view(-1, 1, 1)
    return torch.where(has_data, scaled, mean)


def read_floats(path: str | Path, bands: Bands) -> Tensor:
    """A file as an image for an encoder of bands, float (c, H, W)."""
    stored = read_stored(path, bands.channels)
    found = stored.shape[0]
    if found != bands.channels:
        raise UserError(
            f"{path} has {named(found)}, and the encoder takes images of {bands.channels}."
        )
    own_range = range_of(stored.values.dtype)
    tells_other = own_range not in (FLOATS, bands.value_range) and bands.value_range != FLOATS
    if tells_other and not bands.clip:
        raise UserError(
            f"{path} has values of {_type(stored.values.dtype)}, and the encoder takes values from "
            f"{bands.value_range[0]:g} to {bands.value_range[1]:g}."
        )
    return to_floats(stored, bands)


def named(count: int) -> str:
    """A number of channels in a sentence."""
    return f"{count} channel" if count == 1 else f"{count} channels"


def crop(stored: Stored, view: dk.View, size: int, bands: Bands) -> Tensor:
    """One view of an image, float (c, size, size); its box is of whole pixels."""
    left, top, right, bottom = [int(x) for x in view.box.tolist()]
    inside = stored._replace(values=stored.values[:, top:bottom, left:right])
    return crop_floats(to_floats(inside, bands), view.flip, size)


def more_than_picture(path: Path) -> int:
    """The number of channels of a file that `harness.read_image` cannot read; else 0."""
    suffix = path.suffix.lower()
    if suffix not in (*ARRAYS, *TIFF):
        return 0
    channels = read_stored(path).shape[0]
    return channels if suffix in ARRAYS or channels not in (1, 3, 4) else 0


def in_unit(images: Tensor) -> Tensor:
    """Pictures of 8 bits in [0, 1]; images of bands as they are."""
    # Not `images / 255`, which makes the floats twice.
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def to_pictures(images: Tensor) -> Tensor:
    """Images (..., c, h, w) as RGB pictures to look at, in [0, 1], stretched over all of them.

    The first three channels are the colors; of fewer, the first one is gray.
    """
    colors = [0, 1, 2] if images.shape[-3] >= 3 else [0, 0, 0]
    channels_first = images.float().movedim(-3, 0)[colors]
    values = channels_first.flatten(1)
    step = max(1, values.shape[1] // 2**20)  # `quantile` takes no more
    low, high = values[:, ::step].quantile(torch.tensor([0.01, 0.99]).to(values), dim=1)
    column = (3, *[1] * (images.ndim - 1))
    spread = (high - low).clamp(min=1e-12)
    pictures = (channels_first - low.view(column)) / spread.view(column)
    return pictures.clamp(0, 1).movedim(0, -3)


# ---- folders -------------------------------------------------------------------------------------
class BandImages(harness.FolderImages):
    """The images below a folder as `Stored`: all with the channels, and the type, of the first.

    Attributes:
        bands: How the values become those of images.
    """

    bands: Bands

    def __init__(self, folder: Path, names: Sequence[str], first: Path, hint: int | None):
        super().__init__(folder, names)
        self.first = first
        stored = read_stored(first, hint)
        self.channels = stored.shape[0]
        self.dtype: torch.dtype | None = stored.values.dtype  # None: any

    def read(self, path: Path) -> Stored:
        stored = read_stored(path, self.channels)
        found = stored.shape[0]
        harness.check(
            found == self.channels,
            f"{self.first} has {named(self.channels)}, and {path} has {found}: give images of "
            "one kind, or a .txt list of them.",
        )
        own = stored.values.dtype
        harness.check(
            self.dtype in (None, own),
            f"{self.first} has values of {_type(self.dtype)}, and {path} of {_type(own)}: give the "
            "range of both with --value-range.",
        )
        return stored


def _type(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def open_files(files: Sequence[str], value_range: tuple[float, float] | None) -> BandImages:
    """Image files as bands, by their absolute paths."""
    first = Path(files[0])
    try:
        source = BandImages(first.parent, files, first, None)
    except Exception as error:  # broken bytes raise nearly anything
        raise UserError(f"{first} cannot be used ({harness.one_line(error)}).") from error
    source.bands = Bands(source.channels, range_of(source.dtype), False, (), ())
    if value_range is not None:
        source.bands = source.bands._replace(value_range=value_range, clip=True)
        source.dtype = None
    return source


def open_folder(
    folder: Path,
    channels: int | str,
    value_range: tuple[float, float] | None,
    known: Bands | None,
    patience: harness.Patience,
) -> harness.FolderImages:
    """The images below a folder, or in a .txt list: pictures, or bands.

    Args:
        folder: Of the images.
        channels: --channels: rgb reads pictures, a number bands; auto reads bands where the first
            image is more than a picture, or where the weights are for bands.
        value_range: --value-range.
        known: What the weights to start from tell of their images.
        patience: How long to wait for a listing.
    """
    if channels == "rgb":
        return harness.FolderImages(folder, value_range=value_range, patience=patience)
    listed = harness.FolderImages(folder, patience=patience, extensions=EXTENSIONS)
    names = [os.fsdecode(name) for name in listed.names]
    hint = channels if isinstance(channels, int) else known.channels if known else None

    unreadable = ""
    for name in names:
        path = listed.folder / name
        try:
            if channels == "auto" and known is None and is_picture(path):
                pictures = [x for x in names if not x.lower().endswith(ARRAYS)]
                return harness.FolderImages(folder, pictures, value_range=value_range)
            source = BandImages(folder, names, path, hint)
            break
        except Exception as error:  # broken bytes raise nearly anything
            unreadable = unreadable or f"{path}: {harness.one_line(error)}"
    else:
        raise UserError(f"No image below {listed.folder} is readable, such as {unreadable}.")

    harness.check(
        channels in ("auto", source.channels),
        f"--channels is {channels}: {source.first} has {named(source.channels)}.",
    )
    source.bands = Bands(source.channels, range_of(source.dtype), False, (), ())
    if known is not None and known.channels == source.channels:
        source.bands = known
        source.dtype = None
    if value_range is not None:
        source.bands = source.bands._replace(value_range=value_range, clip=True)
        source.dtype = None
    return source


def complete(source: BandImages, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Give the bands of a source their mean and standard deviation: --mean and --std, or measured.

    What the weights to start from have told stays, if the options do not say otherwise.
    """
    bands = source.bands
    for option, values in (("--mean", mean), ("--std", std)):
        harness.check(
            values is None or len(values) == bands.channels,
            f"{option} is {harness.as_typed(tuple(values or ()))}: give {bands.channels} numbers, "
            "one for each channel of the images.",
        )
    found = (bands.mean, bands.std)
    if not bands.mean and (mean is None or std is None):
        found = measure(source)
    source.bands = bands._replace(mean=tuple(mean or found[0]), std=tuple(std or found[1]))


def measure(source: BandImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, on up to 256 images of a source.

    They are randomly selected, the same in all processes. A channel that is constant gets 1.
    """
    chosen = torch.randperm(len(source), generator=harness.generator(0))[:SAMPLED]
    sums = torch.zeros(3, source.channels, dtype=torch.float64)  # number, values, squares
    for index in chosen.sort().values.tolist():
        stored, _ = source[index]
        steps = [max(1, side // SAMPLED_SIDE) for side in stored.shape[1:]]
        small = stored._replace(values=stored.values[:, :: steps[0], :: steps[1]])
        bands = source.bands
        scaled, has_data = scale_values(small, bands.value_range, clip=bands.clip)
        values = torch.where(has_data, scaled, 0).double().flatten(1)
        sums += torch.stack(
            [has_data.flatten(1).sum(1).double(), values.sum(1), (values**2).sum(1)]
        )
        if not has_data.all():
            path = source.folder / os.fsdecode(source.names[index])
            harness.say_once(
                f"{path} has pixels without data (NaN, infinite, or marked so): they get the mean "
                "of their channel."
            )
    count, total, squares = sums
    harness.check(
        bool((count > 0).all()),
        f"The images below {source.folder} have a channel without any finite value.",
    )
    mean = total / count
    variance = (squares / count - mean**2).clamp(min=0)
    is_constant = variance <= 1e-12 * mean**2
    std = torch.where(is_constant, 1.0, variance.sqrt())
    return tuple(mean.tolist()), tuple(std.tolist())
