"""What a public function returns does not depend on its surroundings.

The rows are those of tests/test_contract.py, and of a few functions that take modules or numbers.
The columns:

* `autocast`, `default dtype`: no operation inside the call runs in bfloat16, which the caller's
  autocast or default dtype would ask for, in the backward pass neither;
* `inference`: inside inference mode, also on tensors that were made in it;
* `default device`: every tensor is on the arguments' device, whatever the default device is;
* `deterministic`: torch has a deterministic way for every operation, and no memory is used before
  it is written (torch fills it with NaN);
* `layout`: transposed, strided, expanded and channels-last arguments, and arguments that require
  gradients, give the same;
* `meta`: tensors without values give the shapes and dtypes of the result;
* `fake`: so do fake tensors on a GPU that is not there: no operation mixes devices, and no value
  is read.

`EXCEPT` says which functions cannot pass a column, and why.
"""

import contextlib
import inspect
import warnings

import pytest
import torch
from strategies import flips, uniform
from test_contract import TABLE, build, gradients, row
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
import densekit as dk

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])


def two_trees(batch, n, dtype, generator):
    return tuple({"w": uniform(generator, n, 3).to(dtype)} for _ in range(2))


def pictures(batch, n, dtype, generator):
    return (uniform(generator, n + 1, 3, 8, 8).to(torch.float32),)


def networks(images, call):
    """A call with a network whose weights do not depend on the default dtype, beside no other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = torch.nn.Conv2d(3, 4, 2, stride=2, dtype=images.dtype, device=images.device)
    return call(torch.nn.Sequential(model), images, ["0"])


def numbers(batch, n, dtype, generator):
    return ()


def scores(confusion):
    table = {"first": dk.confusion_scores(confusion)}
    return dk.as_dict(table), dk.as_table(table)


def checked(view):
    dk.check_views(view, (301, 299))
    return view


# Functions whose rows in the contract hold no call: they take modules or numbers.
MORE = [
    row("ema_update", two_trees, momentum=0.5, inplace=False),
    row("layer_features", pictures, call=lambda x: networks(x, dk.layer_features)),
    row("layer_bias", pictures, call=lambda x: networks(x, dk.layer_bias)),
    row("sample_scenes", numbers, count=2, size=(16, 20)),
    row(
        "probe_scenes",
        numbers,
        encode=lambda images: images[:, :, 4::8, 4::8].float(),
        count=2,
        size=(32, 32),
    ),
    row("as_dict", lambda *_: (torch.tensor([[3, 1], [1, 4]]),), call=scores),
    row("cosine_schedule", numbers, step=3, steps=10, start=1.0),
    row("linear_schedule", numbers, step=3, steps=10, start=1.0, end=0.0),
    row("warmup_cosine", numbers, step=3, steps=10, peak=1.0, warmup=2),
    # Sizes that bfloat16 cannot hold.
    row("full_view", numbers, size=(1001, 1003)),
    row("init_bank", numbers, size=3, dim=2, random=True),
    row("check_views", lambda *a: large_crops(*a)[1:], call=checked),
    row("crop_views", lambda *a: large_crops(*a), size=(301, 299)),
    row("boxes_to_mask", lambda *a: (large_crops(*a)[1].box[:, None],), size=(301, 299)),
    row("coordinate_map", lambda *a: large_crops(*a)[1:], size=(301, 2)),
    row(
        "view_from_torchvision",
        numbers,
        params={"top": 1001, "left": 1003, "height": 999, "width": 997},
    ),
    row(
        "view_from_albumentations",
        numbers,
        applied=[("Crop", {"shape": (2001, 2003, 3), "crop_coords": (1001, 1003, 1997, 1999)})],
    ),
    row("view_to_torchvision", lambda *_: (whole_pixels(),)),
    row("view_to_albumentations", lambda *_: (whole_pixels(),)),
    row("boundary_f_measure", lambda b, n, dtype, g: (flips(g, 299, 301), flips(g, 299, 301))),
]


def whole_pixels():
    return dk.View(torch.tensor([1001.0, 1003.0, 1997.0, 1999.0]), torch.tensor(False))


def large_crops(batch, n, dtype, generator):
    view = dk.sample_views((301, 299), (2,), generator=generator)
    return uniform(generator, 2, 1, 301, 299).to(dtype), view


WITHOUT_CALL = {
    "check_views",
    "ema_update",
    "layer_features",
    "layer_bias",
    "sample_scenes",
    "probe_scenes",
    "as_dict",
    "as_table",
    "view_from_torchvision",
    "view_from_albumentations",
    "view_to_torchvision",
    "view_to_albumentations",
    "cosine_schedule",
    "linear_schedule",
    "warmup_cosine",
}
ROWS = [entry for entry in TABLE if entry.name not in WITHOUT_CALL] + MORE
TRAINS = "it takes its own backward passes, which need a GPU"
VALUES = "it gives Python numbers"
OF_CALLER = "the model runs in the precision that its caller asks for"
EXCEPT = {
    "layer_features": {("autocast",): OF_CALLER},
    "layer_bias": {("autocast",): OF_CALLER},
    "sample_scenes": {("meta", "fake"): "takes no tensor"},
    "probe_scenes": {("meta", "fake"): "takes no tensor; its scenes are on the CPU"},
    "as_dict": {("meta", "fake"): VALUES},
    "cosine_schedule": {("meta", "fake"): VALUES},
    "linear_schedule": {("meta", "fake"): VALUES},
    "warmup_cosine": {("meta", "fake"): VALUES},
    "check_views": {("meta", "fake"): "it reads values"},
    "view_from_torchvision": {("meta", "fake"): "takes no tensor"},
    "view_from_albumentations": {("meta", "fake"): "takes no tensor"},
    "view_to_torchvision": {("meta", "fake"): VALUES},
    "view_to_albumentations": {("meta", "fake"): VALUES},
    "minibatch_kmeans": {("meta", "fake"): "it draws a seed, a Python number"},
    "match_clusters": {("meta", "fake"): "the assignment is scipy's"},
    "train_linear_probe": {("fake",): TRAINS},
    "fit_svm": {("meta",): "it stops where the loss no longer falls", ("fake",): TRAINS},
}


def without(entry, column):
    """Whether a row cannot pass a column."""
    if entry.call.keywords.get("many_to_one"):  # match_clusters without scipy
        return False
    return any(column in columns for columns in EXCEPT.get(entry.name, {}))


def cells(column=None):
    """The rows of a column, as pytest parameters."""
    seen, found = {}, []
    for entry in ROWS:
        seen[entry.name] = seen.get(entry.name, 0) + 1
        again = f"-{seen[entry.name]}" if seen[entry.name] > 1 else ""
        if not without(entry, column):
            found.append(pytest.param(entry, id=entry.name + again))
    return found


def arguments_of(entry, dtype=torch.float32):
    return build(entry, () if "batched" in entry.without else (2,), dtype=dtype)


def run(entry, arguments):
    """The function on the arguments, random numbers always the same and from the CPU."""
    torch.manual_seed(0)
    options = {}
    accepted = inspect.signature(entry.call).parameters
    if "generator" in accepted:
        options["generator"] = torch.Generator().manual_seed(0)
    if "device" in accepted and not tree_leaves(arguments):
        options["device"] = "cpu"
    return entry.call(*arguments, **options)


def same(got, want, what):
    """Equal up to the rounding of sums in another order, of the same dtypes and devices."""
    assert tree_flatten(got)[1] == tree_flatten(want)[1], what
    for one, other in zip(tree_leaves(got), tree_leaves(want), strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(
                one, other, rtol=1e-6, atol=1e-6, check_stride=False, msg=lambda m: f"{what}: {m}"
            )
        else:
            assert one == other, what


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class NoHalf(TorchDispatchMode):
    """Fails at the first operation whose result is in bfloat16."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        # What holds no number computes none: torch 2.8 makes such a tensor for a checkpoint.
        tensors = [x for x in tensors if x.numel()]
        assert all(x.dtype != torch.bfloat16 for x in tensors), f"{function} runs in bfloat16"
        return result


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def in_bfloat16():
    return default_dtype(torch.bfloat16)


def default_device():
    return torch.device("meta")


MODES = {
    "autocast": autocast,
    "default dtype": in_bfloat16,
    "inference": torch.inference_mode,
    "default device": default_device,
    "deterministic": deterministic,
}


def test_every_public_function_is_here():
    functions = {name for name in dk.__all__ if inspect.isfunction(getattr(dk, name))}
    assert {entry.name for entry in ROWS} | {"as_table"} == functions  # as_dict's row calls both


def test_reasons_name_functions_and_columns():
    columns = {*MODES, "layout", "meta", "fake"}
    assert set(EXCEPT) <= {entry.name for entry in ROWS}
    assert {column for reasons in EXCEPT.values() for key in reasons for column in key} <= columns


@pytest.mark.parametrize("entry", cells())
def test_the_surroundings_change_nothing(entry):
    arguments = arguments_of(entry)
    want = run(entry, arguments)
    for column, mode in MODES.items():
        if not without(entry, column):
            with mode():
                got = run(entry, arguments)
            same(got, want, column)


@pytest.mark.parametrize("entry", cells())
def test_no_operation_runs_in_the_precision_of_the_surroundings(entry):
    arguments = arguments_of(entry)
    for column in ("autocast", "default dtype"):
        if not without(entry, column):
            with MODES[column](), NoHalf():
                run(entry, arguments)
    if entry.smooth:
        grads = gradients(entry, arguments)

        def call(*arguments):
            with autocast(), in_bfloat16(), NoHalf():
                return entry.call(*arguments)

        same(gradients(entry, arguments, call), grads, "gradients")


@pytest.mark.parametrize("entry", cells())
def test_results_are_on_the_device_of_the_arguments(entry):
    arguments = arguments_of(entry)
    if tree_leaves(arguments):
        with default_device():  # random numbers from torch's own generator
            got = entry.call(*arguments)
        assert {x.device.type for x in tensors(got)} <= {"cpu"}


def strided(x):
    return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x


def channels_last(x):
    return x.movedim(-3, -1).contiguous().movedim(-1, -3) if x.ndim > 2 else x


def repeated(x):
    """The first of the batch for all, in the memory of one."""
    return x[:1].expand_as(x) if x.ndim and len(x) else x


def tracked(x):
    return x.clone().requires_grad_() if x.is_floating_point() else x


LAYOUTS = {
    "strided": strided,
    "transposed": transposed,
    "channels last": channels_last,
    "requires grad": tracked,
}


@pytest.mark.parametrize("entry", cells("layout"))
def test_the_layout_of_the_arguments_changes_nothing(entry):
    arguments = arguments_of(entry)
    want = run(entry, arguments)
    for name, layout in LAYOUTS.items():
        got = run(entry, tree_map(layout, arguments))
        got = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, got)
        same(got, want, name)
    expanded = tree_map(repeated, arguments)
    copied = tree_map(torch.clone, expanded)
    same(run(entry, expanded), run(entry, copied), "expanded")


def shapes(tree):
    return [(x.shape, x.dtype) for x in tensors(tree)]


@pytest.mark.parametrize("entry", cells("meta"))
def test_meta_tensors_give_shapes(entry):
    arguments = arguments_of(entry)
    want = shapes(run(entry, arguments))
    options = inspect.signature(entry.call).parameters
    if tree_leaves(arguments) or "device" not in options:
        got = entry.call(*tree_map(lambda x: x.to("meta"), arguments))
    else:
        got = entry.call(device="meta")
    assert shapes(got) == want
    assert all(x.is_meta for x in tree_leaves(got))


# Older versions of torch ask for a driver, and end the process where there is none.
@pytest.mark.skipif(TORCH < (2, 15), reason="fake GPU tensors need a GPU in this version of torch")
@pytest.mark.parametrize("entry", cells("fake"))
def test_fake_tensors_on_a_gpu_give_shapes_without_mixing_devices(entry):
    arguments = arguments_of(entry)
    want = shapes(run(entry, arguments))

    def fake(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    options = inspect.signature(entry.call).parameters
    with FakeTensorMode(), warnings.catch_warnings():
        if tree_leaves(arguments) or "device" not in options:
            got = entry.call(*tree_map(fake, arguments))
        else:
            got = entry.call(device="cuda")
    assert shapes(got) == want
    assert all(x.is_cuda for x in tree_leaves(got))
