"""Sums, means and rows over processes, with their gradients; the identity without a group.

All processes must make the same calls, also in backward passes. The gradient is that of the sum of
all processes' losses. DistributedDataParallel averages gradients, so with it a loss on gathered
rows has the gradient of one process that sees all rows.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Function
from densekit.typing import Float, Integer, Shaped, Tensor, typed

__all__ = ["all_gather", "all_max", "all_mean", "all_sum", "shuffle_batch", "unshuffle_batch"]

Group = dist.ProcessGroup | None
"""The processes that take part, such as `torch.distributed.group.WORLD`; None is this one alone."""


class _Sum(Function):
    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce(x, dist.ReduceOp.SUM, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradients[0], ctx.group), None


class _Gather(Function):
    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.detach().contiguous()
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group)
        return torch.cat(parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = _Sum.apply(gradients[0], ctx.group)  # from the losses of all processes
        return total.tensor_split(ctx.group.size())[ctx.group.rank()], None


@typed
def all_sum(x: Float[Tensor, "*shape"], group: Group = None) -> Float[Tensor, "*shape"]:
    """Sum a tensor over the processes of a group; without a group return it unchanged.

    Args:
        x: A tensor of the same shape on every process.
        group: The processes; None leaves the tensor as it is.

    Returns:
        The sum, the same on every process. Its gradient is the sum of the processes' gradients.

    Examples:
        >>> all_sum(torch.ones(2))
        tensor([1., 1.])
    """
    return x if _alone(group) else _Sum.apply(x, group)


@typed
def all_mean(x: Float[Tensor, "*shape"], group: Group = None) -> Float[Tensor, "*shape"]:
    """Average a tensor over the processes of a group; without a group return it unchanged.

    The mean of masked means is not the masked mean where processes have different numbers of valid
    entries. For a masked mean, pass the group to [`masked_mean`][densekit.numerics.masked_mean].

    Args:
        x: A tensor of the same shape on every process.
        group: The processes; None leaves the tensor as it is.

    Returns:
        The mean, the same on every process. Its gradient is the mean of the processes' gradients.

    Examples:
        >>> all_mean(torch.ones(2))
        tensor([1., 1.])
    """
    return x if group is None else all_sum(x, group) / group.size()


@typed
def all_max(x: Float[Tensor, "*shape"], group: Group = None) -> Float[Tensor, "*shape"]:
    """Compute the elementwise maximum over the processes of a group; without one return the tensor.

    Args:
        x: A tensor of the same shape on every process. No gradient flows through the maximum of a
            group.
        group: The processes; None leaves the tensor as it is.

    Returns:
        The maximum, the same on every process.

    Examples:
        >>> all_max(torch.ones(2))
        tensor([1., 1.])
    """
    return x if group is None or _alone(group) else _all_reduce(x, dist.ReduceOp.MAX, group)


@typed
def all_gather(
    x: Shaped[Tensor, " n *row"], group: Group = None, *, ragged: bool = False
) -> Shaped[Tensor, " m *row"]:
    """Gather the rows of all processes, in the order of ranks; without a group return the tensor.

    Use it for keys that every process pushes into its bank in the same order, and for negatives
    from the whole batch. Where the number of rows differs between processes, pad the rows and
    gather their `valid` too, or set `ragged`.

    Args:
        x: Rows of any dtype; the same number on every process, unless ragged.
        group: The processes; None leaves the tensor as it is.
        ragged: Allow a different number of rows on each process. This takes one more message, for
            which the host waits.

    Returns:
        `m` rows, the same on every process. The gradient of a row is the sum of its gradients from
        all processes' losses.

    Examples:
        >>> all_gather(torch.ones(2, 3)).shape
        torch.Size([2, 3])

    References:
        MoCo, Algorithm 1 (keys of all processes); SimCLR, Sec 2.2 (negatives of all processes).
    """
    if _alone(group):
        return x
    if not ragged:
        return _Gather.apply(x, group)
    counts = _Gather.apply(torch.tensor([len(x)], device=x.device), group).tolist()
    padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
    parts = _Gather.apply(padded, group).tensor_split(len(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


@typed
def shuffle_batch(
    x: Shaped[Tensor, " n *row"], order: Integer[Tensor, " m"], group: Group = None
) -> Shaped[Tensor, " n *row"]:
    """Redistribute the rows of all processes, for shuffled batch normalization.

    The batch statistics of the keys must not reveal which key belongs to a query. Therefore shuffle
    the images, encode them, call `unshuffle_batch` on the features, and only then use the boxes or
    labels of the images.

    Args:
        x: n rows on each process, of any dtype.
        order: A permutation of the `m = n processes` rows, the same on every process, such as
            `torch.randperm(m, generator=...)` with the same seed on all; of any integer dtype.
        group: The processes; None permutes the rows of this one.

    Returns:
        This process's n rows of the shuffled rows.

    Raises:
        ValueError: The length of the order is not the number of all rows.

    Examples:
        >>> order = torch.tensor([2, 0, 1])
        >>> shuffled = shuffle_batch(torch.tensor([[1.0], [2.0], [3.0]]), order)
        >>> shuffled.flatten(), unshuffle_batch(shuffled, order).flatten()
        (tensor([3., 1., 2.]), tensor([1., 2., 3.]))

    References:
        MoCo, Sec 3.3 (Shuffling BN); DUPR, Sec 3.2 (its key branch).
    """
    return _deal("shuffle_batch", x, order, group)


@typed
def unshuffle_batch(
    x: Shaped[Tensor, " n *row"], order: Integer[Tensor, " m"], group: Group = None
) -> Shaped[Tensor, " n *row"]:
    """Undo `shuffle_batch`: return the rows of its own images to each process.

    Args:
        x: n shuffled rows, or features that were computed from them.
        order: The permutation that was passed to `shuffle_batch`.
        group: The processes; None permutes the rows of this one.

    Returns:
        This process's rows, in their original order.

    Raises:
        ValueError: The length of the order is not the number of all rows.

    Examples:
        >>> unshuffle_batch(torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([2, 0, 1])).flatten()
        tensor([1., 2., 3.])

    References:
        MoCo, Sec 3.3 (Shuffling BN).
    """
    return _deal("unshuffle_batch", x, order.long().argsort(), group)


def _deal(function: str, x: Tensor, order: Tensor, group: Group) -> Tensor:
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    if len(order) != len(x) * size:
        raise ValueError(
            f"densekit.distributed.{function}: the order has {len(order)} entries for {len(x)} "
            f"rows on each of {size} processes; give a permutation of all rows."
        )
    return all_gather(x, group)[order.long().tensor_split(size)[rank]]


def _alone(group: Group) -> bool:
    return group is None or group.size() == 1


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op, group)
    return total
