"""Numerics that every module shares: unit vectors, masked means, full precision, safe division.

The helpers that `__all__` leaves out are for the modules of densekit.
"""

from collections.abc import Sequence

import torch
from densekit.distributed import Group, all_sum
from densekit.typing import Bool, Float, Tensor, typed

__all__ = ["l2_normalize", "masked_mean", "widen"]


@typed
def widen(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Convert half precision to float32, in which sums and exponentials do not overflow.

    Args:
        x: A tensor of any floating dtype.

    Returns:
        The tensor itself in float32 and float64; a copy in float32 in bfloat16 and float16.

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
        x: Vectors. One no longer than 1e-19 (1e-154 in float64, 6e-5 in float16, whose slopes would
            overflow) counts as zero, and so does one beyond 1e19.

    Returns:
        Vectors of length one, in at least float32.

    Examples:
        >>> l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])

    References:
        DenseSiam, Eq 2.
    """
    smallest = torch.finfo(x.dtype).tiny  # slopes stay below its inverse
    x = widened(x)
    floor = max(smallest, torch.finfo(x.dtype).tiny ** 0.5)  # below the root squares vanish
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > floor, norm, torch.inf)


@typed
def masked_mean(
    values: Float[Tensor, "*batch"],
    valid: Bool[Tensor, "*valid"] | None = None,
    *,
    group: Group = None,
) -> Float[Tensor, ""]:
    """Mean of the valid entries; zero, with a graph and zero gradients, when there are none.

    Under DistributedDataParallel every process then still takes part in the backward pass.

    Args:
        values: Any values; those that are not valid may be NaN.
        valid: Entries to use, of the values' shape or broadcast to it; all when left out.
        group: Processes that share the mean: every valid entry of any of them counts once, and the
            averaged gradients are those of one process that had them all. None is this process
            alone.

    Returns:
        A scalar, in at least float32.

    Examples:
        >>> masked_mean(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    values, valid = widened(values), fit_valid("numerics.masked_mean", valid, values.shape)
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    total = torch.stack([torch.where(valid, values, 0.0).sum(), valid.sum().to(values.dtype)])
    total = all_sum(total, group)  # both in one message
    return total[0] / total[1].clamp(min=1)


def widened(x: Tensor) -> Tensor:
    """`widen` without the check, which takes ten times as long as the conversion."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; zero, with zero gradients, where the denominator is zero.

    The numerator is finite there, such as the sum of nothing over the count of nothing.
    """
    return numerator / torch.where(denominator == 0, torch.inf, denominator)


def full_precision(x: Tensor) -> torch.autocast:
    """A block in which autocast rounds nothing to half precision, on the device of the tensor."""
    return torch.autocast(x.device.type, enabled=False)


def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of tables `(*batch, n, d)` by their indices `(*batch, k)`, as `(*batch, k, d)`."""
    return table.gather(-2, rows[..., None].expand(*rows.shape, table.shape[-1]))


def sample_uniform(
    shape: Sequence[int], like: Tensor, *, generator: torch.Generator | None
) -> Tensor:
    """Uniform numbers in [0, 1), on the device of `like`, in its dtype but at least float32.

    So the same numbers are drawn in half precision.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.rand(tuple(shape), generator=generator, dtype=dtype, device=like.device)


def interpolation_weights(position: Tensor, cells: int) -> Tensor:
    """Linear interpolation along a line of `cells` cells: the weight of each, for each position.

    Positions run from 0 to 1 across the line. Nearer the end than half a cell, and outside, the
    outermost cell is repeated; gradients are one-sided.
    """
    center = (position * cells - 0.5).clamp(0, cells - 1)[..., None]
    left = center.detach().floor().clamp(max=max(cells - 2, 0))
    index = torch.arange(cells, dtype=position.dtype, device=position.device)
    right = torch.where(index == left + 1, center - left, 0.0)
    return torch.where(index == left, 1 - (center - left), right)


def broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a tensor of this shape expands to the target."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(x in (1, y) for x, y in pairs)


def fit_valid(function: str, valid: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """A mask in the shape of what it masks, or one sentence on why it cannot be."""
    if valid is None:
        return None
    if not broadcasts(valid.shape, shape):
        raise TypeError(
            f"densekit.{function}: argument 'valid' should broadcast to batch={tuple(shape)}, but "
            f"a tensor of shape {tuple(valid.shape)} came."
        )
    return valid.expand(shape)
