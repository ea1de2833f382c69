"""Images shared out to several processes, and what they made of them, brought together.

This module is no command. Each process takes a part of the images, in their order. The first one
gets the rows of all of them, in the same order as one process alone has them.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from harness import World
from torch import Tensor

DAY = 86_400.0  # seconds: the others wait, while the first process scores


class Shards(NamedTuple):
    """This process among those that share the images out."""

    rank: int = 0
    size: int = 1
    group: Any = None  # of gloo, which takes tensors on the CPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def part(self, count: int) -> range:
        """The numbers of this process's images, of `count` in all."""
        first = count * self.rank // self.size
        last = count * (self.rank + 1) // self.size
        return range(first, last)

    def most(self, count: int) -> int:
        """The largest count of any process, on all of them."""
        if self.size == 1:
            return count
        counts: list[Any] = [None] * self.size
        dist.all_gather_object(counts, count, self.group)
        return max(counts)

    def gather(self, rows: Tensor | None) -> Tensor | None:
        """The rows of all processes on the first one, on the CPU, and None on the others.

        A process without a row may give None. Where the processes have other dtypes, the widest one
        is taken.
        """
        if self.size == 1:
            return rows
        described = None if rows is None else (tuple(rows.shape), rows.dtype)
        known: list[Any] = [None] * self.size
        dist.all_gather_object(known, described, self.group)
        shapes = [x for x in known if x is not None]
        if not shapes:
            return None

        dtype = shapes[0][1]
        for _, other in shapes:
            dtype = torch.promote_types(dtype, other)
        if not self.is_main:
            if rows is not None and len(rows):
                dist.send(rows.cpu().to(dtype).contiguous(), 0, self.group)
            return None

        count = sum(shape[0] for shape, _ in shapes)
        together = torch.empty(count, *shapes[0][0][1:], dtype=dtype)
        first = 0
        for rank, item in enumerate(known):
            length = 0 if item is None else item[0][0]
            own = together[first : first + length]
            if length and rank == 0 and rows is not None:
                own.copy_(rows)
            elif length:
                dist.recv(own, rank, self.group)
            first += length
        return together

    def gather_parts(self, parts: list[Tensor]) -> Tensor | None:
        """The same of rows that came in parts, of which a process may have none."""
        rows = torch.cat(parts) if parts else None
        return self.gather(rows)


ALONE = Shards()


def shards_of(world: World) -> Shards:
    """The processes of a group; those on GPUs get a second group, for tensors on the CPU."""
    if world.size == 1:
        return ALONE
    group = dist.group.WORLD
    if dist.get_backend() != "gloo":
        group = dist.new_group(backend="gloo")
    return Shards(world.rank, world.size, group)
