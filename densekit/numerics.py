"""Numerics that several modules share: unit vectors, masked means, wider dtypes, rows of maps.

The functions that `__all__` does not list are helpers for the modules of densekit.
"""

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from densekit.distributed import Group, all_sum
from densekit.messages import about_map, looks_like_map
from densekit.typing import Bool, Float, Scalar, Shaped, Size, Tensor, typed

__all__ = ["l2_normalize", "map_to_rows", "masked_mean", "rows_to_map", "widen"]

BLOCK = 2**22  # numbers: 16 MiB in float32. Smaller ones wait for the threads too often.

_dispatch = operator.attrgetter("__torch_dispatch__")


@typed
def widen(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Convert half precision to float32, in which sums and exponentials do not overflow.

    Args:
        x: A tensor of any floating dtype.

    Returns:
        The tensor itself if it is float32 or float64; a copy in float32 if it is bfloat16 or
        float16.

    Examples:
        >>> widen(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return widened(x)


@typed
def l2_normalize(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Scale the last axis to length one; a zero vector stays zero, with zero gradient.

    `torch.nn.functional.normalize` has a gradient of 1e12 at zero vectors.

    Args:
        x: Vectors. A vector counts as zero if it is not longer than 1e-19 (1e-154 in float64; 6e-5
            in float16, in which the gradient would overflow), or if it is longer than 1e19.

    Returns:
        Vectors of length one, in at least float32. A vector with an infinite or NaN entry contains
        a NaN afterwards.

    Examples:
        >>> l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])

    References:
        DenseSiam, Eq 2.
    """
    smallest = torch.finfo(x.dtype).tiny  # gradients stay below its inverse
    x = widened(x)
    floor = max(smallest, torch.finfo(x.dtype).tiny ** 0.5)  # squares of smaller numbers underflow
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > floor, norm, torch.inf)


def has_spread(centered: Tensor, rows: Tensor) -> Tensor:
    """Return which sets (..., n, d) spread by more than the rounding of their rows.

    `centered` are the rows about their mean. Rows that are equal but for what an interpolation has
    rounded would become noise when their spread is divided by its own size.
    """
    if 0 in rows.shape[-2:]:
        return rows.new_ones(rows.shape[:-2], dtype=torch.bool)
    rounding = 8 * torch.finfo(widened(rows[..., :0]).dtype).eps
    spread, size = [x.detach().abs().amax((-2, -1)) for x in (centered, rows)]
    return ~(spread <= rounding * size)  # true of NaN, which is not to vanish


@typed
def masked_mean(
    values: Float[Tensor, "*batch"],
    valid: Bool[Tensor, "*valid"] | None = None,
    *,
    group: Group = None,
) -> Float[Tensor, ""]:
    """Compute the mean of the valid entries; without any it is zero, with zero gradients.

    The zero is still connected to the graph, so under DistributedDataParallel every process runs
    its backward pass. An entry that is not valid changes nothing, even if it is NaN.

    Args:
        values: Any values; entries that are not valid may be NaN.
        valid: Entries to use, of the values' shape; an axis may have size 1. By default all.
        group: Processes that share the mean. Every valid entry of every process counts once, and
            the averaged gradients are those of one process that has all entries. None means this
            process alone.

    Returns:
        A scalar, in at least float32.

    Raises:
        TypeError: `valid` has another shape, such as an axis less: use `valid[:, None]`.

    Examples:
        >>> masked_mean(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    values = widened(values)
    valid = fit_valid("numerics.masked_mean", valid, values.shape)
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    total = torch.stack([torch.where(valid, values, 0.0).sum(), valid.sum().to(values.dtype)])
    total = all_sum(total, group)  # both in one message
    return total[0] / total[1].clamp(min=1)


@typed
def map_to_rows(maps: Shaped[Tensor, "*batch d h w"]) -> Shaped[Tensor, "*batch n d"]:
    """Turn maps into one row for each cell: channels first becomes channels last.

    Losses, pooling, matching and clustering take rows `(*batch, n, d)`; networks return maps
    `(*batch, d, h, w)`. A function of rows that is given a map takes the width for the channels.

    Args:
        maps: Maps of any dtype.

    Returns:
        `n = h w` rows, in the order of the cells: row by row. It is a view of the maps where
        their memory allows it.

    Examples:
        >>> map_to_rows(torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]]]))
        tensor([[1, 5],
                [2, 6],
                [3, 7],
                [4, 8]])
    """
    return maps.flatten(-2).mT


@typed
def rows_to_map(
    rows: Shaped[Tensor, "*batch n d"], size: int | Size
) -> Shaped[Tensor, "*batch d h w"]:
    """Turn one row for each cell into maps: the inverse of `map_to_rows`.

    Args:
        rows: Rows of any dtype, in the order of the cells: row by row.
        size: Size `(h, w)` of the maps, with `n = h w`; a number K means K x K.

    Returns:
        Maps, channels first. They are a view of the rows where their memory allows it.

    Raises:
        ValueError: The size has another number of cells than there are rows, or is negative.

    Examples:
        >>> rows_to_map(torch.arange(6).view(6, 1), (2, 3))
        tensor([[[0, 1, 2],
                 [3, 4, 5]]])
    """
    h, w = (size, size) if isinstance(size, int) else size
    if h < 0 or w < 0 or h * w != rows.shape[-2]:
        raise ValueError(
            f"densekit.numerics.rows_to_map: size is {size}, but there are {rows.shape[-2]} rows; "
            "give the (h, w) of a map that has as many cells."
        )
    return rows.mT.unflatten(-1, (h, w))


def widened(x: Tensor) -> Tensor:
    """Convert as `widen` does, without the type check, which takes ten times as long."""
    return x if x.dtype == torch.float64 else x.float()


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; the quotient is zero, with zero gradients, where the denominator is zero.

    The numerator must be finite there, as in the sum of no entries divided by their number.
    """
    return numerator / denominator.masked_fill(denominator == 0, torch.inf)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any, Literal[False] | None]:
    """Return a block in which autocast does not round to half precision, on the tensor's device.

    Devices that autocast does not know, such as "meta", have nothing to switch off.
    """
    # A compiler up to torch 2.8 cannot trace the question.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def readable(*tensors: Tensor) -> bool:
    """Return whether Python may read the values of these tensors: they are plain, and on the CPU.

    It may not while a graph is traced, which a dispatch mode may do too, inside a transform such as
    vmap, or if they are fake. On other devices it would have to wait.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _len_torch_dispatch_stack():
        return False
    return all(
        x.device.type == "cpu"
        and _dispatch(type(x)) is _dispatch(Tensor)
        and not is_functorch_wrapped_tensor(x)
        and forward_ad.unpack_dual(x).tangent is None
        for x in tensors
    )


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call a function so that its backward pass computes it again, instead of storing its parts.

    Inside a graph, where the compiler decides what to store, and inside a transform such as vmap or
    grad, which does not allow it, it is called as it is.
    """
    if torch.compiler.is_compiling() or any(map(is_functorch_wrapped_tensor, tensors)):
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def row_of(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Return a few Python numbers as a row, in the dtype and on the device of another tensor.

    `like.new_tensor(numbers)` copies them from the CPU, for which the host waits.
    """
    at = {"dtype": like.dtype, "device": like.device}
    return torch.stack([torch.full((), number, **at) for number in numbers])


def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Take rows of tables `(*batch, n, d)` by indices `(*batch, k)`; return `(*batch, k, d)`."""
    rows = rows.long()  # `gather` does not take every integer dtype
    return table.gather(-2, rows[..., None].expand(*rows.shape, table.shape[-1]))


def block_rows(width: int) -> int:
    """Return how many rows of `width` numbers fit in a block of `BLOCK` numbers; at least one.

    A function that works in blocks needs memory for one of them, however many rows there are.
    """
    return max(1, BLOCK // max(1, width))


def sample_uniform(
    shape: Sequence[int],
    like: Tensor,
    *,
    generator: torch.Generator | None,
    noise: Tensor | None = None,
) -> Tensor:
    """Sample uniform numbers in [0, 1), on the device of `like`, in its dtype but at least float32.

    Half precision therefore gets the same numbers as float32. With `noise`, which has this shape,
    its numbers are the result.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if noise is not None:
        # A number just below 1 must not be rounded to 1.
        return noise.to(dtype).clamp(max=1 - torch.finfo(dtype).eps / 2)
    return torch.rand(tuple(shape), generator=generator, dtype=dtype, device=like.device)


def interpolation_weights(position: Tensor, cells: int) -> Tensor:
    """Compute linear interpolation weights of `cells` cells on a line, for each position.

    Positions run from 0 to 1 across the line. Between an end and the center of the outermost cell,
    and outside the line, the value of the outermost cell is repeated; gradients are one-sided.
    """
    center = (position * cells - 0.5).clamp(0, cells - 1)[..., None]
    left = center.detach().floor().clamp(max=max(cells - 2, 0))
    index = torch.arange(cells, dtype=position.dtype, device=position.device)
    right = torch.where(index == left + 1, center - left, 0.0)
    return torch.where(index == left, 1 - (center - left), right)


def broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Return whether a tensor of this shape can be expanded to the target shape."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(x in (1, y) for x, y in pairs)


def check(where: str, name: str, value: Any, fits: bool, wanted: str) -> None:
    """Raise an error that names one argument, its value and what to give, unless it fits."""
    if not fits:
        raise ValueError(f"densekit.{where}: {name} is {value}; give {wanted}.")


def check_temperature(where: str, value: Scalar, name: str = "temperature") -> None:
    """Raise an error for a temperature that is not above 0; the value of a tensor is not read."""
    check(where, name, value, isinstance(value, Tensor) or value > 0, "one above 0")


def in_range(number: Scalar, dtype: torch.dtype) -> Scalar:
    """Return a number above 0, or the end of the dtype's range that is next to it.

    So a divisor becomes neither 0 nor infinity, where 0 / 0 and inf / inf would be NaN. A tensor is
    returned as it is.
    """
    if isinstance(number, Tensor):
        return number
    finfo = torch.finfo(dtype)
    return min(max(number, finfo.tiny), finfo.max)


def check_cells(where: str, name: str, size: Sequence[int]) -> None:
    """Raise an error for a map without a cell."""
    h, w = size
    if h < 1 or w < 1:
        raise ValueError(f"densekit.{where}: {name} is {h} x {w}; give a map with cells.")


def check_size(where: str, size: int | Size, name: str = "size") -> None:
    """Raise an error for a size that is not positive."""
    h, w = (size, size) if isinstance(size, int) else size
    check(where, name, size, min(h, w) >= 1, "a positive (h, w)")


def refuse_maps(function: str, argument: str, x: Tensor) -> None:
    """Raise an error for what looks like maps (..., d, h, w), of which w would be the channels."""
    if torch.compiler.is_compiling():  # as all checks of shapes
        return
    if looks_like_map(x):
        raise TypeError(f"densekit.{function}: {about_map(argument, x)}")


def refuse_channels_last(function: str, argument: str, images: Tensor) -> None:
    """Raise an error for images whose channels are the last axis, as other libraries have them.

    A last axis of 1, 3 or 4 would else be taken for the width.
    """
    if torch.compiler.is_compiling():  # as all checks of shapes
        return
    if images.ndim > 2 and images.shape[-1] in (1, 3, 4) and images.shape[-3] > 4:
        raise TypeError(
            f"densekit.{function}: argument '{argument}' has shape {tuple(images.shape)}, whose "
            "channels seem to come last; give images (*batch, c, h, w): `images.movedim(-1, -3)`."
        )


def fit_valid(function: str, valid: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Expand `valid` to the shape of the entries that it masks, or raise an error.

    An axis may have size 1, but none may be missing: a mask of images would be taken for one of
    points wherever there are as many of both.
    """
    if valid is None:
        return None
    if len(valid.shape) != len(shape) or not broadcasts(valid.shape, shape):
        raise TypeError(
            f"densekit.{function}: argument 'valid' should be of shape batch={tuple(shape)}, in "
            "which axes may have size 1, but a tensor of shape "
            f"{tuple(valid.shape)} was given{_missing_axes(valid.shape, shape)}."
        )
    return valid.expand(shape)


def _missing_axes(given: Sequence[int], wanted: Sequence[int]) -> str:
    """Say how to index a mask, so that it has all axes of what it masks; "" if it cannot have."""
    missing = ["None"] * (len(wanted) - len(given))
    kept = [":"] * len(given)
    if not missing:
        return ""
    if broadcasts(given, wanted[: len(given)]):  # masks of images are more frequent than of points
        return f"; use `valid[{', '.join(kept + missing)}]`"
    return f"; use `valid[{', '.join(missing + kept)}]`" if broadcasts(given, wanted) else ""
