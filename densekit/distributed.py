"""Sums and maxima over processes; without a group a tensor is its own sum."""

import torch
import torch.distributed as dist
from densekit.typing import Float, Tensor, typed

__all__ = ["all_max", "all_sum"]

Group = dist.ProcessGroup | None
"""The processes that take part, such as `torch.distributed.group.WORLD`; None is this one alone."""


@typed
def all_sum(x: Float[Tensor, "*shape"], group: Group = None) -> Float[Tensor, "*shape"]:
    """Sum of a tensor over the processes of a group; itself without one.

    Args:
        x: The same shape on every process. No gradient flows through the sum of a group.
        group: The processes; None leaves the tensor as it is.

    Returns:
        The sum, the same on every process.

    Examples:
        >>> all_sum(torch.ones(2))
        tensor([1., 1.])

    References:
        House convention: a process without a group is a group of one.
    """
    return _all_reduce(x, dist.ReduceOp.SUM, group)


@typed
def all_max(x: Float[Tensor, "*shape"], group: Group = None) -> Float[Tensor, "*shape"]:
    """Elementwise maximum of a tensor over the processes of a group; itself without one.

    Args:
        x: The same shape on every process. No gradient flows through the maximum of a group.
        group: The processes; None leaves the tensor as it is.

    Returns:
        The maximum, the same on every process.

    Examples:
        >>> all_max(torch.ones(2))
        tensor([1., 1.])

    References:
        House convention: a process without a group is a group of one.
    """
    return _all_reduce(x, dist.ReduceOp.MAX, group)


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: Group) -> Tensor:
    if group is None:
        return x
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op, group)
    return total
