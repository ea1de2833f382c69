"""Views from and to what other libraries record of a crop: so that any of them may do the cropping.

torchvision v2, kornia, albumentations and lightly-train crop, resize and mirror in their own ways
and write down in their own units what they did. Here it becomes a `View`, which everything else in
densekit takes. None of these libraries is imported, but albumentations for its own records.
"""

import importlib
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from densekit.numerics import check_size, widened
from densekit.typing import Size, typed
from densekit.views import (
    MatrixViews,
    View,
    boxes_view_to_image,
    full_view,
    view_from_matrix,
    view_from_xywh,
    view_to_matrix,
)

__all__ = [
    "view_from_albumentations",
    "view_from_kornia",
    "view_from_lightly_train",
    "view_from_torchvision",
    "view_to_albumentations",
    "view_to_kornia",
    "view_to_lightly_train",
    "view_to_torchvision",
]

_ALBUMENTATIONS_KEEP_PLACES = {  # in shares of the image; they are no ImageOnlyTransform
    "LongestMaxSize", "RandomScale", "Resize", "SmallestMaxSize",
    "CoarseDropout", "GridDropout", "NoOp", "PixelDropout", "ToTensor3D", "ToTensorV2", "XYMasking",
}  # fmt: skip


# ---- torchvision -----------------------------------------------------------------------------


@typed
def view_from_torchvision(
    params: Mapping[str, Any], *, flip: bool = False, vertical_flip: bool = False
) -> View:
    """Make the view of one image from the parameters of a crop of torchvision.

    They are what `make_params` of the crops in `torchvision.transforms.v2` returns, and what
    `resized_crop` takes. torchvision's key points are no substitute: they are resized by the edges
    of pixels and mirrored by the centers, so that one of the two is off.

    Args:
        params: The crop: `top`, `left`, `height` and `width` in pixels of the image; with
            `needs_pad` in those of the image with its `padding` (left, top, right, bottom), so that
            the view may reach out of the image. What else is in it is ignored.
        flip: Whether the crop is mirrored left to right.
        vertical_flip: Whether the crop is mirrored top to bottom.

    Returns:
        The view, without leading axes; `stack_views` makes a batch of several.

    Raises:
        ValueError: One of the four numbers is missing, or no whole number.

    Examples:
        >>> view_from_torchvision({"top": 20, "left": 10, "height": 40, "width": 30}).box
        tensor([10., 20., 40., 60.])
    """
    names = ("left", "top", "width", "height")
    missing = [name for name in names if name not in params]
    if missing:
        raise ValueError(
            f"densekit.adapters.view_from_torchvision: params has no {missing[0]!r}; give the top, "
            "left, height and width of a crop, as `make_params` of torchvision returns them."
        )
    wrong = [name for name in names if not isinstance(params[name], Integral)]
    if wrong:
        raise ValueError(
            f"densekit.adapters.view_from_torchvision: params[{wrong[0]!r}] is "
            f"{params[wrong[0]]!r}; give a whole number of pixels."
        )
    left, top, width, height = [int(params[name]) for name in names]
    if params.get("needs_pad"):
        left -= params["padding"][0]
        top -= params["padding"][1]
    crop = torch.tensor([left, top, width, height], dtype=torch.float32, device="cpu")
    flips = [torch.tensor(value, device="cpu") for value in (flip, vertical_flip)]
    return view_from_xywh(crop, *flips)


@typed
def view_to_torchvision(view: View) -> dict[str, int]:
    """Write the view of one image as the crop that `torchvision.transforms.v2` takes.

    `resized_crop(image, **view_to_torchvision(view), size=...)` of torchvision's functional
    transforms crops; mirror the result where `view.flip` or `view.vertical_flip` is True.

    Args:
        view: One view, without leading axes; its box has whole pixels.

    Returns:
        The crop: `top`, `left`, `height` and `width`.

    Raises:
        ValueError: There are several views, or the sides of the box are no whole pixels, which is
            all that torchvision crops.

    Examples:
        >>> view_to_torchvision(View(torch.tensor([10.0, 20.0, 40.0, 60.0]), torch.tensor(False)))
        {'top': 20, 'left': 10, 'height': 40, 'width': 30}
    """
    x1, y1, x2, y2 = _whole_pixels("view_to_torchvision", view)
    return {"top": y1, "left": x1, "height": y2 - y1, "width": x2 - x1}


# ---- kornia ----------------------------------------------------------------------------------


@typed
def view_from_kornia(
    record: Float[Tensor, "*batch 3 3"] | Mapping[str, Any],
    size: int | Size,
    *,
    align_corners: bool = True,
) -> MatrixViews:
    """Read views from what an augmentation of kornia records.

    kornia's crops map the centers of the first and last pixels onto each other, so a crop takes
    half a pixel of the view more on each side than the centers at its corners. Only the crops of
    `cropping_mode="slice"` with `align_corners=False` map the edges of these pixels.

    Args:
        record: The `transform_matrix` (b, 3, 3) of one augmentation or of a whole
            `AugmentationSequential`, flips included, or the `_params` of one crop, whose corners
            `src` and `dst` (b, 4, 2) are read, and `padding_size` and `batch_prob` where it has
            them: an image that the crop was not applied to is shown whole.
        size: Size `(h, w)` of the views in pixels; a number means square views.
        align_corners: Only for `_params`, which do not say it: False where the crop was made by
            `cropping_mode="slice"` and `align_corners=False`.

    Returns:
        The views; `valid` is False where the record holds a rotation, a shear or a perspective.

    Raises:
        ValueError: The parameters are not those of a crop, or no tensors, or the size is not
            positive.

    Examples:
        >>> corners = torch.tensor([[[8.0, 8.0], [39.0, 8.0], [39.0, 23.0], [8.0, 23.0]]])
        >>> crop = {"src": corners, "dst": corners - 8}
        >>> view_from_kornia(crop, (16, 32)).view.box
        tensor([[ 8.,  8., 40., 24.]])
    """
    if isinstance(record, Mapping):
        record = _kornia_matrix(record, 0.0 if align_corners else 0.5)
    return view_from_matrix(record, size, pixel_centers="integer")


@typed
def view_to_kornia(view: View, size: int | Size) -> Float[Tensor, "*batch 3 3"]:
    """Write views as the matrices that kornia warps with.

    `kornia.geometry.warp_perspective(images, view_to_kornia(view, (h, w)), (h, w),
    align_corners=True)` crops, resizes and mirrors; it interpolates without antialiasing, so it is
    no way to make an image smaller. The inverse of `view_from_kornia`.

    Args:
        view: Any views.
        size: Size `(h, w)` of the views in pixels; a number means square views.

    Returns:
        One matrix for each view, in at least float32; it is zero where the view's box is not valid.

    Raises:
        ValueError: The size is not positive.

    Examples:
        >>> view = View(torch.tensor([[8.0, 8.0, 40.0, 24.0]]), torch.tensor([False]))
        >>> view_to_kornia(view, (16, 32))[0, 0]
        tensor([ 1.,  0., -8.])
    """
    return view_to_matrix(view, size, pixel_centers="integer")


# ---- albumentations --------------------------------------------------------------------------


@typed
def view_from_albumentations(applied: Iterable[tuple[str, Mapping[str, Any]]]) -> View:
    """Read the view of one image from the transforms that albumentations says it has applied.

    They are `result["applied_transforms"]` of a `Compose(..., save_applied_params=True)`. Crops,
    resizes and mirrors make the view, in any number and order; what changes only colors is passed
    over.

    Args:
        applied: The transforms in their order: the name of each, and its parameters.

    Returns:
        The view, without leading axes; `stack_views` makes a batch of several.

    Raises:
        ValueError: Nothing was applied, a transform does something else to the positions, such as a
            rotation or padding, or the record has no positions, as that of AlbumentationsX.
        ImportError: A transform is none of these, and albumentations, which says whether it moves
            anything, is not installed.

    Examples:
        >>> crop = ("RandomResizedCrop", {"shape": (48, 64, 3), "crop_coords": (10, 3, 51, 46)})
        >>> view = view_from_albumentations([crop, ("HorizontalFlip", {"shape": (24, 24, 3)})])
        >>> view.box, view.flip
        (tensor([10.,  3., 51., 46.]), tensor(True))
    """
    transforms = list(applied)
    if not transforms:
        raise ValueError(
            "densekit.adapters.view_from_albumentations: no transform was applied, so the size of "
            "the image is not known; use `full_view`."
        )
    if "shape" not in transforms[0][1]:
        _refuse_without_shape(transforms[0][0])
    height, width = transforms[0][1]["shape"][:2]
    view = full_view((height, width), device="cpu")
    for name, params in transforms:
        crop = params.get("crop_coords")
        if crop is not None and "shape" not in params:
            _refuse_without_shape(name)
        if name == "HorizontalFlip":
            view = view._replace(flip=~view.flip)
        elif name == "VerticalFlip":
            view = view._replace(vertical_flip=~view.vertical_flip)
        elif crop is not None and not params.get("pad_params"):
            height, width = params["shape"][:2]  # of what this transform was given
            sides = view.box.new_tensor([width, height, width, height])
            share = view.box.new_tensor(crop) / sides
            view = view._replace(box=boxes_view_to_image(view, share[None])[0])
        elif name not in _ALBUMENTATIONS_KEEP_PLACES and _moves_pixels(name):
            raise ValueError(
                f"densekit.adapters.view_from_albumentations: {name} does more than crop, resize "
                "and mirror; give transforms that a view can hold."
            )
    return view


@typed
def view_to_albumentations(view: View) -> dict[str, int]:
    """Write the view of one image as the arguments of albumentations' `Crop`.

    Mirror the result by `HorizontalFlip` and `VerticalFlip` where `view.flip` and
    `view.vertical_flip` are True.

    Args:
        view: One view, without leading axes; its box has whole pixels.

    Returns:
        The crop: `x_min`, `y_min`, `x_max` and `y_max`.

    Raises:
        ValueError: There are several views, or the sides of the box are no whole pixels.

    Examples:
        >>> view_to_albumentations(View(torch.tensor([10.0, 3.0, 51.0, 46.0]), torch.tensor(True)))
        {'x_min': 10, 'y_min': 3, 'x_max': 51, 'y_max': 46}
    """
    names = ("x_min", "y_min", "x_max", "y_max")
    return dict(zip(names, _whole_pixels("view_to_albumentations", view), strict=True))


# ---- lightly-train ---------------------------------------------------------------------------


@typed
def view_from_lightly_train(geometry: Float[Tensor, "*batch 8"]) -> View:
    """Make views from the eight numbers that lightly-train records of each view.

    They are `x1, y1, x2, y2` of the crop in pixels of the image, the image's width and height, and
    1 where the view is mirrored left to right, and top to bottom.

    Args:
        geometry: The eight numbers of each view.

    Returns:
        The views.

    Examples:
        >>> numbers = torch.tensor([10.0, 20.0, 40.0, 60.0, 640.0, 480.0, 1.0, 0.0])
        >>> view = view_from_lightly_train(numbers)
        >>> view.box, view.flip, view.vertical_flip
        (tensor([10., 20., 40., 60.]), tensor(True), tensor(False))
    """
    flip, vertical_flip = (geometry[..., 6:] > 0.5).unbind(-1)
    return View(geometry[..., :4], flip, vertical_flip)


@typed
def view_to_lightly_train(view: View, size: Size) -> Float[Tensor, "*batch 8"]:
    """Write views as the eight numbers of lightly-train: the inverse of `view_from_lightly_train`.

    Args:
        view: Any views.
        size: Size `(h, w)` of the images in pixels.

    Returns:
        The eight numbers of each view, in at least float32.

    Raises:
        ValueError: The size is not positive.

    Examples:
        >>> view = View(torch.tensor([10.0, 20.0, 40.0, 60.0]), torch.tensor(True))
        >>> view_to_lightly_train(view, (480, 640)).tolist()
        [10.0, 20.0, 40.0, 60.0, 640.0, 480.0, 1.0, 0.0]
    """
    check_size("adapters.view_to_lightly_train", size)
    box = widened(view.box)
    sides = box.new_tensor((size[1], size[0])).expand(*box.shape[:-1], 2)
    flips = torch.stack([view.flip, view.vertical_flip], -1)
    return torch.cat([box, sides, flips.to(box.dtype)], -1)


# ---- helpers ---------------------------------------------------------------------------------


def _whole_pixels(function: str, view: View) -> list[int]:
    """The sides of the box of one view as whole numbers."""
    if view.box.dim() != 1:
        raise ValueError(
            f"densekit.adapters.{function}: view has the leading axes "
            f"{tuple(view.box.shape[:-1])}; give one view at a time, as `unstack_views` makes them."
        )
    sides = view.box.detach().tolist()
    if not all(side.is_integer() for side in sides):
        raise ValueError(
            f"densekit.adapters.{function}: the box {sides} has sides that are no whole pixels; "
            "round it first."
        )
    return [int(side) for side in sides]


def _refuse_without_shape(name: str) -> None:
    raise ValueError(
        f"densekit.adapters.view_from_albumentations: {name} was recorded without the shape of its "
        "image, as AlbumentationsX does, which says no positions; give what albumentations 2.0 "
        "records."
    )


def _kornia_matrix(params: Mapping[str, Any], margin: float) -> Tensor:
    """The matrices of crops, from the centers of the pixels at their corners, and a margin."""
    if "src" not in params or "dst" not in params:
        raise ValueError(
            f"densekit.adapters.view_from_kornia: the parameters {sorted(params)} are not those of "
            "a crop, which has the corners `src` and `dst`; give the `transform_matrix` instead."
        )
    wrong = [name for name in ("src", "dst") if not isinstance(params[name], Tensor)]
    if wrong:
        raise ValueError(
            f"densekit.adapters.view_from_kornia: the parameter {wrong[0]!r} is a "
            f"{type(params[wrong[0]]).__name__}; give tensors (b, 4, 2), as kornia records them."
        )
    src = widened(params["src"])
    dst = widened(params["dst"])
    if "padding_size" in params:  # the corners lie in the padded image
        left, _, top, _ = params["padding_size"].to(src).unbind(-1)
        src = src - torch.stack([left, top], -1)[:, None]
    scale = (dst[:, 2] - dst[:, 0] + 2 * margin) / (src[:, 2] - src[:, 0] + 2 * margin)
    shift = dst[:, 0] - margin - (src[:, 0] - margin) * scale
    first = torch.cat([torch.diag_embed(scale), shift[..., None]], -1)
    last = first.new_tensor([0.0, 0.0, 1.0]).expand(len(first), 1, 3)
    matrix = torch.cat([first, last], -2)
    if "batch_prob" in params:  # images that the crop was not applied to
        is_cropped = params["batch_prob"].to(matrix.device) > 0.5
        whole = torch.eye(3, dtype=matrix.dtype, device=matrix.device)
        matrix = torch.where(is_cropped[:, None, None], matrix, whole)
    return matrix


def _moves_pixels(name: str) -> bool:
    """Whether a transform of albumentations changes more than colors."""
    try:
        albumentations = importlib.import_module("albumentations")
    except ImportError as error:
        raise ImportError(
            f"densekit.adapters.view_from_albumentations: whether {name} moves pixels is known to "
            "albumentations alone, which is not installed."
        ) from error
    transform = getattr(albumentations, name, None)
    return transform is None or not issubclass(transform, albumentations.ImageOnlyTransform)
