"""What other libraries do with coordinates: their key points on densekit's golden vectors.

    pip install torchvision kornia albumentations lightly
    python benchmarks/conformance.py --rows docs/conformance.jsonl    # replaces their rows

Without `--rows` the rows are only printed; a library that is not installed is left out.

Three questions to each library, all with the functions that it offers itself:

* `vectors`: do its key points pass the golden vectors of `densekit.testing`? They go through a
  crop, a resize to 24 x 32 pixels and the flips of each case. `check_view_geometry(as_map(...))`
  asks the same, and says what it is.
* `pixels`: do its key points stay on the pixels that they were on, through one operation alone? The
  colors of the image are coordinates, so that the pixels below a point say where it came from.
* `adapter`: does the view that `densekit.adapters` reads from its records pass
  `densekit.testing.check_photometry`?

A library may count pixels by their edges (the center of the first one is at 0.5) or by their
centers (it is at 0). Few say which, so both are tried, in all steps of a case alike.
"""

import argparse
import functools
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path

import torch
import densekit as dk
from densekit.testing import check_photometry, view_geometry_cases

SIZE = (24, 32)  # of the views
CONVENTIONS = {"edges": 0.0, "centers": 0.5}  # what is subtracted from a position by edges
IMAGE = (16, 20)  # of the image of coordinates
ONE_PIXEL = ("view of one pixel", "image of one pixel")  # whose errors are shares of one pixel
OPERATIONS = ("crop", "flip", "vertical flip", "resize", "rotate by 90", "rotate by 30")


class NotOfferedError(Exception):
    """The library has no such operation, or not with these numbers."""


# ==== the libraries ===============================================================================
# Each function takes an image (c, h, w), points (n, 2) and what is done to both, and returns both.
# A box is None or four numbers, a size None or (h, w), an angle 0 or degrees.
def whole(box):
    """The sides of a box, which most libraries only crop as whole pixels."""
    if any(side != int(side) for side in box):
        raise NotOfferedError("between pixels")
    return [int(side) for side in box]


def torchvision(image, points, box=None, size=None, flips=(False, False), angle=0):
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as F

    # Nothing is clamped: the default may move a point that is outside of the view.
    options = {"canvas_size": tuple(image.shape[-2:]), "clamping_mode": None}
    try:
        key_points = tv_tensors.KeyPoints(points, **options)
    except TypeError:  # versions that do not clamp
        key_points = tv_tensors.KeyPoints(points, canvas_size=options["canvas_size"])

    def both(function, *arguments, **options):
        return function(image, *arguments, **options), function(key_points, *arguments)

    if box is not None:
        x1, y1, x2, y2 = whole(box)
        image, key_points = both(F.crop, y1, x1, y2 - y1, x2 - x1)
    if size is not None:
        image, key_points = both(F.resize, list(size), antialias=True)
    if flips[0]:
        image, key_points = both(F.horizontal_flip)
    if flips[1]:
        image, key_points = both(F.vertical_flip)
    if angle:
        image, key_points = both(F.rotate, angle, interpolation=F.InterpolationMode.BILINEAR)
    return image, key_points.as_subclass(torch.Tensor)


def kornia(image, points, box=None, size=None, flips=(False, False), angle=0, **options):
    from kornia import augmentation as K

    height, width = image.shape[-2:]
    steps = []
    if box is not None or size is not None:
        x1, y1, x2, y2 = box or (0, 0, width, height)
        size = size or (int(y2 - y1), int(x2 - x1))
        if options["cropping_mode"] == "slice":
            x1, y1, x2, y2 = whole((x1, y1, x2, y2))
            if min(x1, y1) < 0:
                raise NotOfferedError("beyond the image")
        steps.append(K.RandomResizedCrop(tuple(size), **options))
    steps += [K.RandomHorizontalFlip(p=1.0)] * flips[0]
    steps += [K.RandomVerticalFlip(p=1.0)] * flips[1]
    if angle:
        steps.append(K.RandomRotation((angle, angle), p=1.0))
    pipeline = K.AugmentationSequential(*steps, data_keys=["input", "keypoints"])
    params = pipeline.forward_parameters(torch.Size((1, *image.shape)))
    if box is not None or size is not None:
        # As its own generator writes a crop: the centers of the pixels at the four corners.
        right, bottom = x2 - 1, y2 - 1
        corners = [[x1, y1], [right, y1], [right, bottom], [x1, bottom]]
        params[0].data["src"] = torch.tensor([corners], dtype=image.dtype)
        params[0].data["dst"] = params[0].data["dst"].to(image.dtype)
    crop, moved = pipeline(image[None], points[None], params=params)
    return crop[0], moved[0].reshape(-1, 2)


def albumentations(image, points, box=None, size=None, flips=(False, False), angle=0):
    import albumentations as A

    steps = []
    if box is not None:
        x1, y1, x2, y2 = whole(box)
        if min(x1, y1) < 0 or x2 > image.shape[-1] or y2 > image.shape[-2]:
            raise NotOfferedError("beyond the image")
        steps.append(A.Crop(x1, y1, x2, y2))
    if size is not None:
        steps.append(A.Resize(*size))
    steps += [A.HorizontalFlip(p=1.0)] * flips[0]
    steps += [A.VerticalFlip(p=1.0)] * flips[1]
    if angle:
        steps.append(A.Rotate((angle, angle), p=1.0))
    key_points = A.KeypointParams("xy", remove_invisible=False)
    pipeline = A.Compose(steps, keypoint_params=key_points)
    pixels = image.movedim(0, -1).float().contiguous().numpy()
    found = pipeline(image=pixels, keypoints=points.double().numpy())
    moved = torch.as_tensor(found["keypoints"]).reshape(-1, 2)
    return torch.from_numpy(found["image"].copy()).movedim(-1, 0), moved.to(points.dtype)


def lightly(image, points, box=None, size=None, flips=(False, False), angle=0):
    """VICRegL's crop, whose grid says where in the image each cell of the view is."""
    from lightly.transforms import random_crop_and_flip_with_grid as module
    from torchvision.transforms.v2 import functional as F

    if angle:
        raise NotOfferedError("a rotation")
    height, width = image.shape[-2:]
    x1, y1, x2, y2 = box or (0, 0, width, height)
    size = size or (int(y2 - y1), int(x2 - x1))
    location = module.Location(y1, x1, y2 - y1, x2 - x1, height, width, *flips)
    cells = 7
    grid = module.RandomResizedCropAndFlip(grid_size=cells).location_to_NxN_grid(location)

    # The centers of the first and the last cell in the view, and what the grid says of them.
    first, last = grid[0, 0].to(points), grid[-1, -1].to(points)
    share = 0.5 / cells + (points - first) / (last - first) * (1 - 1 / cells)
    if all(side == int(side) for side in (x1, y1, x2, y2)):  # the same calls as its class makes
        image = F.resized_crop(image, *map(int, (y1, x1, y2 - y1, x2 - x1)), list(size))
        image = F.hflip(image) if flips[0] else image
        image = F.vflip(image) if flips[1] else image
    return image, share * share.new_tensor([size[1], size[0]])


RESAMPLE = {"cropping_mode": "resample"}
SLICE = {"cropping_mode": "slice", "align_corners": False}
LIBRARIES = {
    "torchvision": [(torchvision, "`KeyPoints` of v2")],
    "kornia": [
        (functools.partial(kornia, **RESAMPLE), "`keypoints` of `AugmentationSequential`"),
        (functools.partial(kornia, **SLICE), '`cropping_mode="slice"`, `align_corners=False`'),
    ],
    "albumentations": [(albumentations, "`keypoint_params` of `Compose`")],
    "lightly": [(lightly, "the grid of `RandomResizedCropAndFlip`")],
}


# ==== the questions ===============================================================================
def as_map(apply, shift):
    """A library as the function that `check_view_geometry` takes."""

    def mapped(view, points):
        if len(points) == 0:
            return points  # not every library takes an empty list
        x2, y2 = view.box[2:].ceil().int().tolist()
        image = torch.zeros(3, y2, x2, dtype=torch.float64)
        flips = bool(view.flip), bool(view.vertical_flip)
        _, moved = apply(image, points - shift, view.box.tolist(), SIZE, flips)
        return (moved + shift) / moved.new_tensor([SIZE[1], SIZE[0]])

    return mapped


def vectors(apply, shift):
    """How many golden vectors pass, which do not, and the largest error in pixels of the view."""
    cases = [case for case in view_geometry_cases() if len(case.in_image)]
    failed = []
    absent = []
    errors = []
    for case in cases:
        try:
            got = as_map(apply, shift)(case.view, case.in_image)
        except NotOfferedError as reason:
            absent.append(f"{case.name} ({reason})")
            continue
        error = ((got - case.in_view) * got.new_tensor([SIZE[1], SIZE[0]])).abs()
        if case.name not in ONE_PIXEL:
            errors += error.nan_to_num(torch.inf).flatten().tolist()
        if not (error <= 1e-4).all():
            failed.append(case.name)
    offered = len(cases) - len(absent)
    return {
        "offered": offered,
        "passed": offered - len(failed),
        "largest": round(max(errors), 3),
        "failed": failed,
        "not_offered": absent,
    }


def coordinates(height, width):
    """An image (3, h, w) of the coordinates of its pixels by edges, in shares of the image."""
    places = dk.coordinate_map(dk.full_view((height, width)), (height, width))
    shares = places / torch.tensor([width, height])
    return torch.cat([shares, torch.zeros_like(shares[..., :1])], -1).movedim(-1, 0)


def operation(name):
    """The arguments of one operation on the image of coordinates."""
    return {
        "crop": {"box": [3, 2, 17, 14]},
        "flip": {"flips": (True, False)},
        "vertical flip": {"flips": (False, True)},
        "resize": {"size": (40, 60)},
        "rotate by 90": {"angle": 90},
        "rotate by 30": {"angle": 30},
    }[name]


def pixels(apply, shift, name):
    """How far the key points are from the pixels that they were on, in pixels of the image.

    None where the library has no such operation.
    """
    height, width = IMAGE if "rotate" not in name else (IMAGE[0], IMAGE[0])
    image = coordinates(height, width)
    center = torch.tensor([width / 2, height / 2])
    rows = torch.tensor([-3.0, -1.0, 2.0, 3.5])
    points = torch.cartesian_prod(rows, rows) + center  # none near an edge
    try:
        crop, moved = apply(image, points - shift, **operation(name))
    except NotOfferedError:
        return None
    places = moved.float() + shift
    extent = places.new_tensor([crop.shape[-1], crop.shape[-2]])
    grid = (2 * places / extent - 1)[None, None]
    shown = torch.nn.functional.grid_sample(crop[None].float(), grid, align_corners=False)
    shown = shown[0, :2, 0].T * torch.tensor([width, height])
    return round((shown - points).abs().max().item(), 3)


def adapter(name):
    """Whether a pipeline, read by densekit's adapter, shows what its views say; else why not."""
    try:
        check_photometry(PIPELINES[name])
    except (AssertionError, ValueError) as error:
        return {"passed": False, "message": str(error)}
    return {"passed": True, "message": ""}


def with_torchvision(image):
    from torchvision.transforms import v2

    params = v2.RandomResizedCrop(32, scale=(0.2, 0.9)).make_params([image])
    flip = bool(torch.rand(()) < 0.5)
    crop = v2.functional.resized_crop(image, **params, size=[32, 32], antialias=True)
    crop = v2.functional.horizontal_flip(crop) if flip else crop
    return [(crop, dk.view_from_torchvision(params, flip=flip))]


def with_kornia(image):
    from kornia import augmentation as K

    crop = K.RandomResizedCrop((64, 64), scale=(0.2, 0.9), cropping_mode="resample")
    pipeline = K.AugmentationSequential(crop, K.RandomHorizontalFlip(), data_keys=["input"])
    crops = pipeline(image[None])
    return [(crops[0], dk.index_views(dk.view_from_kornia(pipeline.transform_matrix, 64).view, 0))]


def with_albumentations(image):
    import albumentations as A

    crop = A.RandomResizedCrop((64, 64), scale=(0.2, 0.9))
    seed = int(torch.randint(2**31, ()))
    pipeline = A.Compose([crop, A.HorizontalFlip()], save_applied_params=True, seed=seed)
    found = pipeline(image=image.movedim(0, -1).contiguous().numpy())
    crop = torch.from_numpy(found["image"].copy()).movedim(-1, 0)
    return [(crop, dk.view_from_albumentations(found["applied_transforms"]))]


PIPELINES = {
    "torchvision": with_torchvision,
    "kornia": with_kornia,
    "albumentations": with_albumentations,
}


# ==== the report ==================================================================================
def identity(name):
    """The name of the distribution that a module is imported from, and its version."""
    file = Path(importlib.import_module(name).__file__)
    for candidate in importlib.metadata.packages_distributions()[name]:
        for found in importlib.metadata.distributions(name=candidate):
            if Path(found.locate_file(f"{name}/__init__.py")) == file:
                return found.metadata["Name"], found.version
    raise RuntimeError(f"No distribution says that it has {file}.")


def rows_of(name):
    """All rows of one library."""
    library, version = identity(name)
    rows = []
    for apply, what in LIBRARIES[name]:
        start = {"library": library, "version": version, "what": what}
        for convention, shift in CONVENTIONS.items():
            asked = {"check": "vectors", "convention": convention}
            rows.append({**start, **asked, **vectors(apply, shift)})
        for convention, shift in CONVENTIONS.items():
            errors = {each: pixels(apply, shift, each) for each in OPERATIONS}
            rows.append({**start, "check": "pixels", "convention": convention, "errors": errors})
    if name in PIPELINES:
        rows.append({"library": library, "version": version, "check": "adapter", **adapter(name)})
    return rows


def main(rows_file=None, names=tuple(LIBRARIES)):
    rows = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"{name} is left out: {error}.", file=sys.stderr)
            continue
        rows += rows_of(name)
    lines = [json.dumps(row) for row in rows]
    print(*lines, sep="\n")
    if rows_file is not None:
        new = {row["library"] for row in rows}
        old = rows_file.read_text().splitlines() if rows_file.exists() else []
        kept = [line for line in old if json.loads(line)["library"] not in new]
        rows_file.write_text("\n".join([*kept, *lines]) + "\n")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, help="file whose rows of these libraries are replaced")
    main(parser.parse_args().rows)
