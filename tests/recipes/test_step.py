"""The step of each training recipe never waits for the device.

Its own loop runs on fake tensors, which have shapes and no values: whatever reads a value raises.
"""

import contextlib
import importlib
import itertools
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import adapt
import croc
import d3ssl
import densesiam
import densesiam_segment
import dupr
import harness
import minimal
import picie
import pytest
import soco
import torch
import torch.distributed as dist
from downstream import health
from test_adapt import SMALL as ADAPT
from test_croc import SMALL as CROC
from test_d3ssl import SMALL as D3SSL
from test_densesiam import SMALL as DENSESIAM
from test_densesiam_segment import SMALL as SEGMENT
from test_dupr import SMALL as DUPR
from test_picie import SMALL as PICIE
from test_soco import SMALL as SOCO
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed import fake_pg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
RECIPES = {
    "adapt": (adapt, replace(ADAPT, method="neighbors", anchor=1.0)),
    "croc": (croc, CROC),
    "d3ssl": (d3ssl, D3SSL),
    "densesiam": (densesiam, DENSESIAM),
    "densesiam_segment": (densesiam_segment, SEGMENT),
    "dupr": (dupr, DUPR),
    "minimal": (minimal, minimal.Config(size=32, grid=3, batch=8, workers=0, device="cpu")),
    "picie": (picie, PICIE),
    "soco": (soco, replace(SOCO, optimizer="lars")),
}
STEPS = 4  # RegionSim begins with the third, and the last layers of CrOC's heads are free by then


class EndedError(Exception):
    """The test has seen enough."""


def own_lines():
    """The lines of recipes and of densekit that led here."""
    frames = traceback.extract_stack()
    own = [x for x in frames if "recipes/" in x.filename or "densekit/" in x.filename]
    return [
        f"{Path(x.filename).name}:{x.lineno} {x.line}" for x in own if "test_" not in x.filename
    ]


class Copies(TorchDispatchMode):
    """Notes each copy between devices that a host waits for."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_") and isinstance(result, torch.Tensor):
            source = args[0] if name == "_to_copy" else args[1]
            waits = not kwargs.get("non_blocking", False) and not (name == "copy_" and args[2:])
            if source.device.type != result.device.type and waits:
                self.waiting.append(own_lines())
        return result


def as_fake(mode, device):
    """A function that makes fake tensors on this device of those in a tree."""

    def convert(x):
        with mode:
            fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake

    return lambda tree: tree_map_only(torch.Tensor, convert, tree)


move = nn.Module.to


def stay(self, *arguments, **options):
    """Move a module, but not to a GPU that is not there."""
    is_real = str(arguments[0]) != "cuda"
    return move(self, *arguments, **options) if is_real else self


def convert_module(model, convert):
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = convert(tensor)


def slow(name):
    """A recipe whose loop D3SSL's shows in its own way."""
    return pytest.param(name, marks=pytest.mark.slow) if name == "soco" else name


@pytest.fixture(params=map(slow, RECIPES))
def fake_loop(request, monkeypatch, tmp_path):
    """`fake_loop(device)` runs the loop of a recipe on fake tensors.

    `fake_loop(device, wrap)` calls what `wrap` makes of the model. The model is built as ever, and
    becomes a fake one where the loop would hand it to DistributedDataParallel.
    """
    module, config = RECIPES[request.param]
    source_of = {
        "densesiam_segment": lambda: densesiam_segment.open_training(config),
        "d3ssl": lambda: d3ssl.image_source(None, None, scenes=16),
        "picie": lambda: picie.open_training(config),
        "soco": lambda: soco.image_source(None, None, scenes=16),
    }
    source = source_of.get(request.param, lambda: harness.image_source(None, scenes=16))()
    views = adapt.ManyViews if module is adapt else module.TwoViews
    dataset = views(source, config)
    world = harness.World(0, 1, torch.device("cpu"))
    load = partial(harness.batches, dataset, config.batch, world, seed=0, start=0, stop=1)
    batch = next(load())
    # The images as floats, as every recipe has them but the one that takes bytes.
    of_floats = batch if module is adapt else next(load(normalize=([0.5] * 3, [0.5] * 3)))
    mode = FakeTensorMode()
    with contextlib.ExitStack() as stack:

        def loop(device, wrap=lambda model: model):
            convert = as_fake(mode, device)

            @contextlib.contextmanager
            def process_group(*_, **__):
                yield harness.World(0, 1, torch.device(device))

            def make_fake(model):
                if not any(isinstance(x, FakeTensor) for x in model.parameters()):
                    convert_module(model, convert)
                    stack.enter_context(mode)
                return wrap(model)

            fake_batches = {False: convert(batch), True: convert(of_floats)}
            monkeypatch.setattr(harness, "process_group", process_group)
            monkeypatch.setattr(harness, "image_source", lambda *_, **__: source)
            monkeypatch.setattr(module, "image_source", lambda *_, **__: source, raising=False)
            monkeypatch.setattr(
                harness,
                "batches",
                lambda *_, normalize=None, **__: itertools.repeat(
                    fake_batches[normalize is not None], STEPS
                ),
            )
            monkeypatch.setattr(harness, "batches_per_epoch", lambda *_: STEPS // 2)
            monkeypatch.setattr(module, "evaluate", lambda *_: None, raising=False)
            monkeypatch.setattr(health.Monitor, "measure_all", lambda _: {})
            monkeypatch.setattr(module, "probe", lambda *_: 0.0, raising=False)
            # PiCIE makes its clusters at the end of an epoch, and D3SSL counts its regions.
            monkeypatch.setattr(module, "renew_clusters", lambda *_: {}, raising=False)
            monkeypatch.setattr(module, "check_regions", lambda *_: None, raising=False)
            monkeypatch.setattr(nn.Module, "to", stay)
            monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: None)
            monkeypatch.setattr(nn.parallel, "DistributedDataParallel", make_fake)
            changes = {"epochs": 2, "log_every": 10**6, "save_every": 10**6}
            module.train(replace(config, run=tmp_path / "run", **changes))

        dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=1)
        stack.callback(dist.destroy_process_group)
        yield loop


def test_a_step_reads_no_value(fake_loop, monkeypatch):
    """Forward, backward, clip, record, optimizer and teacher, until the values are read."""
    recorded = []
    record = harness.Run.record

    def note(self, step, terms):
        record(self, step, terms)
        recorded.append(step)

    def end(self):
        raise EndedError

    monkeypatch.setattr(harness.Run, "record", note)
    monkeypatch.setattr(harness.Run, "check", end)
    # AdamW counts its steps on the CPU, wherever the parameters are: nothing waits for that.
    adam = importlib.import_module("torch.optim.adam")  # the package hides it
    monkeypatch.setattr(adam, "_get_value", lambda x: 1.0)
    with pytest.raises(EndedError):
        fake_loop("cpu")
    assert recorded == list(range(STEPS))


# Older versions of torch ask for a driver, and end the process where there is none.
@pytest.mark.skipif(TORCH < (2, 15), reason="fake GPU tensors need a GPU in this version of torch")
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")
def test_a_forward_pass_on_a_gpu_mixes_no_devices_and_waits_for_no_copy(fake_loop):
    """A backward pass needs a real GPU."""
    copies = Copies()

    def end_after_forward(model):
        def forward(*arguments):
            with copies:
                outputs = model(*arguments)
            assert all(x.is_cuda for x in tree_leaves(outputs))
            raise EndedError

        return forward

    with pytest.raises(EndedError):
        fake_loop("cuda", end_after_forward)
    assert copies.waiting == [], "\n".join(map(str, copies.waiting))
