"""The harness, with real files, real processes (two of them, over gloo) and real signals."""

import codecs
import contextlib
import copy
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pty
import re
import resource
import signal
import socket
import struct
import sys
import tempfile
import termios
import threading
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import harness
import numpy as np
import pytest
import torch
import torch._dynamo  # in the parent, or DDP in each forked process imports it for 20 s
import torch.distributed as dist
from downstream import encoders
from downstream.crops import crop_bytes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from processes import on_processes as on_gloo_processes
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import Normalize
import densekit as dk

# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # or `process_group` sets the number of threads
CPU = torch.device("cpu")
ALONE = harness.World(0, 1, CPU)


def _child(rank, size, port, folder, function, args):
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), **place}
    with harness.process_group("cpu") as world:
        result = function(world, *args)
    torch.save(result, folder / f"result-{rank}")


def on_processes(size, folder, function, *args):
    """What `function(world, *args)` returns on each of `size` processes; one runs right here."""
    if size == 1:
        with harness.process_group("cpu") as world:
            return [function(world, *args)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _child, (size, port, folder, function, args), nprocs=size, start_method="fork"
    )
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(size)]


def in_a_fork(function, *args):
    """The exit code of a process of its own that calls `function(*args)`; it may not hang."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(60)
    process.kill()
    return process.exitcode


def own_rank(world):
    return world.rank


@pytest.mark.slow
def test_a_process_that_ends_at_once_lets_the_others_connect(tmp_path):
    """Without the barrier of `process_group` about one group of 75 does not come about."""
    for _ in range(300):
        assert on_processes(4, tmp_path, own_rank) == [0, 1, 2, 3]


@pytest.fixture
def world():
    with harness.process_group("cpu") as world:
        yield world


# ---- a small training to interrupt -----------------------------------------------------------


@dataclass(frozen=True)
class Optim:
    name: str = "sgd"
    lr: float = 0.05


@dataclass(frozen=True)
class Config:
    optim: Optim = field(default_factory=Optim)
    scale: tuple[float, float] = (0.2, 1.0)
    data: Path | None = Path("photos")
    workers: int = 0
    log_every: int = 2


class Noise:
    """Values that depend on (seed, epoch, index) through torch's global generator."""

    def __init__(self, count=22):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        self.read.append(key)
        with harness.seeded(3, *key):
            return torch.tensor(key), torch.randn(4)


class Queue(NamedTuple):
    bank: Tensor
    position: Tensor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)
        self.late = nn.Linear(8, 4)  # without gradient, hence without moments, until step 4

    def forward(self, x, late):
        x = self.body(x)
        return self.head(x) + self.late(x) if late else self.head(x)


class KilledError(Exception):
    pass


def build(name, lr):
    with harness.seeded(0):
        net = Net()
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr, weight_decay=0.1),
    }
    return net, kinds[name](net.parameters())


def train(world, folder, config, killed_after=None, steps=12):
    """Eight images a step; checkpoints after steps 3, 7, 11 and the last."""
    net, optimizer = build(config.optim.name, config.optim.lr)
    teacher = copy.deepcopy(net)
    queue = Queue(torch.zeros(16, 4), torch.tensor(0))
    ddp = DistributedDataParallel(net, find_unused_parameters=True)
    with harness.Run(folder, config, world) as run:
        step = run.resume(ddp, optimizer, teacher=teacher, queue=queue)
        for _, x in harness.batches(
            Noise(), 8, world, seed=1, start=step, stop=steps, workers=config.workers
        ):
            y = ddp(x, late=step >= 4)
            with torch.no_grad():
                target = teacher(x, late=True) + queue.bank.mean(0)
            loss = (y - target - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            terms = {"late": y.mean()} if step >= 4 else {}
            run.record(step, {"loss": loss, "size": y.abs().mean(), **terms})
            optimizer.step()
            with torch.no_grad():
                for old, new in zip(teacher.parameters(), net.parameters(), strict=True):
                    old.lerp_(new, 0.1)
                mean = y.detach().mean(0)
                dist.all_reduce(mean)
                queue.bank[queue.position] = mean
                queue.position.add_(1).remainder_(16)
            step += 1
            if step % config.log_every == 0:
                run.log(step, **run.take_means())
            if step % 4 == 3 or step == steps:
                run.save(step, ddp, optimizer, teacher=teacher, queue=queue)
            if step == killed_after:
                raise KilledError
    return net.state_dict(), teacher.state_dict(), tuple(queue)


def train_killed(world, folder, config, after):
    with pytest.raises(KilledError):
        train(world, folder, config, killed_after=after)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The rows and the final state of a whole run, by optimizer and number of processes."""
    made = {}

    def get(name, size):
        if (name, size) not in made:
            folder = tmp_path_factory.mktemp("whole")
            config = Config(Optim(name))
            results = on_processes(size, folder, train, folder / "run", config)
            made[name, size] = (folder / "run" / "metrics.jsonl").read_text(), results[0]
        return made[name, size]

    return get


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_killed_run_resumes_to_the_same_bits(tmp_path, uninterrupted, name, size, workers):
    """KilledError after step 9, resumed mid-epoch from step 7, killed again after 10, finished."""
    folder, config = tmp_path / "run", Config(Optim(name), workers=workers)
    on_processes(size, tmp_path, train_killed, folder, config, 9)
    assert [row["step"] for row in rows(folder)] == [2, 4, 6, 8]
    on_processes(size, tmp_path, train_killed, folder, config, 10)
    state = on_processes(size, tmp_path, train, folder, dataclasses.replace(config, workers=0))[0]
    whole_rows, whole_state = uninterrupted(name, size)
    assert (folder / "metrics.jsonl").read_text() == whole_rows
    for ours, theirs in zip(state, whole_state, strict=True):
        if isinstance(ours, dict):
            ours, theirs = ours.values(), theirs.values()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_losses_of_the_toy_depend_on_everything_that_is_resumed(uninterrupted):
    """The test above proves something only where losses move and differ."""
    losses = [json.loads(line)["loss"] for line in uninterrupted("adamw", 1)[0].splitlines()]
    assert len(losses) == 6 == len(set(losses))
    assert losses != [json.loads(x)["loss"] for x in uninterrupted("sgd", 1)[0].splitlines()]


def test_finished_run_stays_as_it_is(tmp_path, world):
    train(world, tmp_path / "run", Config())
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    train(world, tmp_path / "run", Config())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_number_of_processes_may_change(tmp_path):
    on_processes(2, tmp_path, train_killed, tmp_path / "run", Config(), 9)
    on_processes(1, tmp_path, train, tmp_path / "run", Config())
    assert [row["step"] for row in rows(tmp_path / "run")] == [2, 4, 6, 8, 10, 12]


def test_curves_hold_each_step_once(tmp_path, world):
    train_killed(world, tmp_path / "run", Config(), 9)
    train(world, tmp_path / "run", Config())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "size", "late"}
    for name in ("loss", "size"):
        curve = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(row["step"], pytest.approx(row[name])) for row in rows(tmp_path / "run")]
        assert curve == expected


# ---- checkpoints -----------------------------------------------------------------------------


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_only_the_newest_two_checkpoints_are_kept(tmp_path, world):
    train(world, tmp_path / "run", Config())
    assert checkpoints(tmp_path / "run") == ["step-00000011", "step-00000012"]


class Labeled(nn.Module):
    """An encoder whose weights tell their step."""

    def __init__(self):
        super().__init__()
        self.network = encoders.build("tiny")

    def mark(self, step):
        nn.init.constant_(self.network.layer1[0].bn1.bias, step)


FACTS = {"architecture": "tiny", "mean": [0.5] * 3, "std": [0.2] * 3, "method": "none"}


def steps_read(name):
    """The step in the facts of an encoder, and the one in its weights."""
    encoder = encoders.load_encoder(str(name))
    return encoder.facts["step"], int(encoder.network.layer1[0].bn1.bias[0])


def test_an_encoder_comes_with_each_checkpoint_and_epochs_are_kept(tmp_path, world):
    """Steps 10 to 70, ten in an epoch; the newest two stay, and epochs 2 and 4."""
    folder = tmp_path / "run"
    net, optimizer = build("sgd", 0.1)
    model = Labeled()
    kept = harness.kept_epochs(SimpleNamespace(keep=(2, 4)), 10)
    with harness.Run(folder, Config(), world) as run:
        run.resume(net, optimizer)
        with pytest.raises(harness.UserError, match=r"no encoder yet: the first checkpoint .*\.$"):
            encoders.load_encoder(str(folder))
        for step in range(10, 80, 10):
            model.mark(step)
            options = {"encoder": model.network, "facts": FACTS, "epoch": kept.get(step)}
            run.save(step, net, optimizer, **options)
            assert steps_read(folder) == steps_read(folder / "encoder.safetensors") == (step, step)
    names = checkpoints(folder)
    assert names == [
        "step-00000020-epoch-2", "step-00000040-epoch-4", "step-00000060", "step-00000070",
    ]  # fmt: skip
    for name in names:
        step = int(name.split("-")[1])
        assert steps_read(folder / "checkpoints" / name) == (step, step)

    for newer in ("step-00000070", "step-00000060"):
        harness.shutil.rmtree(folder / "checkpoints" / newer)
    with harness.Run(folder, Config(), world) as run:
        assert run.resume(net, optimizer) == 40  # a kept one may be the newest
        run.save(40, net, optimizer)  # under another name, since it is not kept now
    assert checkpoints(folder) == ["step-00000020-epoch-2", "step-00000040"]


@pytest.mark.parametrize("written", range(6))
def test_a_save_that_is_killed_anywhere_leaves_an_encoder_whose_facts_fit(
    tmp_path, world, monkeypatch, written
):
    """A checkpoint writes six files besides those of torch: four of its own, two of the run."""
    net, optimizer = build("sgd", 0.1)
    model = Labeled()
    write, count = harness.write, iter(range(9))

    def dying(path, content):
        if next(count) == written:
            raise KilledError
        write(path, content)

    with harness.Run(tmp_path, Config(), world) as run:
        run.resume(net, optimizer)
        for step in (1, 2):
            model.mark(step)
            if step == 2:
                monkeypatch.setattr(harness, "write", dying)
            with pytest.raises(KilledError) if step == 2 else contextlib.nullcontext():
                run.save(step, net, optimizer, encoder=model.network, facts=FACTS)
    assert steps_read(tmp_path) == (1, 1)
    monkeypatch.undo()
    with harness.Run(tmp_path, Config(), world) as run:
        step = run.resume(net, optimizer)
    assert steps_read(tmp_path) == (step, step)


def test_facts_that_were_mended_by_hand_count(tmp_path):
    path = tmp_path / "encoder.safetensors"
    harness.save_encoder(path, Labeled().network, **FACTS, step=3)
    mended = {**facts(path), "mean": [0.1, 0.2, 0.3]}
    for side_car in (mended, {name: x for name, x in mended.items() if name != "step"}):
        path.with_suffix(".json").write_text(json.dumps(side_car))
        assert encoders.load_encoder(str(path)).mean == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("half", [False, True])
def test_save_killed_half_way_is_not_picked_up(tmp_path, half):
    folder, config = tmp_path / "run", Config()

    def dies_in_its_second_save():
        save, count = harness.dcp.save, iter(range(2))

        def dying(state, checkpoint_id, planner):
            if next(count):
                if half:
                    checkpoint_id.mkdir()
                    (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
                else:  # all is written, only the name is not yet given
                    save(state, checkpoint_id=checkpoint_id, planner=planner)
                os.kill(os.getpid(), signal.SIGKILL)
            save(state, checkpoint_id=checkpoint_id, planner=planner)

        harness.dcp.save = dying
        on_processes(1, tmp_path, train, folder, config)

    assert in_a_fork(dies_in_its_second_save) == -signal.SIGKILL
    assert checkpoints(folder) == [".step-00000007", "step-00000003"]
    with harness.process_group("cpu") as world:
        net, optimizer = build("sgd", 0.1)
        with harness.Run(folder, config, world) as run:
            state = {
                "teacher": copy.deepcopy(net),
                "queue": Queue(torch.zeros(16, 4), torch.tensor(0)),
            }
            assert run.resume(net, optimizer, **state) == 3
    assert checkpoints(folder) == ["step-00000003"]
    assert [row["step"] for row in rows(folder)] == [2]  # steps 1 and 2; step 3 is in the next row


def test_extras_come_back_in_place(tmp_path, world):
    net, optimizer = build("sgd", 0.1)
    nested = {"queues": {"a": Queue(torch.arange(6.0).view(2, 3), torch.tensor(4))}}
    with harness.Run(tmp_path / "run", Config(), world) as run:
        run.resume(net, optimizer)
        run.save(5, net, optimizer, teacher=net.head, nested=nested, center=torch.ones(3))
    empty = {"queues": {"a": Queue(torch.zeros(2, 3), torch.tensor(0))}}
    teacher, center = nn.Linear(8, 4), torch.zeros(3)
    with harness.Run(tmp_path / "run", Config(), world) as run:
        assert run.resume(net, optimizer, teacher=teacher, nested=empty, center=center) == 5
    assert torch.equal(teacher.weight, net.head.weight)
    assert torch.equal(empty["queues"]["a"].bank, torch.arange(6.0).view(2, 3))
    assert empty["queues"]["a"].position == 4
    assert torch.equal(center, torch.ones(3))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_saving_before_the_first_step_changes_nothing(tmp_path, world, name):
    net, optimizer = build(name, 0.1)
    before = copy.deepcopy(net.state_dict())
    with harness.Run(tmp_path / "run", Config(), world) as run:
        assert run.resume(net, optimizer) == 0
        run.save(0, net, optimizer)
    assert not optimizer.state
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    with harness.Run(tmp_path / "run", Config(), world) as run:
        assert run.resume(net, optimizer) == 0
    assert not optimizer.state


def test_leftover_gradients_do_not_hide_the_moments(tmp_path, world):
    net, optimizer = build("adamw", 0.1)
    net(torch.randn(3, 4), late=True).sum().backward()
    optimizer.step()
    with harness.Run(tmp_path / "run", Config(), world) as run:
        run.resume(net, optimizer)  # there is none, so the moments stay
        run.save(1, net, optimizer)
    fresh, other = build("adamw", 0.1)
    fresh(torch.randn(3, 4), late=True).sum().backward()
    with harness.Run(tmp_path / "run", Config(), world) as run:
        run.resume(fresh, other)
    moment = optimizer.state[net.late.weight]["exp_avg"]
    assert moment.abs().sum() > 0
    assert torch.equal(other.state[fresh.late.weight]["exp_avg"], moment)


@pytest.mark.parametrize("wrapped", ["bare", "ddp", "compiled", "ddp of compiled"])
def test_wrapped_and_bare_models_read_each_others_checkpoints(tmp_path, world, wrapped):
    net, optimizer = build("adamw", 0.1)
    model = torch.compile(net) if "compiled" in wrapped else net
    model = DistributedDataParallel(model) if "ddp" in wrapped else model
    net(torch.randn(3, 4), late=True).sum().backward()
    optimizer.step()
    with harness.Run(tmp_path / "run", Config(), world) as run:
        run.resume(model, optimizer)
        run.save(1, model, optimizer)
    saved = harness.dcp.FileSystemReader(tmp_path / "run/checkpoints/step-00000001").read_metadata()
    keys = " ".join(saved.state_dict_metadata)
    assert "model.body.0.weight" in keys
    assert "module." not in keys
    assert "_orig_mod" not in keys
    other, optimizer = build("adamw", 0.1)
    with torch.no_grad():
        other.head.weight.zero_()
    with harness.Run(tmp_path / "run", Config(), world) as run:
        assert run.resume(other, optimizer) == 1
    assert torch.equal(other.head.weight, net.head.weight)
    assert optimizer.state[other.head.weight]["step"] == 1


def test_another_model_is_not_loaded_in_part(tmp_path, world):
    net, optimizer = build("sgd", 0.1)
    with harness.Run(tmp_path / "run", Config(), world) as run:
        run.resume(net, optimizer)
        run.save(1, net, optimizer)
    net.extra = nn.Linear(2, 2)
    with (
        harness.Run(tmp_path / "run", Config(), world) as run,
        pytest.raises(harness.UserError, match=r"1 does not fit .*model\.extra\.weight"),
    ):
        run.resume(net, torch.optim.SGD(net.parameters(), 0.1))


# ---- the log ---------------------------------------------------------------------------------


def test_log_takes_numbers_and_tensors(tmp_path, world):
    net, optimizer = build("sgd", 0.1)
    with harness.Run(tmp_path / "run", Config(), world) as run:
        run.resume(net, optimizer)
        run.log(0, loss=torch.tensor(0.5, requires_grad=True), lr=0.1)
        assert rows(tmp_path / "run") == [{"step": 0, "loss": 0.5, "lr": 0.1}]  # at once
        run.log(0, **{"probe/miou": 0.25})
        assert run.rows("probe/miou") == [{"step": 0, "probe/miou": 0.25}]
        assert [row["loss"] for row in run.rows("loss")] == [0.5]
        assert run.rows("other") == []


def test_rows_without_a_checkpoint_and_half_rows_are_dropped(tmp_path, world):
    net, optimizer = build("sgd", 0.1)
    with harness.Run(tmp_path / "run", Config(), world) as run:
        run.resume(net, optimizer)
        run.log(0, probe=1.0)
        run.log(1, loss=1.0)
    with harness.Run(tmp_path / "run", Config(), world) as run:
        assert run.resume(net, optimizer) == 0
        assert rows(tmp_path / "run") == []  # the run begins anew, and logs step 0 anew
        run.log(0, probe=1.0)
        run.save(1, net, optimizer)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')
    with harness.Run(tmp_path / "run", Config(), world) as run:
        run.resume(net, optimizer)
    assert rows(tmp_path / "run") == [{"step": 0, "probe": 1.0}]


VALUES = st.floats(-1e6, 1e6)


@given(st.data())
def test_a_row_is_the_mean_over_its_steps_whatever_is_read_in_between(tmp_path_factory, data):
    """Terms come and go, and checkpoints, stops and resumes fall anywhere."""
    steps = data.draw(st.integers(1, 8), "steps")
    every = data.draw(st.integers(1, 4), "steps of a row")
    names = st.sets(st.sampled_from(["dense", "region"]))
    terms = [
        {name: data.draw(VALUES) for name in ("loss", *sorted(data.draw(names)))}
        for _ in range(steps)
    ]
    events = [data.draw(st.sampled_from(["", "check", "resume"])) for _ in range(steps)]
    expected = {}
    for end in range(every, steps + 1, every):
        own = terms[end - every : end]
        for name in {name for step in own for name in step}:
            having = [step[name] for step in own if name in step]
            expected[end, name] = pytest.approx(sum(having) / len(having), rel=1e-9, abs=1e-6)

    def means(events):
        folder = tmp_path_factory.mktemp("run") / "run"
        found = {}
        with harness.process_group("cpu") as world:
            net, optimizer = build("sgd", 0.1)
            run = harness.Run(folder, Config(), world)
            run.resume(net, optimizer)
            for step, event in enumerate(events):
                run.record(step, {k: torch.from_numpy(np.array(x)) for k, x in terms[step].items()})
                if (step + 1) % every == 0:
                    for name, mean in run.take_means().items():
                        found[step + 1, name] = mean
                if event == "check":
                    run.check()
                if event == "resume":
                    run.save(step + 1, net, optimizer)
                    run.close()
                    run = harness.Run(folder, Config(), world)
                    assert run.resume(net, optimizer) == step + 1
            run.close()
        return found

    found = means(events)
    assert found == expected
    assert found == means([""] * steps)  # to the last bit


def means_here(world, folder):
    with harness.Run(folder, Config(), world) as run:
        assert run.take_means() == {}
        one = torch.tensor(1.0 + world.rank, requires_grad=True)
        run.record(3, {"loss": one, "half": one.half() / 2})
        run.check()
        run.record(4, {"loss": one + 2})
        return run.take_means(), run.take_means()


@pytest.mark.parametrize(("size", "mean"), [(1, 1.0), (2, 1.5)])
def test_means_are_over_the_steps_and_the_processes(tmp_path, size, mean):
    for values in on_processes(size, tmp_path, means_here, tmp_path / "run"):
        assert values == ({"loss": mean + 1, "half": mean / 2}, {})


def fail_on_rank_one(world, folder, bad):
    net, optimizer = build("adamw", 0.1)
    with harness.Run(folder, Config(), world) as run:
        run.resume(net, optimizer)
        run.record(3, {"loss": torch.tensor(1.0)})
        run.save(4, net, optimizer)
        for step in range(4, 9):
            terms = {"loss": torch.tensor(1.0), "dense": torch.tensor(2.0)}
            if world.rank == 1 and step >= 5:
                terms["dense"] = torch.tensor(bad if step == 5 else torch.nan)
            if step >= 6:  # everything is bad afterwards
                terms["loss"] = torch.tensor(torch.nan)
            run.record(step, terms)
        with pytest.raises(harness.NonFiniteError) as error:
            run.save(9, net, optimizer)  # a bad state is never saved
    with harness.Run(folder, Config(), world) as run:
        assert run.resume(net, optimizer) == 4
    return str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_bad_value_stops_all_and_keeps_the_checkpoint(tmp_path, bad):
    folder = tmp_path / "run"
    messages = on_processes(2, tmp_path, fail_on_rank_one, folder, bad)
    assert messages[0] == messages[1]
    assert f"Not finite at step 5: dense = {bad}; the last good checkpoint" in messages[0]
    assert str(folder / "checkpoints" / "step-00000004") in messages[0]


def test_bad_loss_before_any_checkpoint(tmp_path, world):
    with harness.Run(tmp_path / "run", Config(), world) as run:
        run.record(0, {"loss": torch.tensor(torch.nan)})
        with pytest.raises(harness.NonFiniteError, match="none is saved"):
            run.take_means()


# ---- the run folder --------------------------------------------------------------------------


def open_run(world, folder, config, **options):
    try:
        with harness.Run(folder, config, world, **options):
            return None
    except harness.UserError as error:
        return str(error)


@pytest.mark.parametrize("size", [1, 2])
def test_another_configuration_is_refused_by_name(tmp_path, size):
    folder = tmp_path / "run"
    on_processes(1, tmp_path, open_run, folder, Config())
    stored = json.loads((folder / "config.json").read_text())
    assert stored["optim"] == {"name": "sgd", "lr": 0.05}
    assert stored["scale"] == [0.2, 1.0]
    assert stored["data"] == "photos"
    (folder / "metrics.jsonl").touch()  # as `resume` does
    other = Config(Optim(lr=0.1), data=None)
    for message in on_processes(size, tmp_path, open_run, folder, other):
        assert "optim.lr = 0.05, now 0.1" in message
        assert "data = 'photos', now None" in message
        assert "scale" not in message
        assert "name" not in message
        assert str(folder) in message
    assert json.loads((folder / "config.json").read_text()) == stored


def test_an_infinite_option_is_text_in_the_file_and_the_same_on_resume(tmp_path, world):
    folder, config = tmp_path / "run", Config(Optim(lr=math.inf))
    assert open_run(world, folder, config) is None
    path = folder / "config.json"
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["optim"]["lr"] == "Infinity"
    (folder / "metrics.jsonl").touch()  # as `resume` does
    assert open_run(world, folder, config) is None
    path.write_text(path.read_text().replace('"Infinity"', "Infinity"))  # as it was written once
    assert open_run(world, folder, config) is None
    assert "optim.lr" in open_run(world, folder, Config())


def test_ignored_fields_may_change(tmp_path, world):
    assert open_run(world, tmp_path / "run", Config()) is None
    (tmp_path / "run" / "metrics.jsonl").touch()  # as `resume` does
    assert open_run(world, tmp_path / "run", Config(workers=3)) is None
    other = Config(Optim(lr=0.1))
    assert open_run(world, tmp_path / "run", other, ignore=("optim.lr", "workers")) is None
    assert "workers" in open_run(world, tmp_path / "run", Config(workers=3), ignore=("lr",))
    assert open_run(world, tmp_path / "run", Config(workers=3), ignore=("lr", "workers")) is None


def test_a_run_that_never_began_may_be_started_with_another_configuration(tmp_path, world):
    folder, other = tmp_path / "run", Config(Optim(lr=0.1))
    assert open_run(world, folder, Config()) is None  # and ends in a UserError before `resume`
    assert open_run(world, folder, other) is None
    assert json.loads((folder / "config.json").read_text())["optim"]["lr"] == 0.1
    reasons = {"config.json": "another configuration", "package.json": "neither empty nor"}
    for name, reason in reasons.items():  # somebody else's
        foreign = tmp_path / name.replace(".", "-")
        foreign.mkdir()
        (foreign / name).write_text('{"name": "mine"}')
        assert reason in open_run(world, foreign, other)
        assert (foreign / name).read_text() == '{"name": "mine"}'


def test_foreign_folder_is_refused(tmp_path, world):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "neither empty nor" in open_run(world, tmp_path, Config())
    assert "neither empty nor" in open_run(world, tmp_path / "thesis.tex", Config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    hidden = tmp_path / "empty but for hidden files"
    hidden.mkdir()
    (hidden / ".gitkeep").touch()
    assert open_run(world, hidden, Config()) is None


@pytest.mark.parametrize(
    ("changes", "more", "expected"),
    [
        ({}, [], "runs/croc-demo"),
        ({"data": Path("sets/coco")}, [], "runs/croc-demo-coco"),
        ({"data": Path("sets/list.txt")}, ["vit", "b"], "runs/croc-demo-vit-b-list.txt"),
        ({"data": Path("sets/coco"), "run": Path("mine")}, ["vit"], "mine"),
    ],
)
def test_the_run_folder_tells_runs_apart(changes, more, expected):
    config = SimpleNamespace(**{"run": None, "data": None, "preset": "demo", **changes})
    assert harness.run_folder("croc", config, *more) == Path(expected)


def test_a_data_folder_may_be_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    config = SimpleNamespace(run=None, data=Path(), preset="demo")
    assert harness.run_folder("croc", config) == Path("runs/croc-demo-photos")


def test_pictures_lie_side_by_side_in_the_order_of_their_steps(tmp_path, world):
    with harness.Run(tmp_path / "run", Config(), world) as run:
        paths = [run.picture_path(step) for step in (0, 40, 100_000)]
        for path in paths:
            path.touch()
    assert [path.name for path in paths] == [
        "step-000000.png", "step-000040.png", "step-100000.png",
    ]  # fmt: skip
    assert sorted((tmp_path / "run" / "pictures").iterdir()) == paths


# ---- signals ---------------------------------------------------------------------------------


def signal_rank_one(world, folder, number):
    with harness.Run(folder, Config(), world) as run:
        run.record(0, {"loss": torch.ones(())})
        run.check()
        answers = [run.stop_requested()]
        if world.rank == 1:
            os.kill(os.getpid(), number)
        answers.append(run.stop_requested())  # nobody knows, before the values are read
        run.record(1, {"loss": torch.ones(())})
        run.check()
        return [*answers, run.stop_requested()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_to_one_process_stops_all(tmp_path, number):
    answers = on_processes(2, tmp_path, signal_rank_one, tmp_path / "run", number)
    assert answers == [[False, False, True]] * 2


def test_second_interrupt_is_at_once_and_handlers_are_restored(tmp_path, world):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with harness.Run(tmp_path / "run", Config(), world) as run:
        assert not run.stop_requested()  # the first step is made
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stop_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before


def ended_by_signals(folder, numbers, pause, steps):
    """A run that gets these signals after some steps, and would else end by itself with 7."""
    with harness.process_group("cpu") as world, harness.Run(folder, Config(), world) as run:
        for step in range(steps):
            run.record(step, {"loss": torch.ones(())})
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)
    os._exit(7)


@pytest.mark.parametrize(
    ("numbers", "steps", "code"),
    [
        ([signal.SIGTERM], 0, -signal.SIGTERM),
        ([signal.SIGUSR1], 0, -signal.SIGUSR1),
        ([signal.SIGTERM], 1, 7),
        ([signal.SIGUSR1] * 3, 1, 7),
        ([signal.SIGINT, signal.SIGTERM], 1, 7),
        ([signal.SIGTERM, signal.SIGTERM], 1, -signal.SIGTERM),
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM], 2, -signal.SIGTERM),
    ],
)
def test_a_second_sigterm_or_one_before_the_first_step_ends_at_once(tmp_path, numbers, steps, code):
    assert in_a_fork(ended_by_signals, tmp_path / "run", numbers, 0, steps) == code


def test_a_signal_that_torchrun_passes_on_is_the_same_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    twice = [signal.SIGTERM] * 2
    assert in_a_fork(ended_by_signals, tmp_path / "run", twice, 0, 1) == 7
    monkeypatch.setattr(harness, "PASSED_ON_WITHIN", 0.01)
    assert in_a_fork(ended_by_signals, tmp_path / "run", twice, 0.1, 1) == -signal.SIGTERM


def signaled_with_workers(world, folder, number):
    os.setpgrp()  # the signal must not reach the tests
    with harness.Run(folder, Config(), world) as run:
        run.stop_requested()  # as after each step
        loader = harness.batches(Noise(128), 2, world, seed=0, start=0, stop=64, workers=2)
        seen = 0
        for _ in loader:
            if seen == 3:
                os.killpg(0, number)  # as schedulers and terminals do: to all of the job
            seen += 1
        return seen, run.stop_requested()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_loader_processes_outlive_a_stop_request(tmp_path, number):
    def child():
        result = on_processes(1, tmp_path, signaled_with_workers, tmp_path / "run", number)
        torch.save(result, tmp_path / "result")

    assert in_a_fork(child) == 0
    assert torch.load(tmp_path / "result") == [(64, True)]


# ---- processes -------------------------------------------------------------------------------


def test_one_process_is_a_group_of_one():
    with harness.process_group("cpu") as world:
        assert world == (0, 1, CPU)
        assert world.is_main
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()
    with pytest.raises(KilledError), harness.process_group("cpu"):
        raise KilledError
    assert not dist.is_initialized()
    with harness.process_group("cpu"):
        pass


def test_one_core_is_left_to_the_loader_unless_threads_are_set(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    with harness.process_group("cpu"):
        assert torch.get_num_threads() == before  # OMP_NUM_THREADS is set here
    monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        with harness.process_group("cpu"):
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def describe(world):
    return world.rank, world.size, world.is_main, dist.get_rank(), dist.get_world_size()


def test_group_of_the_environment(tmp_path):
    expected = [(0, 2, True, 0, 2), (1, 2, False, 1, 2)]
    assert on_processes(2, tmp_path, describe) == expected


def leave_by_error(world):
    if world.rank == 1:
        raise harness.UserError("only here")
    with contextlib.suppress(RuntimeError):  # the peer is gone: an error, not a wait
        dist.all_reduce(torch.zeros(1))


def test_error_on_one_process_does_not_hang(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="only here"):
        on_processes(2, tmp_path, leave_by_error)


def evaluate_slowly(world, folder):
    net, optimizer = build("sgd", 0.1)
    with harness.Run(folder, Config(), world) as run:
        run.resume(net, optimizer)
        if world.is_main:
            time.sleep(2.5)
        run.save(1, net, optimizer)
        if world.is_main:
            time.sleep(2.5)
        with pytest.raises(RuntimeError):
            dist.barrier()  # what is no evaluation counts


def test_processes_that_wait_for_an_evaluation_do_not_run_out_of_time(tmp_path, monkeypatch):
    impatient = functools.partial(harness.process_group, collective_timeout=2.0)
    monkeypatch.setattr(harness, "process_group", impatient)
    on_processes(2, tmp_path, evaluate_slowly, tmp_path / "run")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    with harness.process_group() as world, harness.Run(tmp_path / "run", Config(), world) as run:
        assert world.device == torch.device("cuda", 0)
        net, _ = build("adamw", 0.1)
        net.to(world.device)
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.randn(3, 4, device=world.device), late=True).sum().backward()
        optimizer.step()
        assert run.resume(net, optimizer) == 0
        run.save(1, net, optimizer)
        run.record(1, {"loss": torch.tensor(2.0, device=world.device)})
        assert run.take_means() == {"loss": 2.0}
        assert not run.stop_requested()
        other, _ = build("adamw", 0.1)
        other.to(world.device)
    with harness.process_group() as world, harness.Run(tmp_path / "run", Config(), world) as run:
        assert run.resume(other, torch.optim.AdamW(other.parameters())) == 1
        assert torch.equal(other.head.weight, net.head.weight)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (harness.UserError("Give a folder."), 2, "error: Give a folder.\n"),
        (harness.NonFiniteError("Not finite at step 3."), 3, "error: Not finite at step 3.\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_main_says_one_sentence(capsys, error, code, text):
    def function(config):
        assert config == "config"
        raise error

    assert harness.main(function, "config") == code
    assert capsys.readouterr().err == text


DEAD_WORKER = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


class Late(harness.UserError):
    """torch says on the way out, too, that a loader process has died."""

    def __str__(self):
        raise DEAD_WORKER


@pytest.mark.parametrize("error", [DEAD_WORKER, Late()])
def test_a_dead_loader_process_is_one_sentence_wherever_torch_says_so(capsys, error):
    def function(_):
        raise error

    assert harness.main(function, None) == 2
    sentence = "error: The loader has failed (DataLoader worker (pid 7) is killed by signal: Killed"
    message = capsys.readouterr().err
    assert message.startswith(f"{sentence}): ")
    assert message.count("\n") == 1


def test_main_lets_success_and_defects_through():
    seen = []
    assert harness.main(seen.append, "config") == 0
    assert seen == ["config"]
    with pytest.raises(ZeroDivisionError):
        harness.main(lambda _: 1 // 0, None)


# ---- options ---------------------------------------------------------------------------------


def test_check_raises_its_sentence():
    harness.check(True, "--lr is 1: give 0.")
    with pytest.raises(harness.UserError, match=r"^--lr is 1: give 0\.$"):
        harness.check(False, "--lr is 1: give 0.")


@pytest.mark.parametrize(
    ("value", "typed"),
    [((0.2, 1.0), "0.2 1.0"), (3, "3"), (1e-4, "0.0001"), ((), ""), (Path("a b"), "a b")],
)
def test_values_as_they_are_typed(value, typed):
    assert harness.as_typed(value) == typed


VIEWS = SimpleNamespace(size=48, scale=(0.2, 1.0), hue=0.1, blur=(0.1, 2.0))
TRAINING = SimpleNamespace(
    batch=8, lr=0.1, workers=0, log_every=1, save_every=1, seed=0, epochs=3, views=VIEWS,
    keep=(1, 3), value_range=None, warn_after=60.0, give_up_after=600.0, collective_timeout=None,
)  # fmt: skip


def test_what_is_allowed_passes():
    harness.check_training(TRAINING)
    others = {
        name: x for name, x in vars(TRAINING).items() if name not in ("epochs", "keep", "views")
    }
    harness.check_training(SimpleNamespace(**others))  # a recipe that counts steps, without views
    edges = {"hue": 0.0, "scale": (1.0, 1.0), "size": 1, "blur": (0.0, 0.1)}
    harness.check_view_options(SimpleNamespace(**edges))


nan = float("nan")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("batch", 1, "--batch is 1: give"),
        ("lr", -0.1, "--lr is -0.1: give"),
        ("lr", nan, "--lr is nan: give"),
        ("lr", float("inf"), "--lr is inf: give"),
        ("workers", -1, "--workers is -1: give"),
        ("log_every", 0, "--log-every is 0: give"),
        ("save_every", 0, "--save-every is 0: give"),
        ("seed", -1, "--seed is -1: give"),
        ("seed", 2**63, f"--seed is {2**63}: give"),
        ("epochs", 0, "--epochs is 0: give"),
        ("keep", (1, 0), "--keep is 1 0: give epochs from 1 to 3"),
        ("keep", (4,), "--keep is 4: give epochs from 1 to 3"),
        ("value_range", (1.0, 1.0), "--value-range is 1.0 1.0: give"),
        ("value_range", (0.0, nan), "--value-range is 0.0 nan: give"),
        ("value_range", (-float("inf"), 0.0), "--value-range is -inf 0.0: give"),
        ("warn_after", 0.0, "--warn-after is 0.0: give"),
        ("warn_after", nan, "--warn-after is nan: give"),
        ("give_up_after", 0.0, "--give-up-after is 0.0: give"),
        ("give_up_after", nan, "--give-up-after is nan: give"),
        ("collective_timeout", 0.0, "--collective-timeout is 0.0: give"),
        ("collective_timeout", 1e9, "--collective-timeout is 1000000000.0: give"),
        ("views.size", 0, "--views.size is 0: give"),
        ("views.scale", (1.0, 0.2), "--views.scale is 1.0 0.2: give"),
        ("views.scale", (0.0, 0.2), "--views.scale is 0.0 0.2: give"),
        ("views.scale", (0.2, 1.1), "--views.scale is 0.2 1.1: give"),
        ("views.scale", (nan, 1.0), "--views.scale is nan 1.0: give"),
        ("views.hue", 0.6, "--views.hue is 0.6: give"),
        ("views.hue", nan, "--views.hue is nan: give"),
        ("views.blur", (2.0, 0.1), "--views.blur is 2.0 0.1: give"),
        ("views.blur", (-0.1, 1.0), "--views.blur is -0.1 1.0: give"),
        ("views.blur", (0.1, float("inf")), "--views.blur is 0.1 inf: give"),
    ],
)
def test_each_wrong_option_has_a_sentence_of_its_own(name, value, sentence):
    values = dict(vars(TRAINING))
    if name.startswith("views."):
        views = {**vars(VIEWS), name.removeprefix("views."): value}
        values["views"] = SimpleNamespace(**views)
    else:
        values[name] = value
    with pytest.raises(harness.UserError) as error:
        harness.check_training(SimpleNamespace(**values))
    assert str(error.value).startswith(sentence)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


# ---- randomness ------------------------------------------------------------------------------

keys = st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=4).map(tuple)


def draw(key):
    return torch.rand(8, generator=harness.generator(*key)).tolist()


@given(keys, keys)
def test_streams_are_equal_only_for_equal_keys(first, second):
    assert (draw(first) == draw(second)) == (first == second)
    assert draw(first) == draw(first)


@pytest.mark.parametrize(
    ("first", "second"),
    [((1,), (1, 0)), ((0, 1), (1, 0)), ((1, 23), (12, 3)), ((0,), (2**32,)), ((1,), (-1,))],
)
def test_streams_of_neighboring_keys_differ(first, second):
    assert draw(first) != draw(second)


def test_streams_of_an_epoch_are_independent():
    values = torch.stack(
        [torch.randn(256, generator=harness.generator(0, 0, i)) for i in range(64)]
    )
    correlation = torch.corrcoef(values) - torch.eye(64)
    assert correlation.abs().max() < 0.35  # five standard deviations of 1 / 16, and a little


def test_seeded_leaves_the_global_stream_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with harness.seeded(1, 2):
        first = torch.rand(3)
        with contextlib.suppress(KilledError), harness.seeded(9):
            torch.rand(1)
            raise KilledError
        second = torch.rand(3)
    assert torch.equal(torch.rand(4), expected)
    with harness.seeded(1, 2):
        assert torch.equal(torch.cat([first, second]), torch.rand(6))
    with harness.seeded(1, 3):
        assert not torch.equal(first, torch.rand(3))


def test_a_step_draws_the_same_numbers_whenever_it_runs():
    def drawn(*key):
        harness.seed_step(*key)
        return torch.rand(4).tolist()

    with torch.random.fork_rng(devices=[]):
        first = drawn(7, 3, 0)
        torch.rand(9)
        assert drawn(7, 3, 0) == first
        others = [drawn(8, 3, 0), drawn(7, 4, 0), drawn(7, 3, 1), drawn(7, 3, 0, 1)]
        assert all(other != first for other in others)
        torch.manual_seed(harness.generator(7, 3, 0, 2).initial_seed())
        assert torch.rand(4).tolist() == first  # the losses of earlier versions depend on it


def drawn_by(rank, group):
    """The numbers of this process's images, of 8."""
    own = torch.arange(8)[rank :: group.size()]
    return own, harness.noise(harness.image_seeds(3, 5, own), (4, 2), 1)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_noise_of_an_image_is_the_same_on_any_number_of_processes(size):
    want = harness.noise(harness.image_seeds(3, 5, torch.arange(8)), (4, 2), 1)
    for own, numbers in on_gloo_processes(size, drawn_by):
        assert torch.equal(numbers, want[own])


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**7), st.permutations(range(6)))
def test_the_noise_of_an_image_does_not_depend_on_the_others(seed, step, order):
    seeds = harness.image_seeds(seed, step, torch.tensor(order))
    numbers = harness.noise(seeds, (3, 5))
    assert numbers.dtype == torch.float32
    assert ((numbers >= 0) & (numbers < 1)).all()
    for row, index in enumerate(order):
        alone = harness.image_seeds(seed, step, torch.tensor([index]))
        assert torch.equal(harness.noise(alone, (3, 5))[0], numbers[row])
    assert torch.equal(harness.noise(seeds, (15,)).unflatten(1, (3, 5)), numbers)
    assert harness.noise(seeds, (0, 2)).shape == (6, 0, 2)


def test_several_streams_of_noise_are_those_of_each_alone():
    seeds = harness.image_seeds(1, 2, torch.arange(3))
    shapes = {4: (2, 3), 0: (), 7: (0, 2), 1: (5,)}
    for stream, numbers in harness.noises(seeds, shapes).items():
        assert torch.equal(numbers, harness.noise(seeds, shapes[stream], stream))
        assert numbers.shape == (3, *shapes[stream])


@given(st.integers(0, 100))
def test_the_keys_of_a_bank_that_is_loaded_have_length_one(seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(6, 8, generator=generator) * 10 ** torch.linspace(-3, 3, 6)[:, None]
    of_old_run = dk.push_to_bank(dk.init_bank(8, 8), keys).features
    unit = dk.push_to_bank(dk.init_bank(8, 8), dk.l2_normalize(keys)).features
    torch.testing.assert_close(harness.unit_rows(of_old_run), unit)
    assert torch.equal(harness.unit_rows(unit), unit)  # bit by bit


def test_neighbors_in_every_part_of_the_key_have_independent_uniform_noise():
    n = 40_000
    few = torch.arange(200)
    by_index = harness.noise(harness.image_seeds(0, 0, torch.arange(n)), (1,))[:, 0]
    by_place = harness.noise(harness.image_seeds(0, 0, few[:1]), (n,))[0]
    by_step = torch.cat(
        [harness.noise(harness.image_seeds(0, k, few), (1,)) for k in range(200)], 1
    ).flatten()
    by_seed = torch.cat(
        [harness.noise(harness.image_seeds(k, 0, few), (1,)) for k in range(200)], 1
    ).flatten()
    seeds = harness.image_seeds(0, 0, few)
    by_stream = torch.cat([harness.noise(seeds, (1,), k) for k in range(200)], 1).flatten()
    for numbers in (by_index, by_place, by_step, by_seed, by_stream):
        expected = torch.arange(1, n + 1) / n
        distance = (numbers.sort().values - expected).abs().max()
        assert distance < 1.95 / n**0.5  # Kolmogorov and Smirnov, at a level of 0.1 %
        for lag in (1, 2, 200):
            pairs = torch.stack([numbers[:-lag], numbers[lag:]])
            assert pairs.corrcoef()[0, 1].abs() < 3.3 / n**0.5


def test_each_bit_of_a_seed_flips_half_of_the_bits_of_the_noise():
    seeds = harness.image_seeds(0, 0, torch.arange(2000))
    before = (harness.noise(seeds, (1,))[:, 0] * 2**24).int()
    place = torch.arange(24)
    for bit in range(64):
        other = seeds ^ (-(2**63) if bit == 63 else 2**bit)
        after = (harness.noise(other, (1,))[:, 0] * 2**24).int()
        flips = ((before ^ after)[:, None] >> place & 1).double().mean(0)
        assert ((flips - 0.5).abs() < 0.06).all()  # five standard deviations


def test_the_noise_is_that_of_the_published_generator():
    """SplitMix64 in Python's integers, which have no end."""

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    seeds = harness.image_seeds(1, 2, torch.tensor([0, 7, 2**40]))
    got = harness.noise(seeds, (3,), 2)
    for row, seed in zip(got.tolist(), seeds.tolist(), strict=True):
        of_stream = mix((seed + 2 * 0x9E3779B97F4A7C15) % 2**64)
        want = [mix((of_stream + place * 0x9E3779B9) % 2**64) for place in range(3)]
        assert row == [(x >> 40) / 2**24 for x in want]


@pytest.mark.slow
def test_the_noise_is_the_same_when_compiled():
    seeds = harness.image_seeds(4, 9, torch.arange(33))
    compiled = torch.compile(harness.noise, fullgraph=True)
    assert torch.equal(compiled(seeds, (5, 3), 2), harness.noise(seeds, (5, 3), 2))


# ---- batches ---------------------------------------------------------------------------------


class Indices:
    """A dataset whose items are the epoch and the index."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        return torch.tensor(key[0]), torch.tensor(key[1])


def dealt(count, batch, size, start, stop, seed=0):
    """For each process, the epoch and the indices of each batch."""
    shares = []
    for rank in range(size):
        world = harness.World(rank, size, CPU)
        share = []
        for epochs, indices in harness.batches(
            Indices(count), batch, world, seed=seed, start=start, stop=stop
        ):
            (epoch,) = set(epochs.tolist())
            share.append((epoch, indices.tolist()))
        shares.append(share)
    return shares


@given(st.integers(1, 4), st.integers(2, 4), st.integers(1, 5), st.integers(0, 15), st.data())
def test_each_epoch_deals_each_image_once(size, each, whole, rest, data):
    batch = each * size
    count = batch * whole + rest % batch
    assert harness.batches_per_epoch(count, batch, harness.World(0, size, CPU)) == whole
    shares = dealt(count, batch, size, 0, 2 * whole)
    for share in shares:
        assert [epoch for epoch, _ in share] == [0] * whole + [1] * whole
        assert {len(indices) for _, indices in share} == {each}
    for epoch in (0, 1):
        steps = slice(epoch * whole, (epoch + 1) * whole)
        seen = [index for share in shares for _, indices in share[steps] for index in indices]
        assert len(seen) == len(set(seen)) == batch * whole
        assert set(seen) <= set(range(count))
    # the same images at each step as one process with the whole batch would take
    together = [sorted(chain(*(i for _, i in parts))) for parts in zip(*shares, strict=True)]
    assert together == [sorted(i) for _, i in dealt(count, batch, 1, 0, 2 * whole)[0]]
    start = data.draw(st.integers(0, 2 * whole), label="start")
    stop = data.draw(st.integers(start, 2 * whole), label="stop")
    assert dealt(count, batch, size, start, stop) == [share[start:stop] for share in shares]


def test_order_depends_on_seed_and_epoch():
    first, second = dealt(50, 5, 1, 0, 20)[0], dealt(50, 5, 1, 0, 20, seed=1)[0]
    orders = [[i for _, i in run[at : at + 10]] for run in (first, second) for at in (0, 10)]
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])
    assert first == dealt(50, 5, 1, 0, 20)[0]
    assert list(chain(*orders[0])) != [*range(50)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_same_whatever_the_workers(workers):
    """Steps 7 to 13 with 5 steps in an epoch: from the midst of epoch 1 to that of epoch 2."""
    dataset, options = Noise(23), {"seed": 1, "start": 7, "stop": 13}
    torch.manual_seed(0)
    made = list(harness.batches(dataset, 4, ALONE, workers=workers, **options))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))  # the loader took nothing from the global stream
    assert len(made) == 6
    for step, (keys, values) in enumerate(made, 7):
        assert keys[:, 0].tolist() == [step // 5] * 4
        for key, value in zip(keys.tolist(), values, strict=True):
            assert torch.equal(value, Noise(23)[key][1])
    if workers == 0:
        assert len(dataset.read) == 6 * 4  # the images before the start were not loaded
    whole = list(harness.batches(Noise(23), 4, ALONE, seed=1, start=0, stop=13))[7:]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(made, whole, strict=True))


@pytest.mark.parametrize(("size", "workers", "images_per_item"), [(1, 2, 3), (2, 1, 1), (4, 0, 8)])
def test_what_is_drawn_for_an_image_belongs_to_it_alone(
    size, workers, images_per_item, monkeypatch
):
    """By hashes: not to the process, the worker, or the images that are made together."""

    def hashes(size, workers):
        drawn = {}
        for rank in range(size):
            world = harness.World(rank, size, CPU)
            options = {"seed": 1, "start": 1, "stop": 5, "workers": workers}
            for keys, values in harness.batches(Noise(26), 8, world, **options):
                for key, value in zip(keys.tolist(), values, strict=True):
                    drawn[tuple(key)] = hashlib.sha256(value.numpy().tobytes()).hexdigest()
        return drawn

    expected = hashes(1, 0)
    assert len(set(expected.values())) == 4 * 8
    monkeypatch.setattr(harness, "IMAGES_PER_ITEM", images_per_item)
    assert hashes(size, workers) == expected


def test_one_group_of_loader_processes_works_over_all_epochs():
    class Processes(Indices):
        def __getitem__(self, key):
            return torch.tensor([key[0], os.getpid()]), torch.tensor(key[1])

    options = {"seed": 0, "start": 0, "stop": 12, "workers": 2}
    made = [batch[0] for batch in harness.batches(Processes(8), 4, ALONE, **options)]
    epochs, processes = torch.cat(made).unbind(1)
    assert epochs.unique().tolist() == [*range(6)]
    assert len(processes.unique()) == 2
    assert os.getpid() not in processes


def test_the_keys_of_a_long_training_are_dealt_as_they_are_needed():
    keys = harness.image_keys(100, 10, ALONE, seed=0, start=7, stop=10**12)
    assert [key[0] for key in next(keys)] == [0] * 10


@given(st.integers(1, 2048), st.integers(0, 32))
def test_a_plan_of_the_loader_is_two_batches_ahead_and_little_more(images, workers):
    plan = harness.plan_loader(images, workers)
    assert plan.images_per_item * (plan.items_per_batch - 1) < images
    assert images <= plan.images_per_item * plan.items_per_batch
    assert plan.items_per_batch <= 32
    if workers:
        waiting = workers * plan.items_per_worker * plan.images_per_item
        # Each worker may have two items, and the last item of a batch may be a smaller one.
        most = 2 * images + 3 * max(images, workers) + 64
        assert 2 * images <= waiting <= most
        assert min(workers, images) <= plan.items_per_batch * 8


def test_loader_processes_let_the_garbage_of_their_parent_be(monkeypatch):
    """A process group that is collected in a fork waits for ever for threads it does not have."""

    class Frozen(Indices):
        def __getitem__(self, key):
            return (torch.tensor([len(frozen), torch.get_num_threads()]),)

    frozen = []  # the tests freeze each of their forks: what counts is that the harness does too
    collector = SimpleNamespace(freeze=lambda: frozen.append(True))
    monkeypatch.setattr(harness, "gc", collector)
    options = {"seed": 0, "start": 0, "stop": 1, "workers": 1}
    ((found,),) = harness.batches(Frozen(2), 2, ALONE, **options)
    assert found.tolist() == [[1, 1]] * 2
    assert frozen == []


def test_a_batch_has_the_structure_of_its_items():
    class Records(Indices):
        def __getitem__(self, key):
            index = torch.tensor(key[1])
            names = [f"{key[1]}: broken"] * key[1]
            return Queue(torch.ones(2), index), names, (torch.zeros(3), index), [index.expand(key)]

    with pytest.raises(TypeError, match=r"An item is a tuple of tensors, .* holds 'a'"):
        harness.make_batch({(0, 1): ("a",)}, [1])
    batch = harness.make_batch(Records(4), [2, 0, 1], epoch=5)
    record, names, tensors, ragged = batch
    assert isinstance(record, Queue)
    assert record.bank.tolist() == [[1, 1]] * 3
    assert record.position.tolist() == [2, 0, 1]
    assert names == ["2: broken", "2: broken", "1: broken"]
    assert isinstance(tensors, list)
    assert tensors[0].shape == (3, 3)
    assert tensors[1].tolist() == [2, 0, 1]
    assert [x.shape for x in ragged] == [(5, 2), (5, 0), (5, 1)]


class Troubled(Indices):
    """The image 0 does not come: its loader process is in trouble."""

    def __init__(self, trouble):
        super().__init__(16)
        self.trouble = trouble

    def __getitem__(self, key):
        if key[1] == 0:
            getattr(self, self.trouble)()
        return (torch.zeros(1000),)

    def killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def stopped(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def waits(self):
        time.sleep(60)

    def lacks_shared_memory(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def train_in_trouble(trouble, workers, patience):
    def read(_):
        options = {"seed": 0, "start": 0, "stop": 8, "workers": workers, "patience": patience}
        for _ in harness.batches(Troubled(trouble), 2, ALONE, **options):
            pass

    sys.exit(harness.main(read, None))


@pytest.mark.parametrize("trouble", ["killed", "lacks_shared_memory"])
def test_a_loader_process_in_trouble_is_one_sentence(trouble, capfd):
    assert in_a_fork(train_in_trouble, trouble, 1, harness.PATIENCE) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: The loader has failed (")
    assert "/dev/shm" in error
    assert "--workers 0" in error
    assert error.count("\n") == 1


def break_off(error, worker):
    """In the main process: a tensor is fetched from a process which dies meanwhile."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch may well not be the first to say so
    threading.Timer(0.2, os.kill, (worker, signal.SIGKILL)).start()
    raise error


class BrokenOff:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        return break_off, (self.error, os.getpid())


class BreaksOff(Indices):
    def __init__(self, error):
        super().__init__(4)
        self.error = error

    def __getitem__(self, key):
        return ([BrokenOff(self.error)],)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), "[Errno 104] Connection reset"),
        (FileNotFoundError(2, "No such file or directory"), "[Errno 2] No such file"),
        (EOFError(), "EOFError)"),
        (RuntimeError("received 0 items of ancdata"), "received 0 items of ancdata)"),
    ],
)
def test_a_loader_process_that_dies_while_it_sends_is_one_sentence(error, reason, capfd):
    def read(_):
        list(harness.batches(BreaksOff(error), 2, ALONE, seed=0, start=0, stop=2, workers=2))

    assert in_a_fork(lambda: sys.exit(harness.main(read, None))) == 2
    message = capfd.readouterr().err
    assert message.startswith(f"error: The loader has failed ({reason}")
    assert message.count("\n") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_images_is_none_of_the_loader(workers, monkeypatch):
    class Broken(Indices):
        def __getitem__(self, key):
            raise OSError("no such image")

    monkeypatch.setattr(harness, "DYING", 0.1)
    with pytest.raises(OSError, match="no such image"):
        list(harness.batches(Broken(4), 2, ALONE, seed=0, start=0, stop=2, workers=workers))


@pytest.mark.parametrize(("trouble", "workers"), [("stopped", 1), ("waits", 1), ("waits", 0)])
def test_a_batch_that_does_not_come_is_warned_of_and_not_waited_for(trouble, workers, capfd):
    patience = harness.Patience(warn_after=0.5, give_up_after=1.5)
    assert in_a_fork(train_in_trouble, trouble, workers, patience) == 2
    warning, error = capfd.readouterr().err.splitlines()
    assert warning.startswith("warning: No batch of images has come for 0.5 seconds; after 1.5 ")
    assert error.startswith("error: No batch of images has come for 1.5 seconds (--give-up-after)")


def test_slow_is_not_stuck(capfd):
    """What goes on is neither warned of nor ended, however long it takes; inf waits for ever."""

    def go_on():
        with harness.Watch("Nothing has come", harness.Patience(1.2, 1.4)) as watch:
            for _ in range(15):
                time.sleep(0.1)
                watch.progress()
        for forever in (np.inf, 1e300):
            with harness.Watch("Nothing has come", harness.Patience(forever, forever)):
                time.sleep(0.01)

    assert in_a_fork(go_on) == 0
    assert capfd.readouterr().err == ""


def test_a_process_that_was_stopped_itself_has_not_waited(monkeypatch, capfd):
    """After Ctrl-Z and `fg`, a run goes on."""
    monkeypatch.setattr(harness, "STOPPED", 0.5)

    def wait_a_little():
        with harness.Watch("Nothing has come", harness.Patience(0.9, 1.0)):
            time.sleep(0.6)

    process = multiprocessing.get_context("fork").Process(target=wait_a_little)
    process.start()
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.2)
    os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    assert process.exitcode == 0
    assert capfd.readouterr().err == ""


def test_batch_larger_than_the_data():
    match = "--batch is 6: give at most 5, the number of images"
    with pytest.raises(harness.UserError, match=match):
        harness.batches_per_epoch(5, 6, ALONE)
    with pytest.raises(harness.UserError, match=match):
        next(harness.batches(Indices(5), 6, ALONE, seed=0, start=0, stop=1))


@pytest.mark.parametrize(("batch", "size"), [(0, 1), (1, 1), (2, 2), (9, 2), (7, 3)])
def test_batch_that_the_processes_cannot_share(batch, size):
    match = f"--batch is {batch}: give a multiple of the {size} processes"
    with pytest.raises(harness.UserError, match=match):
        harness.batches_per_epoch(100, batch, harness.World(0, size, CPU))


LONG = {f"a_term_with_a_long_name_{i}": i / 7 for i in range(30)}


@pytest.mark.parametrize("names", [[], ["short"], list(LONG)])
def test_the_progress_bar_has_a_hundred_columns(capsys, names):
    values = {"short": 1.5, **LONG, "loss": 123.456}
    bar = harness.progress(range(3), start=199_997, stop=200_000, world=ALONE)
    for _ in bar:
        harness.show(bar, values, names)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 100
    assert "200000/200000" in lines[-1]
    assert "loss=123" in lines[-1]
    assert ("short=1.5" in lines[-1]) == ("short" in names)


@pytest.mark.parametrize(("terminal", "columns"), [(60, 60), (150, 100), (0, 100)])
def test_the_progress_bar_fits_the_terminal(terminal, columns):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, terminal, 0, 0))

    def show():
        os.dup2(slave, 2)
        sys.stderr = os.fdopen(2, "w")
        bar = harness.progress(range(1), start=0, stop=1, world=ALONE)
        for _ in bar:
            harness.show(bar, LONG | {"loss": 0.5}, list(LONG))

    assert in_a_fork(show) == 0
    lines = re.split(r"[\r\n]+", os.read(master, 10**5).decode())
    os.close(slave)
    os.close(master)
    assert max(len(line) for line in lines) == columns


def test_the_progress_bar_shows_three_named_terms(capsys):
    values = dict.fromkeys(["a", "b", "c", "d", "loss"], 0.25)
    bar = harness.progress(range(2), start=0, stop=2, world=ALONE)
    for _ in bar:
        harness.show(bar, values, ["d", "unknown", "b", "a"])  # a term that begins late may lack
    last = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert "loss=0.25, d=0.25, b=0.25" in last
    assert "a=0.25" not in last


def test_one_process_alone_shows_progress(capsys):
    other = harness.World(1, 2, CPU)
    bar = harness.progress(range(3), start=0, stop=3, world=other)
    assert list(bar) == [0, 1, 2]
    harness.show(bar, {"loss": 1.0})
    assert capsys.readouterr().err == ""


# ---- images ----------------------------------------------------------------------------------


def picture(height=6, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_png(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed=seed)).save(path, "PNG")


def read(path):
    image = harness.read_image(path)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    assert image.permute(1, 2, 0).is_contiguous()  # the channels of a pixel side by side
    return image.permute(1, 2, 0).numpy()


def test_rgb_is_read_exactly(tmp_path):
    save_png(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), picture())


def test_grayscale_and_black_and_white(tmp_path):
    gray = picture()[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read(tmp_path / "gray.png"), np.stack([gray] * 3, -1))
    Image.fromarray(gray > 127).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read(tmp_path / "bits.png")[..., 1], (gray > 127) * 255)


def test_cmyk(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    red, green, blue = read(tmp_path / "red.jpg")[8, 8].astype(int)
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name):
    values = np.array([[0, 257, 1000, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    np.testing.assert_array_equal(read(tmp_path / name)[0, :, 0], [0, 1, 4, 128, 255])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float32([[0, 0.5, 1]]), [0, 128, 255]),
        (np.float32([[0, 10, 20]]), [0, 128, 255]),
        (np.float32([[-1, 0, 1]]), [0, 128, 255]),
        (np.float32([[np.nan, 0.2, np.inf]]), [0, 51, 255]),
        (np.int32([[0, 257, 65535]]), [0, 1, 255]),
        (np.int32([[0, 65535, 131070]]), [0, 128, 255]),
    ],
)
def test_float_and_wide_integer_tiffs(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "wide.tiff")
    np.testing.assert_array_equal(read(tmp_path / "wide.tiff")[0, :, 0], expected)


NUMPY_KINDS = {1: "u", 2: "i", 3: "f"}  # of TIFF's SampleFormat


def write_tiff(path, values, *, bits, sample_format, photometric=1, no_data=None):
    """A gray TIFF of one strip; values of 12 bits are packed, two in three bytes."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = pairs[:, 0] << 12 | pairs[:, 1]
        data = b"".join(int(x).to_bytes(3, "big") for x in packed)
    else:
        data = values.astype(f"<{NUMPY_KINDS[sample_format]}{bits // 8}").tobytes()
    text = f"{no_data}\0".encode()
    long, short, ascii_ = 4, 3, 2
    tags = [
        (256, long, 1, width), (257, long, 1, height), (258, short, 1, bits), (259, short, 1, 1),
        (262, short, 1, photometric), (273, long, 1, 8), (277, short, 1, 1),
        (278, long, 1, height), (279, long, 1, len(data)), (339, short, 1, sample_format),
    ]  # fmt: skip
    if no_data is not None:
        tags.append((42113, ascii_, len(text), 8 + len(data)))
    where = 8 + len(data) + len(text)
    rows = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    header = struct.pack("<2sHI", b"II", 42, where)
    directory = struct.pack("<H", len(tags)) + rows + struct.pack("<I", 0)
    path.write_bytes(header + data + text + directory)


@pytest.fixture
def unsaid():
    """As in a process that has said nothing yet."""
    harness._has_said[0] = 0
    yield
    harness._has_said[0] = 0


@pytest.mark.parametrize(
    ("bits", "sample_format", "photometric", "lowest"),
    [
        (8, 1, 1, 0), (8, 1, 0, 0), (8, 2, 1, -128), (8, 2, 1, 0), (12, 1, 1, 0), (16, 1, 1, 0),
        (16, 1, 0, 0), (16, 2, 1, -(2**15)), (16, 2, 1, 0),
    ],
)  # fmt: skip
def test_the_bits_and_the_sign_of_a_file_are_the_range(
    tmp_path, capfd, unsaid, bits, sample_format, photometric, lowest
):
    high = 2 ** (bits - (sample_format == 2)) - 1
    values = np.linspace(lowest, high, 64).round().reshape(4, 16)
    path = tmp_path / "a.tif"
    write_tiff(path, values, bits=bits, sample_format=sample_format, photometric=photometric)
    expected = (values - lowest) / (high - lowest) * 255
    if photometric == 0:  # white is zero
        expected = 255 - expected
    found = harness.read_image(path, value_range=(0.0, 9.0))[0]  # which is for other files
    np.testing.assert_array_less(abs(found.numpy() - expected), 0.51)
    assert capfd.readouterr().err == ""


@given(st.data())
def test_what_is_no_number_changes_no_other_pixel(data):
    """NaN, infinities, floats' largest values and GDAL's mark of pixels without data."""
    no_data = data.draw(st.sampled_from([None, -9999.0, 1e6, "nan", "nothing"]))
    marks = [np.nan, np.inf, -np.inf, *np.float32([-3.4028235e38, 3.4028235e38, 9.96921e36])]
    if isinstance(no_data, float):
        marks.append(no_data)
    numbers = st.floats(-100, 100, width=32)
    clean = np.array(data.draw(st.lists(numbers, min_size=2, max_size=12)))
    places = data.draw(st.lists(st.integers(0, len(clean) - 1), min_size=1, unique=True))
    dirty = clean.copy()
    for place in places:
        clean[place] = 0.0
        dirty[place] = data.draw(st.sampled_from(marks))
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for name, values in (("clean.tif", clean), ("dirty.tif", dirty)):
            path = Path(folder, name)
            write_tiff(path, values[None], bits=32, sample_format=3, no_data=no_data)
            found.append(harness.read_image(path)[0, 0].numpy())
    rest = np.setdiff1d(np.arange(len(clean)), places)
    np.testing.assert_array_equal(found[0][rest], found[1][rest])


@pytest.mark.parametrize(
    ("bits", "sample_format"), [(32, 1), (32, 2), (32, 3)], ids=["uint32", "int32", "float32"]
)
def test_a_range_that_no_file_tells_is_an_option_or_a_guess(
    tmp_path, capfd, unsaid, bits, sample_format
):
    path = tmp_path / "a.tif"
    values = np.array([[0, 50, 100, 200, 255, 300]])
    write_tiff(path, values, bits=bits, sample_format=sample_format)
    found = harness.read_image(path, value_range=(50, 255))[0, 0]
    assert found.tolist() == [0, 0, 62, 187, 255, 255]
    assert capfd.readouterr().err == ""
    write_tiff(path, values.clip(0, 255), bits=bits, sample_format=sample_format)
    assert harness.read_image(path)[0, 0].tolist() == values.clip(0, 255)[0].tolist()
    message = capfd.readouterr().err
    assert message.startswith(f"warning: {path} does not tell the range of its values: 0 to 255 ")
    assert "--value-range" in message
    assert message.count("\n") == 1


def test_large_unsigned_values_stay_unsigned(tmp_path):
    values = np.array([[0, 2**31, 2**32 - 1]])
    write_tiff(tmp_path / "a.tif", values, bits=32, sample_format=1)
    assert harness.read_image(tmp_path / "a.tif")[0, 0].tolist() == [0, 128, 255]


def test_a_guess_is_said_once_by_all_loader_processes(tmp_path, capfd, unsaid):
    for number in range(8):
        write_tiff(tmp_path / f"{number}.tif", np.ones((2, 2)), bits=32, sample_format=3)

    def read(**options):
        source = harness.FolderImages(tmp_path, **options)

        class Images(Indices):
            def __getitem__(self, key):
                return (source[key[1]][0],)

        loader = harness.batches(Images(8), 2, ALONE, seed=0, start=0, stop=4, workers=2)
        return {int(x) for (images,) in loader for x in images.unique()}

    assert read(value_range=(0.0, 2.0)) == {128}
    assert capfd.readouterr().err == ""
    assert read() == {255}
    assert capfd.readouterr().err.count("does not tell the range") == 1


def test_transparency_is_composited_on_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    expected = [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    np.testing.assert_array_equal(read(tmp_path / "rgba.png"), expected)
    Image.fromarray(np.array([[[90, 255], [90, 0]]], dtype=np.uint8)).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read(tmp_path / "la.png")[0], [[90] * 3, [255] * 3])
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png", transparency=1)
    np.testing.assert_array_equal(read(tmp_path / "p.png"), [[[10, 20, 30], [255] * 3]])


def test_palette(tmp_path):
    Image.fromarray(picture()).quantize(16).save(tmp_path / "p.gif")
    with Image.open(tmp_path / "p.gif") as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read(tmp_path / "p.gif"), expected)


def test_exif_orientation_is_applied(tmp_path):
    array = np.zeros((16, 32, 3), dtype=np.uint8)
    array[:, :16] = 255  # the left half as stored is the top half when turned to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(array).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = read(tmp_path / "turned.jpg")
    assert image.shape == (32, 16, 3)
    assert image[:14].min() > 240
    assert image[-14:].max() < 15


def test_any_tree_in_sorted_order(tmp_path):
    names = ["b/2.PNG", "b/1.jpeg", "a/deep/er/3.Jpg", "0.webp", "c.with.dots/x.tif"]
    for number, name in enumerate(names):
        save_png(tmp_path / "tree" / name, seed=number)
    skipped = [".hidden.png", ".cache/4.png", "notes.txt", "b/._1.png"]
    for name in skipped:
        save_png(tmp_path / "tree" / name)
    save_png(tmp_path / "elsewhere" / "5.png", seed=5)
    (tmp_path / "tree" / "linked").symlink_to(tmp_path / "elsewhere")
    source = harness.FolderImages(tmp_path / "tree")
    order = [3, 2, 1, 0, 4, 5]  # seeds of 0.webp, a/, b/1, b/2, c/, linked/
    assert len(source) == 6
    for index, seed in enumerate(order):
        image, unreadable = source[index]
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), picture(seed=seed))
        assert unreadable == ()
    assert len(list(source)) == 6  # iteration ends
    assert len(harness.FolderImages(str(tmp_path / "tree"))) == 6


@given(st.data())
def test_each_folder_is_listed_once_whatever_links_lead_to_it(data):
    """Trees of a few folders, inside and outside, with an image each and links to any of them."""
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root, "data"), Path(root, "elsewhere")]
        for folder in folders:
            folder.mkdir()
        for _ in range(data.draw(st.integers(0, 5))):
            parent = data.draw(st.sampled_from(folders))
            folder = parent / data.draw(st.sampled_from(["a", "b", "c"]))
            if not folder.exists():
                folder.mkdir()
                folders.append(folder)
        for folder in folders:
            (folder / "image.jpg").touch()
        reached = {x for x in folders if folders[0] in (x, *x.parents)}
        links = {}
        for number in range(data.draw(st.integers(0, 5))):
            link = data.draw(st.sampled_from(folders)) / f"link{number}"
            links[link] = data.draw(st.sampled_from([*folders, Path(root)]))
            link.symlink_to(links[link])
        while True:  # until no link leads to another folder
            ends = [end for link, end in links.items() if link.parent in reached]
            more = {x for x in [*folders, Path(root)] for end in ends if end in (x, *x.parents)}
            if more <= reached:
                break
            reached |= more

        names = harness.list_images(folders[0])
        real = [Path(folders[0], name).resolve().parent for name in names]
        assert sorted(real) == sorted(x.resolve() for x in reached if (x / "image.jpg").exists())
        assert names == sorted(names)
        own = [str(x.relative_to(folders[0]) / "image.jpg") for x in folders if folders[0] in
               (x, *x.parents)]  # fmt: skip
        assert set(own) <= set(names)  # by their own paths, not by those of links


def test_only_regular_files_are_images(tmp_path):
    save_png(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket.jpg"))
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "piped.jpg").symlink_to(tmp_path / "pipe.jpg")
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")

    def read():
        names = [os.fsdecode(x) for x in harness.FolderImages(tmp_path).names]
        assert names == ["a.png", "itself.jpg"]
        for name in ("pipe.jpg", "piped.jpg", "device.jpg", "socket.jpg", "itself.jpg"):
            source = harness.FolderImages(tmp_path, [name, "a.png"])
            ((reason,), named) = source[0][1], str(tmp_path / name)
            assert reason.startswith(f"{named}: ")

    assert in_a_fork(read) == 0


def test_a_listing_that_does_not_go_on_is_not_waited_for(tmp_path, capfd, monkeypatch):
    save_png(tmp_path / "a.png")
    monkeypatch.setattr(os, "scandir", lambda _: time.sleep(60))
    patience = harness.Patience(warn_after=0.2, give_up_after=0.6)
    assert in_a_fork(lambda: harness.FolderImages(tmp_path, patience=patience)) == 2
    warning, error = capfd.readouterr().err.splitlines()
    assert warning.startswith(f"warning: Listing the images below {tmp_path} has not gone on for ")
    assert error.startswith(f"error: Listing the images below {tmp_path} has not gone on for 0.6 ")


NAMES = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\n\0\ufeff"), min_size=1
)


@given(st.lists(NAMES), st.sampled_from([b"", codecs.BOM_UTF8]), st.sampled_from(["\n", "\r\n"]))
def test_a_newline_alone_ends_a_name_of_a_list(names, mark, newline):
    names = [*names, "line\u2028separator.png", "next\u0085line.png", "form\x0cfeed.png"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "list.txt")
        path.write_bytes(mark + newline.join(names).encode())
        assert harness.read_list(path) == names
        path.write_bytes(mark + newline.join(["", *names, "", ""]).encode())
        assert harness.read_list(path) == names
        assert [os.fsdecode(x) for x in harness.FolderImages(path).names] == names
        path.write_bytes(newline.join(names).encode("utf-16"))  # as some editors write it
        assert harness.read_list(path) == names


@pytest.mark.parametrize("content", [b"\xff\xfea\0b", b"\xfe\xff\0a\0", b"\xff\xfe\x00\xd8"])
def test_a_list_that_is_no_utf_16_is_one_sentence(tmp_path, content):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    match = rf"^The list {path} begins as UTF-16, but is none: .*\.$"
    with pytest.raises(harness.UserError, match=match):
        harness.FolderImages(path)


def test_a_list_or_names_choose_the_images_and_their_order(tmp_path):
    for seed, name in enumerate(("a.png", "b/c.png", os.fsdecode(b"d\xff.png"))):
        save_png(tmp_path / name, seed=seed)
    (tmp_path / "list.txt").write_bytes(b"d\xff.png\n\nb/c.png\n")
    listed = harness.image_source(tmp_path / "list.txt", scenes=0)
    named = harness.FolderImages(tmp_path, ["b/c.png"])
    both = harness.FolderImages(tmp_path / "list.txt", ["b/c.png"])
    for source, seeds in ((listed, [2, 1]), (named, [1]), (both, [1])):
        assert len(source) == len(seeds)
        for (image, _), seed in zip(source, seeds, strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), picture(seed=seed))
    gone = harness.FolderImages(tmp_path, ["gone.png", "a.png"])
    assert gone[0][1][0].startswith(f"{tmp_path / 'gone.png'}: ")


@pytest.fixture
def broken(tmp_path):
    """Good files 0, 2 and 9; everything that can be wrong between and after."""
    folder = tmp_path / "broken"
    folder.mkdir()
    Image.fromarray(picture(64, 64)).save(folder / "0.jpg")
    Image.fromarray(picture(64, 64, seed=2)).save(folder / "2.png")
    Image.fromarray(picture(64, 64, seed=9)).save(folder / "9.png")
    (folder / "1-truncated.jpg").write_bytes((folder / "0.jpg").read_bytes()[:1500])
    (folder / "3-truncated.png").write_bytes((folder / "2.png").read_bytes()[:3000])
    (folder / "4-empty.jpg").touch()
    (folder / "5-text.jpg").write_text("no image\n" * 20)
    (folder / "6-dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "7-folder.jpg").mkdir()  # no file, so nobody takes it for an image
    (folder / os.fsdecode(b"8-\xff.jpg")).write_bytes(b"\xff\xd8\xff\xe0")
    return folder


def test_unreadable_files_are_replaced_and_named(broken):
    source = harness.FolderImages(broken)
    assert len(source) == 9
    image, unreadable = source[1]
    assert torch.equal(image, source[2][0])
    assert len(unreadable) == 1
    assert unreadable[0].startswith(f"{broken / '1-truncated.jpg'}: ")
    image, unreadable = source[3]
    assert torch.equal(image, source[8][0])
    assert [name.split(": ")[0].rsplit("/", 1)[1][0] for name in unreadable] == [*"34568"]
    assert all(len(name.split(": ", 1)[1]) > 3 and "\n" not in name for name in unreadable)
    (broken / "9.png").write_bytes(b"")  # the last one wraps to the first
    assert torch.equal(source[8][0], source[0][0])


@given(
    st.booleans(),
    st.booleans(),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(1, 24),
    st.sampled_from(["bilinear", "bicubic"]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_a_crop_of_bytes_is_within_one_gray_level_of_the_exact_one(
    flip, vertical_flip, size, side, interpolation, is_whole, seed
):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8).movedim(-1, 0)
    corner, far = torch.rand(2, 2, generator=generator) * torch.tensor(size[::-1])
    box = torch.cat([corner.minimum(far), corner.maximum(far)])
    if is_whole:
        box = torch.cat([box[:2].floor(), box[2:].floor() + 1])
    view = dk.View(box, torch.tensor(flip), torch.tensor(vertical_flip))
    crop = crop_bytes(image, view, side, interpolation)
    exact = dk.crop_views(image / 255, view, side, interpolation=interpolation).clamp(0, 1) * 255
    assert crop.dtype == torch.uint8
    torch.testing.assert_close(crop.float(), exact, atol=1 + 1e-3, rtol=0)


def test_normalized_images_are_those_of_torchvision():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    pixels = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    found = harness.normalize_images(pixels, mean, std)
    torch.testing.assert_close(found, Normalize(mean, std)(pixels / 255), atol=1e-5, rtol=0)


def test_unnormalized_images_are_the_pictures_again():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    pictures = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = harness.unnormalize(Normalize(mean, std)(pictures), mean, std)
    torch.testing.assert_close(found, pictures)
    outside = harness.unnormalize(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1), mean, std)
    assert outside[0].unique().tolist() == [0]
    assert outside[1].unique().tolist() == [1]


def test_all_unreadable_is_one_sentence(tmp_path, capfd):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    source = harness.FolderImages(tmp_path)
    with pytest.raises(harness.UserError, match=rf"No image below {tmp_path} is readable"):
        source[1]

    class Source(Indices):
        def __getitem__(self, key):
            return (source[key[1]][0],)

    def read_in_a_worker(workers):
        next(harness.batches(Source(2), 2, ALONE, seed=0, start=0, stop=1, workers=workers))

    def command():
        sys.exit(harness.main(read_in_a_worker, 1))

    assert in_a_fork(command) == 2
    message = capfd.readouterr().err
    assert message.startswith(f"error: No image below {tmp_path} is readable")
    assert message.count("\n") == 1


def test_wrong_folders_are_one_sentence_each(tmp_path):
    with pytest.raises(harness.UserError, match=r"nowhere does not exist or is not a folder\.$"):
        harness.FolderImages(tmp_path / "nowhere")
    save_png(tmp_path / "a" / "file.png")
    with pytest.raises(harness.UserError, match=r"file\.png does not exist or is not a folder\.$"):
        harness.FolderImages(tmp_path / "a" / "file.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(harness.UserError, match=r"No image file .*notes\.txt"):
        harness.FolderImages(tmp_path / "empty" / "notes.txt")
    with pytest.raises(harness.UserError, match=r"No image file \(\.jpg .*\) lies below .*empty"):
        harness.FolderImages(tmp_path / "empty")


def note(world, folder, broken):
    with harness.Run(folder, Config(), world) as run:
        run.note_unreadable(())
        before = run.unreadable
        dist.barrier()  # or the last process may note files before the first one has looked
        if world.rank == world.size - 1:
            for index in (1, 3, 4, 1, 3):
                run.note_unreadable(harness.FolderImages(broken)[index][1])
        dist.barrier()
        run.note_unreadable(name for name in ())
        return before, run.unreadable


@pytest.mark.parametrize("size", [1, 2])
def test_unreadable_files_are_counted_and_named_once(tmp_path, broken, size):
    folder = tmp_path / "run"
    assert on_processes(size, tmp_path, note, folder, broken) == [(0, 6)] * size
    assert on_processes(1, tmp_path, note, folder, broken) == [(6, 6)]  # resumed
    lines = (folder / "unreadable.txt").read_bytes().splitlines()
    assert len(lines) == 6
    assert lines[0].startswith(bytes(broken / "1-truncated.jpg"))
    assert any(rb"8-\xff.jpg" in line for line in lines)  # escaped


def test_scenes_are_a_fixed_pool(monkeypatch):
    source = harness.image_source(None, scenes=70)
    assert len(source) == 70
    image, unreadable = source[69]
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.uint8
    assert unreadable == ()
    again = harness.image_source(None, scenes=70)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(source, again, strict=True))
    assert len({image.numpy().tobytes() for image, _ in source}) == 70  # the chunks differ too
    pixels = torch.stack([image for image, _ in source]).float()
    assert pixels.max() > 200  # in [0, 255], not in [0, 1]
    assert pixels.min() < 50
    asked = []

    def fake(count, size, *, generator):
        asked.append(count)
        return SimpleNamespace(images=torch.full((count, 3, *size), 0.5))

    monkeypatch.setattr(dk, "sample_scenes", fake)
    source = harness.image_source(None, scenes=130)
    assert source[0][0].unique().tolist() == [128]
    assert sum(asked) == 130
    assert max(asked) <= 64  # which bounds the memory


def test_source_is_a_folder_or_scenes(tmp_path):
    save_png(tmp_path / "a.png")
    assert len(harness.image_source(tmp_path, scenes=9)) == 1
    assert len(harness.image_source(tmp_path, scenes=0)) == 1
    with pytest.raises(harness.UserError, match="--data"):
        harness.image_source(None, scenes=0)


# ---- the result ------------------------------------------------------------------------------


def facts(path):
    return json.loads(path.with_suffix(".json").read_text())


def test_encoder_goes_into_torchvision_strictly(tmp_path):
    from torchvision.models import resnet18

    encoder = resnet18(num_classes=3)
    with torch.no_grad():
        for value in encoder.state_dict().values():
            value.copy_(torch.randint(0, 9, value.shape))
    expected = copy.deepcopy(encoder.state_dict())
    path = tmp_path / "encoder.safetensors"
    wrapped = torch.compile(encoder.to(memory_format=torch.channels_last))
    harness.save_encoder(
        path, wrapped, architecture="resnet18", mean=(0.5, 0.4, 0.3), std=[0.2, 0.2, 0.2],
        method="densesiam", step=7,
    )  # fmt: skip
    weights = load_file(path)
    resnet18(num_classes=3).load_state_dict(weights, strict=True)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    found = facts(path)
    assert found.pop("densekit")
    assert found == {
        "architecture": "resnet18", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2],
        "color_order": "RGB", "method": "densesiam", "step": 7,
    }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.json", "encoder.safetensors"]


def test_encoder_is_saved_in_single_precision_and_left_alone(tmp_path):
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(torch.bfloat16)
    options = {"architecture": "tiny", "mean": [0], "std": [1], "method": "none"}
    harness.save_encoder(tmp_path / "a.safetensors", encoder, **options)
    weights = load_file(tmp_path / "a.safetensors")
    assert {key: value.dtype for key, value in weights.items()} == {
        "0.weight": torch.float32, "0.bias": torch.float32, "1.weight": torch.float32,
        "1.bias": torch.float32, "1.running_mean": torch.float32, "1.running_var": torch.float32,
        "1.num_batches_tracked": torch.int64,
    }  # fmt: skip
    assert encoder[0].weight.dtype == torch.bfloat16
    assert torch.equal(weights["0.weight"], encoder[0].weight.float())


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    harness.write(tmp_path / "a", b"old")
    monkeypatch.setattr(Path, "replace", lambda *_: sys.exit(9))
    with pytest.raises(SystemExit):
        harness.write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
