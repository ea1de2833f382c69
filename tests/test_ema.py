"""The teacher's update against its formula, as a module or any tree, down to bfloat16."""

import copy
import math
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import on_processes
from strategies import generators, uniform
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from densekit import ema_update

# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def network(generator, dtype=torch.float64):
    """Layers with parameters and buffers, floating and whole, all of them random."""
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1, bias=False)).to(dtype)
    with torch.no_grad():
        for x in net.state_dict().values():
            x.copy_(uniform(generator, *x.shape, high=9.0))
    return net


def state(net):
    return copy.deepcopy(net.state_dict())


def buffer_names(net):
    return {name for name, _ in net.named_buffers()}


@given(generators(), st.floats(0, 1), st.sampled_from(["copy", "average", "keep"]))
def test_parameters_are_averaged_and_buffers_follow_the_choice(generator, momentum, buffers):
    teacher, student = network(generator), network(generator)
    old, new = state(teacher), state(student)
    assert ema_update(teacher, student, momentum=momentum, buffers=buffers) is teacher
    for name, got in teacher.state_dict().items():
        mean = momentum * old[name] + (1 - momentum) * new[name]
        if name in buffer_names(teacher):
            floating = got.is_floating_point()
            average = mean if floating else new[name]
            want = {"copy": new[name], "average": average, "keep": old[name]}[buffers]
        else:
            want = mean
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14, msg=name)
    for name, got in student.state_dict().items():
        assert torch.equal(got, new[name])


def test_buffers_are_copied_unless_asked_otherwise():
    generator = torch.Generator().manual_seed(0)
    teacher, student = network(generator), network(generator)
    ema_update(teacher, student, momentum=1.0)
    for name, got in teacher.named_buffers():
        assert torch.equal(got, student.get_buffer(name))


@pytest.mark.parametrize("momentum", [0, 1])
def test_the_ends_are_exact(momentum):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (network(generator, torch.float32) for _ in range(2))
    want = state((student, teacher)[momentum])
    ema_update(teacher, student, momentum=momentum, buffers=("copy", "keep")[momentum])
    for name, got in teacher.state_dict().items():
        assert torch.equal(got, want[name])


def test_many_steps_forget_the_start_geometrically():
    teacher, student = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()
    start = student.weight.item() - teacher.weight.item()
    for _ in range(10):
        ema_update(teacher, student, momentum=0.9)
    left = student.weight.item() - teacher.weight.item()
    assert left == pytest.approx(start * 0.9**10, rel=1e-12)


def test_the_update_is_in_place_and_outside_of_any_graph():
    generator = torch.Generator().manual_seed(0)
    teacher, student = network(generator), network(generator)
    before = [x.data_ptr() for x in teacher.state_dict().values()]
    ema_update(teacher, student, momentum=0.5)
    assert before == [x.data_ptr() for x in teacher.state_dict().values()]
    assert all(x.requires_grad and x.is_leaf for x in teacher.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_student_moves_a_single_precision_teacher(dtype):
    generator = torch.Generator().manual_seed(0)
    teacher, student = network(generator, torch.float32), network(generator, dtype)
    old = teacher[0].weight.clone()
    ema_update(teacher, student, momentum=0.996)
    want = 0.996 * old + 0.004 * student[0].weight.float()
    torch.testing.assert_close(teacher[0].weight, want, rtol=1e-6, atol=0)
    assert not torch.equal(teacher[0].weight, old)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.996, 1.0])
def test_a_half_precision_teacher_is_refused(dtype, momentum):
    teacher, student = nn.Linear(1, 1).to(dtype), nn.Linear(1, 1)
    for generator in (None, torch.Generator()) if dtype == torch.float16 else (None,):
        with pytest.raises(
            TypeError, match=rf"ema_update: the teacher is in {dtype}, where"
        ) as error:
            ema_update(teacher, student, momentum=momentum, generator=generator)
        assert f"an update of {1 - momentum:g} rounds to nothing" in str(error.value)


def test_modules_without_parameters_are_nothing_to_do():
    ema_update(nn.ReLU(), nn.ReLU(), momentum=0.5)


@pytest.mark.parametrize(
    ("student", "name"),
    [
        (nn.Sequential(nn.Linear(2, 3)), r"1\.bias"),
        (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False)), r"1\.bias"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), r"0\.weight"),
        (nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), r"1\.num_batches_tracked"),
    ],
)
def test_modules_that_do_not_correspond_are_refused(student, name):
    teacher = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match=f"ema_update: teacher and student differ in {name} of"):
        ema_update(teacher, student, momentum=0.5)


def test_modules_of_another_order_are_never_mixed_up():
    modules = {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}
    teacher = nn.ModuleDict(copy.deepcopy(modules))
    student = nn.ModuleDict(dict(reversed(copy.deepcopy(modules).items())))
    try:
        ema_update(teacher, student, momentum=0.0)
    except TypeError:
        return
    assert torch.equal(teacher["a"].weight, student["a"].weight)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_a_momentum_outside_the_unit_range_is_refused(momentum):
    with pytest.raises(ValueError, match=f"ema_update: momentum is {momentum}"):
        ema_update(nn.Linear(1, 1), nn.Linear(1, 1), momentum=momentum)


@pytest.mark.parametrize(
    ("student", "momentum", "problem"),
    [
        ({"a": torch.ones(2), "b": torch.ones(3), "n": torch.ones(1).long()}, 0.5, "rounds to"),
        ({"a": torch.ones(2), "b": torch.ones(4), "n": torch.ones(1).long()}, 0.5, "differ in"),
        ({"a": torch.ones(2), "b": torch.ones(3), "n": torch.ones(1).long()}, 1.5, "momentum is"),
    ],
)
def test_a_refused_update_changes_nothing(student, momentum, problem):
    dtypes = {"a": torch.float32, "b": torch.bfloat16, "n": torch.int64}
    teacher = {name: torch.zeros_like(x[:3], dtype=dtypes[name]) for name, x in student.items()}
    with pytest.raises((TypeError, ValueError), match=problem):
        ema_update(teacher, student, momentum=momentum)
    assert all((x == 0).all() for x in teacher.values())


def test_a_refused_update_of_a_module_changes_nothing():
    teacher, student = torch.nn.BatchNorm1d(3).bfloat16(), torch.nn.BatchNorm1d(3)
    student.running_mean.fill_(7.0)
    with pytest.raises(TypeError, match=r"rounds to nothing"):
        ema_update(teacher, student, momentum=0.99)
    assert (teacher.running_mean == 0).all()


# -------------------------------------------------------------------------------------- trees


class Pair(NamedTuple):
    """Two things."""

    first: Any
    second: Any


KINDS = (torch.float64, torch.float32, torch.int64, torch.bool, 3, "name", None)
KEYS = st.sampled_from(["a", "b", "a.b", "['a']", 0, 1])
LEAVES = st.tuples(st.sampled_from(KINDS), st.sampled_from([(), (0,), (2,), (2, 3)]))


def shapes_of_trees():
    """Nested dicts, lists, tuples and NamedTuples whose leaves are a kind and a shape."""
    leaf = st.builds(lambda pair: ("leaf", *pair), LEAVES)
    nodes = st.recursive(
        leaf,
        lambda node: st.one_of(
            st.tuples(st.just(dict), st.dictionaries(KEYS, node, max_size=3)),
            st.tuples(st.sampled_from([list, tuple]), st.lists(node, max_size=3)),
            st.tuples(st.just(Pair), st.tuples(node, node)),
        ),
        max_leaves=6,
    )
    return st.lists(nodes, max_size=3).map(lambda nodes: (list, nodes))


def tree_of(shape, generator):
    """Random tensors at the leaves."""
    kind, *rest = shape
    if kind == "leaf":
        dtype, size = rest
        if not isinstance(dtype, torch.dtype):
            return dtype
        return uniform(generator, *size, low=-3, high=3).to(dtype)
    if kind is dict:
        return {key: tree_of(node, generator) for key, node in rest[0].items()}
    parts = [tree_of(node, generator) for node in rest[0]]
    return Pair(*parts) if kind is Pair else kind(parts)


def walk(old, new, leaf):
    """The same tree with `leaf(old, new)` at its leaves."""
    if isinstance(old, dict):
        return {key: walk(old[key], new[key], leaf) for key in old}
    if isinstance(old, (list, tuple)):
        parts = [walk(x, y, leaf) for x, y in zip(old, new, strict=True)]
        return Pair(*parts) if isinstance(old, Pair) else type(old)(parts)
    return leaf(old, new)


def assert_same_tree(got, want, **close):
    def compare(one, other):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, **close)
        else:
            assert one == other

    walk(got, want, compare)


trees = pytest.mark.parametrize("buffers", ["copy", "average", "keep"])


@trees
@given(shape=shapes_of_trees(), momentum=st.floats(0, 1), generator=generators())
def test_every_leaf_of_a_tree_moves_and_the_tree_stays(buffers, shape, momentum, generator):
    teacher, student = (tree_of(shape, generator) for _ in range(2))
    old, new = copy.deepcopy(teacher), copy.deepcopy(student)

    def leaf(one, other):
        if not isinstance(one, torch.Tensor):
            return one
        if one.is_floating_point():
            return momentum * one + (1 - momentum) * other
        return one if buffers == "keep" else other

    want, close = walk(old, new, leaf), {"rtol": 1e-6, "atol": 1e-6}
    options = {"momentum": momentum, "buffers": buffers}
    got = ema_update(teacher, student, inplace=False, **options)
    assert_same_tree(got, want, **close)
    assert_same_tree(teacher, old, rtol=0, atol=0)
    pointers = [
        x.data_ptr() for x in torch.utils._pytree.tree_leaves(teacher) if hasattr(x, "dtype")
    ]
    assert ema_update(teacher, student, **options) is teacher
    assert_same_tree(teacher, want, **close)
    assert pointers == [
        x.data_ptr() for x in torch.utils._pytree.tree_leaves(teacher) if hasattr(x, "dtype")
    ]
    assert_same_tree(student, new, rtol=0, atol=0)
    # Another result is no part of the first.
    walk(got, got, lambda x, _: x.zero_() if isinstance(x, torch.Tensor) else x)
    assert_same_tree(teacher, want, **close)
    assert_same_tree(student, new, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_students_dtype_is_its_own(dtype):
    teacher, student = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.5], dtype=dtype)]
    (got,) = ema_update(teacher, student, momentum=0.75, inplace=False)
    assert got.dtype == torch.float32
    assert got.tolist() == [1.5, 1.625]


@pytest.mark.parametrize("inplace", [True, False])
def test_a_state_dict_moves_as_its_module_does(inplace):
    generator = torch.Generator().manual_seed(0)
    teacher, student = network(generator), network(generator)
    module = ema_update(copy.deepcopy(teacher), student, momentum=0.3, buffers="average")
    got = ema_update(teacher.state_dict(), student.state_dict(), momentum=0.3, inplace=inplace)
    assert type(got) is OrderedDict
    for name, want in module.state_dict().items():
        assert torch.equal(got[name], want), name
    if inplace:
        teacher.load_state_dict(module.state_dict())
    assert torch.equal(teacher[0].weight, got["0.weight"]) == inplace


@pytest.mark.parametrize(
    ("student", "name"),
    [
        ({"a": torch.zeros(1), "c": [torch.zeros(2)]}, r"\['b'\]"),
        ({"a": torch.zeros(2), "b": [torch.zeros(2)]}, r"\['a'\] of shape \([12],\)"),
        ({"a": torch.zeros(1), "b": []}, r"\['b'\]\[0\]"),
        ({"a": torch.zeros(1), "b": [torch.zeros(2), torch.zeros(2)]}, r"\['b'\]\[1\]"),
        ({"a": torch.zeros(1), "b": [2.0]}, r"\['b'\]\[0\]"),
        ({"a": torch.zeros(1), "b": torch.zeros(2)}, r"\['b'\]"),
        ([torch.zeros(1), [torch.zeros(2)]], r"\['a'\]"),
        (nn.Linear(1, 1), r"\['a'\]"),
    ],
)
def test_trees_that_do_not_correspond_are_refused(student, name):
    teacher = {"a": torch.zeros(1), "b": [torch.zeros(2)]}
    for inplace in (True, False):
        with pytest.raises(TypeError, match=f"ema_update: teacher and student differ in {name}"):
            ema_update(teacher, student, momentum=0.5, inplace=inplace)


def test_what_is_no_tree_is_refused():
    for teacher in (torch.zeros(1), None, iter([torch.zeros(1)])):
        with pytest.raises(TypeError, match="ema_update: argument 'teacher'"):
            ema_update(teacher, [torch.zeros(1)], momentum=0.5)


def test_a_module_inside_of_a_tree_is_never_passed_over_in_silence():
    teacher, student = {"net": nn.Linear(1, 1)}, {"net": nn.Linear(1, 1)}
    try:
        ema_update(teacher, student, momentum=0.0)
    except TypeError:
        return
    assert torch.equal(teacher["net"].weight, student["net"].weight)


# ------------------------------------------------------------------------- new tensors, tied ones


@given(generators(), st.sampled_from(["copy", "average", "keep"]))
def test_out_of_place_a_module_gives_what_a_functional_call_takes(generator, buffers):
    teacher, student = network(generator).eval(), network(generator)
    old, x = state(teacher), uniform(generator, 4, 2)
    got = ema_update(teacher, student, momentum=0.3, buffers=buffers, inplace=False)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, old[name])
    assert not any(value.requires_grad for value in got.values())
    y = torch.func.functional_call(teacher, got, (x,))
    ema_update(teacher, student, momentum=0.3, buffers=buffers)
    assert got.keys() == teacher.state_dict().keys()
    assert torch.equal(y, teacher(x))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.again = self.first

    def forward(self, x):
        return self.again(self.second(self.first(x)))


@pytest.mark.parametrize("kind", ["module", "state dict", "list"])
def test_tied_weights_move_once(kind):
    torch.manual_seed(0)
    teacher, student = Tied(), Tied()
    want = 0.75 * teacher.first.weight + 0.25 * student.first.weight
    as_kind = {
        "module": lambda net: net,
        "state dict": lambda net: net.state_dict(),
        "list": lambda net: [net.first.weight, net.second.weight],
    }[kind]
    ema_update(as_kind(teacher), as_kind(student), momentum=0.75)
    torch.testing.assert_close(teacher.first.weight, want)
    assert teacher.second.weight is teacher.first.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_out_of_place_are_what_a_functional_call_takes(dtype):
    torch.manual_seed(0)
    teacher, student, x = Tied().to(dtype), Tied(), torch.ones(1, 2, dtype=dtype)
    options = {"momentum": 0.75, "inplace": False}
    got = ema_update(teacher, student, generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(got["second.weight"], got["first.weight"])
    old, new = teacher.first.weight.float(), student.first.weight
    want = 0.75 * old + 0.25 * new
    torch.testing.assert_close(got["first.weight"].float(), want, rtol=2**-7, atol=0)
    torch.func.functional_call(teacher, got, (x,))


def test_tied_bfloat16_weights_move_once_and_alike():
    weight = torch.ones(1000, dtype=torch.bfloat16)
    teacher, student = [weight, weight], [torch.full((1000,), 1.5)] * 2
    ema_update(teacher, student, momentum=0.5, generator=torch.Generator())
    assert (weight == 1.25).all()


# ------------------------------------------------------------------------------------- bfloat16


def half_update(old, new, momentum, generator):
    (got,) = ema_update([old], [new], momentum=momentum, inplace=False, generator=generator)
    return got


@given(generators(), st.floats(0, 1), st.integers(-30, 30))
def test_a_bfloat16_teacher_moves_to_a_neighbor_of_the_mean(generator, momentum, exponent):
    old, new = uniform(generator, 2, 100, low=-1, dtype=torch.float32) * 2.0**exponent
    old = old.bfloat16()
    mean = torch.lerp(old.float(), new, 1 - momentum)
    nearest = mean.bfloat16()
    beyond = torch.where(nearest.float() < mean, torch.inf, -torch.inf).bfloat16()
    other = torch.where(nearest.float() == mean, nearest, torch.nextafter(nearest, beyond))
    got = half_update(old, new, momentum, generator)
    assert got.dtype == torch.bfloat16
    assert ((got == nearest) | (got == other)).all()


@pytest.mark.parametrize("old", [1.0, -1.0, 0.0, 3e-5, -1e30])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
def test_the_mean_over_many_updates_is_exact(old, share):
    old = torch.full((100_000,), old, dtype=torch.bfloat16)
    step = torch.nextafter(old, torch.full_like(old, torch.inf)).double() - old.double()
    new = (old.double() + 4 * share * step).float()
    mean = torch.lerp(old.float(), new, 0.25).double()[0]
    got = half_update(old, new, 0.75, torch.Generator().manual_seed(0)).double()
    unit = (got - got[0]).abs().max()  # between the two neighbors
    up = (mean - got.min()) / unit
    sigma = unit * (up * (1 - up) / len(got)).sqrt()
    assert len(got.unique()) == 2
    assert abs(got.mean() - mean) < 5 * sigma


def test_a_slow_bfloat16_teacher_arrives_where_rounding_to_nearest_stands_still():
    student, count, steps = torch.ones(500), 500, 3000
    teacher = [torch.zeros(count, dtype=torch.bfloat16)]
    rounded, generator = torch.zeros(count, dtype=torch.bfloat16), torch.Generator().manual_seed(0)
    for _ in range(steps):
        ema_update(teacher, [student], momentum=0.999, generator=generator)
        rounded = torch.lerp(rounded.float(), student, 1 - 0.999).bfloat16()
    want = 1 - 0.999**steps
    assert rounded.float().mean() < 0.3
    # Steps of at most 2^-8, each forgotten within 1000: a deviation of 0.05 at most for each.
    assert abs(teacher[0].float().mean() - want) < 5 * 0.05 / math.sqrt(count)


def test_a_bfloat16_teacher_that_is_its_student_stays_to_the_bit():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for momentum in (0.0, 0.3, 0.999, 1.0):
        got = half_update(every, every.float(), momentum, torch.Generator())
        finite = every.isfinite()
        assert torch.equal(got[finite], every[finite])
        assert not got[~finite].isfinite().any()


def test_nan_and_infinity_are_not_rounded_to_numbers():
    nan, inf = torch.nan, torch.inf
    old = torch.tensor([nan, inf, -inf, 1.0]).repeat(1000).bfloat16()
    new = torch.tensor([1.0, 1.0, 1.0, nan]).repeat(1000)
    got = half_update(old, new, 0.5, torch.Generator())
    want = torch.tensor([nan, inf, -inf, nan]).repeat(1000).bfloat16()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    # The last NaN of either sign, which a GPU gives: one step more in its bits would be a zero.
    last = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32).repeat(1000)
    got = half_update(torch.zeros(2000).bfloat16(), last, 0.5, torch.Generator())
    assert got.isnan().all()


def test_a_generator_decides_the_rounding():
    generator = torch.Generator().manual_seed(0)
    net, student = network(generator).bfloat16(), network(generator, torch.float32)
    results = []
    for seed in (1, 1, 2):
        teacher = copy.deepcopy(net)
        ema_update(teacher, student, momentum=0.6, generator=torch.Generator().manual_seed(seed))
        results.append(torch.cat([x.detach().flatten() for x in teacher.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    new = ema_update(
        net, student, momentum=0.6, generator=torch.Generator().manual_seed(1), inplace=False
    )
    flat = torch.cat([new[name].flatten() for name, _ in net.named_parameters()])
    assert torch.equal(flat, results[0])


@pytest.mark.parametrize("buffers", ["copy", "average", "keep"])
def test_the_buffers_of_a_bfloat16_teacher_follow_the_choice(buffers):
    generator = torch.Generator().manual_seed(0)
    teacher, student = network(generator).bfloat16(), network(generator, torch.float32)
    old, new = state(teacher), state(student)
    ema_update(teacher, student, momentum=0.5, buffers=buffers, generator=generator)
    for name, got in teacher.named_buffers():
        if buffers == "average" and got.is_floating_point():
            mean = (old[name].float() + new[name]) / 2
            assert ((got.float() - mean).abs() <= 2**-7 * mean.abs()).all()
        else:
            want = old if buffers == "keep" else new
            assert torch.equal(got, want[name].to(got.dtype))


def test_a_generator_changes_nothing_in_single_precision():
    teacher, student = [torch.rand(100)], [torch.rand(100)]
    want = ema_update(teacher, student, momentum=0.3, inplace=False)
    got = ema_update(teacher, student, momentum=0.3, inplace=False, generator=torch.Generator())
    assert torch.equal(got[0], want[0])


# --------------------------------------------------------------------------- one memory, many names


def same_memory(x, y):
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


VIEWS = {
    "transposed": lambda x: x.T,
    "a part": lambda x: x[:2],
    "another part": lambda x: x[1:],
    "a column": lambda x: x[:, 1],
    "flat": lambda x: x.view(-1),
    "detached": lambda x: x.detach(),
    "itself": lambda x: x,
    "shared with NumPy": lambda x: torch.from_numpy(x.detach().numpy()),
}


@given(st.lists(st.sampled_from([*VIEWS]), min_size=1, max_size=4), st.floats(0, 1), generators())
def test_each_number_in_memory_moves_once(views, momentum, generator):
    old, new = uniform(generator, 2, 3, 3, low=-1)
    want = ema_update([old], [new], momentum=momentum, inplace=False)[0]
    tree = [{"whole": x, **{name: VIEWS[name](x) for name in views}} for x in (old, new)]
    got = ema_update(*tree, momentum=momentum, inplace=False)
    for name in views:
        torch.testing.assert_close(got[name], VIEWS[name](want), rtol=0, atol=0)
    ema_update(*tree, momentum=momentum)
    assert torch.equal(old, want)


def test_new_tensors_share_memory_where_the_old_ones_did():
    weight = torch.zeros(2, 3)
    teacher = {"encoder": weight, "decoder": weight.T, "other": torch.zeros(2)}
    student = {"encoder": torch.ones(2, 3), "decoder": torch.ones(3, 2), "other": torch.ones(2)}
    got = ema_update(teacher, student, momentum=0.5, inplace=False)
    assert same_memory(got["encoder"], got["decoder"])
    assert not same_memory(got["encoder"], weight)
    assert got["decoder"].stride() == (1, 3)


def test_a_student_that_uses_the_teachers_memory_is_read_before_it_is_written():
    one, other = torch.zeros(2), torch.ones(2)
    ema_update([one, other], [other, one], momentum=0.0)
    assert one.tolist() == [1, 1]
    assert other.tolist() == [0, 0]


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
def test_new_tensors_are_made_within_vmap(axes):
    generator = torch.Generator().manual_seed(0)
    old, new = (uniform(generator, *(() if axis is None else (4,)), 3, 3) for axis in axes)

    def update(x, y):
        trees = [{"w": z, "again": z, "turned": [z.T]} for z in (x, y)]
        return ema_update(*trees, momentum=0.75, inplace=False)

    got = torch.func.vmap(update, axes)(old, new)
    want = torch.lerp(old, new, 0.25)
    for name, x in (("w", want), ("again", want), ("turned", want.mT)):
        torch.testing.assert_close(got[name][0] if name == "turned" else got[name], x)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_compiled_update_is_eager(inplace):
    torch._dynamo.reset()
    update = torch.compile(ema_update, fullgraph=True, backend="aot_eager")
    trees = [[torch.full((2,), x), torch.ones(1).long()] for x in (0.0, 1.0)]
    got = update(*trees, momentum=0.75, inplace=inplace)
    assert got[0].tolist() == [0.25, 0.25]
    assert trees[0][0].tolist() == ([0.25, 0.25] if inplace else [0, 0])


# ---------------------------------------------------------------------------------- sharded tensors


class Shared(nn.Module):
    """Layers of sizes that no number of processes divides, two of them with one weight."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.net[2].weight


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x.detach().clone()


def sharded_updates(rank, group, momentum):
    """What an update makes of sharded tensors and modules, next to that of plain ones."""
    mesh = init_device_mesh("cpu", (group.size(),))
    results = []

    def compare(teacher, student, shard):
        for inplace in (True, False):
            plain, other = copy.deepcopy(teacher), shard(teacher)
            want = ema_update(plain, student, momentum=momentum, inplace=inplace)
            got = ema_update(other, shard(student), momentum=momentum, inplace=inplace)
            for tree in (want, got):
                tree = tree.state_dict() if isinstance(tree, nn.Module) else tree
                results.append({name: full(x) for name, x in tree.items()})

    generator = torch.Generator().manual_seed(0)
    placements = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate(), "again": Shard(0)}
    teacher, student = ({name: uniform(generator, 3, 5) for name in placements} for _ in range(2))
    compare(
        teacher,
        student,
        lambda tree: {
            name: distribute_tensor(x.clone(), mesh, [placements[name]]) for name, x in tree.items()
        },
    )
    # Other placements of the student, and views of one tensor.
    one, two = (distribute_tensor(x["rows"].clone(), mesh, [Shard(0)]) for x in (teacher, student))
    moved = {"e": one, "d": one.T}
    ema_update(moved, {"e": two.redistribute(mesh, [Replicate()]), "d": two.T}, momentum=momentum)
    mean = ema_update([teacher["rows"]], [student["rows"]], momentum=momentum)[0]
    results.extend([{"e": mean, "d": mean.T}, {name: full(x) for name, x in moved.items()}])
    with pytest.raises(TypeError, match=r"\['d'\] is not sharded over the same devices"):
        ema_update(moved, {"e": two, "d": mean.T}, momentum=momentum)
    results.extend([{"e": mean}, {"e": full(one)}])
    torch.manual_seed(0)
    compare(Shared(), Shared(), lambda net: fully_shard(copy.deepcopy(net), mesh=mesh))
    return results


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_sharded_tensors_move_as_plain_ones_do(size, momentum):
    for results in on_processes(size, sharded_updates, momentum):
        assert len(results) == 12
        for want, got in zip(results[::2], results[1::2], strict=True):
            assert want.keys() == got.keys()
            for name, x in want.items():
                assert torch.equal(got[name], x), name


# -------------------------------------------------------------------------------- ends and extremes

NUMBERS = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e20, 0.0, -0.0, 1.0, -1e-40])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("inplace", [True, False])
def test_the_ends_copy_and_keep_whatever_the_values(dtype, inplace):
    pairs = torch.cartesian_prod(NUMBERS, NUMBERS).to(dtype)
    old, new = pairs.unbind(-1)
    generator = torch.Generator().manual_seed(0)
    for momentum, want in ((0.0, new), (1.0, old)):
        options = {"momentum": momentum, "inplace": inplace, "generator": generator}
        teacher = nn.ParameterList([old.clone()])
        got = ema_update(teacher, nn.ParameterList([new]), **options)
        got = got[0] if inplace else got["0"]
        torch.testing.assert_close(got.detach(), want, rtol=0, atol=0, equal_nan=True)


def test_the_example_of_an_overflowed_teacher():
    teacher = [torch.tensor([math.nan, math.inf, -3e38])]
    ema_update(teacher, [torch.tensor([1, 2, 3e38])], momentum=0.0)
    assert teacher[0].equal(torch.tensor([1, 2, 3e38]))


@given(st.floats(1e-6, 1 - 1e-6), st.sampled_from([False, True]))
def test_between_the_ends_the_mean_is_its_formula(momentum, fused):
    old, new = torch.cartesian_prod(NUMBERS, NUMBERS).unbind(-1)
    want = momentum * old.double() + (1 - momentum) * new.double()
    with pytest.MonkeyPatch.context() as patch:
        if fused:  # the way of tensors on a GPU
            patch.setattr("densekit.ema._is_fused", lambda x: True)
        results = [ema_update([old.clone()], [new], momentum=momentum)[0]]
    within = torch.func.vmap(lambda x, y: ema_update([x], [y], momentum=momentum, inplace=False))
    results += within(old, new)
    finite = want.isfinite()
    room = 2**-22 * torch.maximum(old.abs(), new.abs()).double() + 1e-44
    for got in results:
        assert ((got - want).abs() <= room)[finite].all()
        torch.testing.assert_close(got[~finite].double(), want[~finite], equal_nan=True)


@given(generators(), st.floats(0, 1), st.sampled_from([False, True]))
def test_the_fused_way_gives_what_the_other_one_gives(generator, momentum, fused):
    nets = [network(generator, torch.float32) for _ in range(2)]
    want = torch._foreach_lerp(
        [x.detach() for x in nets[0].parameters()], [*nets[1].parameters()], 1 - momentum
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("densekit.ema._is_fused", lambda x: fused)
        ema_update(*nets, momentum=momentum)
    assert all(map(torch.equal, nets[0].parameters(), want))


# ------------------------------------------------------------------------- all of it, or nothing


class Buffered(nn.Module):
    """A weight, and a buffer that an update may not be able to change."""

    def __init__(self, value, buffer):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.register_buffer("x", buffer)


def made_in_inference_mode():
    with torch.inference_mode():
        return torch.zeros(2)


OVERLAPPING = torch.zeros(9).as_strided((2, 3), (1, 1))
REFUSED = [
    (torch.arange(1.0).expand(4), torch.ones(4), "of the teacher is expanded"),
    (torch.arange(2).expand(3, 2), torch.ones(3, 2).long(), "of the teacher is expanded"),
    (OVERLAPPING, torch.ones(2, 3), "of the teacher is expanded"),
    (torch.zeros(2), torch.ones(2, device="meta"), "of the student is on the device 'meta'"),
    (torch.zeros(2, device="meta"), torch.ones(2), "of the teacher is on the device 'meta'"),
    (torch.zeros(2).to_sparse(), torch.ones(2), "has the layout torch.sparse_coo"),
    (torch.zeros(2), torch.ones(2).to_sparse(), "has the layout torch.sparse_coo"),
    (torch.zeros(2), torch.ones(2) + 1j, "is complex in the student"),
    (torch.zeros(2), torch.ones(3), r"of shape \([23],\)"),
    (nn.UninitializedBuffer(), torch.ones(2), "has no shape yet"),
    (made_in_inference_mode(), torch.ones(2), "of the teacher was made in inference mode"),
]


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize(("old", "new", "problem"), REFUSED)
def test_an_update_that_cannot_end_does_not_begin(old, new, problem, buffers):
    teacher, student = Buffered(0.0, old), Buffered(1.0, new)
    with pytest.raises(TypeError, match=rf"^densekit\.ema\.ema_update: .*\bx {problem}"):
        ema_update(teacher, student, momentum=0.5, buffers=buffers)
    assert (teacher.weight == 0).all()


def test_an_expanded_tensor_that_is_not_modified_is_no_problem():
    teacher, student = (Buffered(x, torch.arange(1.0).expand(4)) for x in (0.0, 1.0))
    for options in ({"inplace": False}, {"buffers": "keep"}):
        got = ema_update(teacher, student, momentum=0.5, **options)
        state = got if isinstance(got, dict) else got.state_dict()
        assert (state["weight"] == 0.5).all()
        assert torch.equal(state["x"], torch.zeros(4))


def test_a_teacher_of_inference_mode_moves_in_inference_mode():
    with torch.inference_mode():
        teacher = [torch.zeros(2)]
        ema_update(teacher, [torch.ones(2)], momentum=0.5)
        assert teacher[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_teacher_of_eight_bits_is_refused(dtype):
    teacher = [torch.zeros(2), torch.zeros(2).to(dtype)]
    with pytest.raises(TypeError, match=rf"the teacher is in {dtype}"):
        ema_update(teacher, [torch.ones(2)] * 2, momentum=0.5)
    assert (teacher[0] == 0).all()


@pytest.mark.parametrize("device", ["meta", "fake cpu", "fake cuda"])
@pytest.mark.parametrize("inplace", [True, False])
def test_without_values_shapes_come_out(device, inplace):
    with FakeTensorMode() if "fake" in device else torch.no_grad():
        try:
            weight = torch.zeros(2, 3, device=device.split()[-1])
            tree = [weight, weight.T, weight.clone(), torch.zeros_like(weight[0]).int()]
            student = [x.clone() for x in tree]
        except RuntimeError:
            pytest.skip("this torch asks for a driver")
        got = ema_update(tree, student, momentum=0.5, inplace=inplace)
    assert [x.shape for x in got] == [x.shape for x in tree]
    assert [x.device for x in got] == [x.device for x in tree]
