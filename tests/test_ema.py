"""The teacher's update against its formula, buffers, and modules that do not correspond."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generators, uniform
from torch import nn
from densekit import ema_update


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
    assert ema_update(teacher, student, momentum=momentum, buffers=buffers) is None
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
def test_a_half_precision_teacher_is_refused(dtype):
    teacher, student = nn.Linear(1, 1).to(dtype), nn.Linear(1, 1)
    with pytest.raises(TypeError, match=rf"ema_update: the teacher is in {dtype}.*0\.004"):
        ema_update(teacher, student, momentum=0.996)


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


def test_a_refused_update_changes_nothing():
    teacher, student = torch.nn.BatchNorm1d(3).bfloat16(), torch.nn.BatchNorm1d(3)
    student.running_mean.fill_(7.0)
    with pytest.raises(TypeError, match=r"rounds to nothing"):
        ema_update(teacher, student, momentum=0.99)
    assert (teacher.running_mean == 0).all()
