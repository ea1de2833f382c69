"""Functions run on several gloo processes at once."""

import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # in the parent, or each forked process may import it for 20 s
import torch.distributed as dist


def _child(rank, size, folder, function, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    dist.barrier()  # who leaves before all are connected breaks the connections of the others
    torch.save(function(rank, dist.group.WORLD, *args), folder / f"result-{rank}")
    dist.destroy_process_group()


def on_processes(size, function, *args):
    """What `function(rank, group, *args)` returns on each of `size` processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.multiprocessing.start_processes(
            _child, (size, folder, function, args), nprocs=size, start_method="fork"
        )
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(size)]
