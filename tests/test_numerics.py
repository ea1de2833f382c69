"""Unit vectors and masked means against torch, and what the modules of densekit rely on."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from processes import on_processes
from strategies import batches, generators, sizes, tensors, uniform, valid_rows
from densekit import (
    coordinate_map,
    full_view,
    grid_points,
    l2_normalize,
    map_to_rows,
    masked_mean,
    rows_to_map,
    widen,
)
from densekit.numerics import full_precision, safe_divide, sample_uniform, take_rows

# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
HALVES = [torch.float16, torch.bfloat16]
halves = pytest.mark.parametrize("dtype", HALVES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mean_of_valid(values, valid):
    return values[valid].mean() if valid.any() else values.new_zeros(())


# ------------------------------------------------------------------------------ masked mean


@given(st.data())
def test_masked_mean_is_the_mean_of_the_valid(data):
    shape = data.draw(batches(), label="shape")
    values, valid = data.draw(tensors(shape)), data.draw(valid_rows(shape), label="valid")
    torch.testing.assert_close(masked_mean(values, valid), mean_of_valid(values, valid), **CLOSE)
    everything = values.mean() if values.numel() else values.sum()
    torch.testing.assert_close(masked_mean(values), everything, **CLOSE)


@given(st.data())
def test_one_valid_for_many_values_is_broadcast(data):
    values = data.draw(tensors((3, 4)), label="values")
    for shape in ((1, 4), (3, 1), (1, 1)):
        valid = data.draw(valid_rows(shape), label="valid")
        want = mean_of_valid(values, valid.expand(3, 4))
        torch.testing.assert_close(masked_mean(values, valid), want, **CLOSE)


def test_an_empty_mean_is_a_zero_with_a_graph():
    values = torch.full((3,), torch.nan, requires_grad=True)
    mean = masked_mean(values, torch.zeros(3, dtype=torch.bool))
    assert mean == 0
    assert torch.equal(torch.autograd.grad(mean, values)[0], torch.zeros(3))
    nothing = torch.zeros(0, requires_grad=True)
    assert torch.equal(torch.autograd.grad(masked_mean(nothing), nothing)[0], nothing)


@halves
def test_a_mean_of_many_half_values_does_not_overflow(dtype):
    values = torch.full((1000,), 1000.0, dtype=dtype)
    assert masked_mean(values) == 1000
    assert masked_mean(values, torch.ones(1000, dtype=torch.bool)).dtype == torch.float32


def test_valid_of_another_shape_is_refused():
    for bad in (torch.ones(2).bool(), torch.ones(3), torch.ones(2, 3).bool()):
        with pytest.raises(TypeError, match=r"masked_mean: argument 'valid'.*batch="):
            masked_mean(torch.zeros(3), bad)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.data())
def test_valid_with_an_axis_less_is_refused_and_the_advice_fits(shape, data):
    values = uniform(seeded(), *shape)
    first = data.draw(st.integers(0, len(shape) - 1), label="first")
    for kept in (shape[:first], shape[first + 1 :]):  # the first axes, as of images; the last ones
        valid = data.draw(valid_rows(kept), label="valid")
        with pytest.raises(TypeError, match=r"was given; use `valid\[.*\]`\.$") as error:
            masked_mean(values, valid)
        advice = re.search("`(.*)`", str(error.value))[1]
        masked_mean(values, eval(advice, {"valid": valid}))
        if kept == shape[:first]:  # preferred where both would fit, as of 64 images of 64 points
            assert advice == f"valid[{', '.join([':'] * first + ['None'] * (len(shape) - first))}]"


def test_valid_that_no_axis_would_help_gets_no_advice():
    with pytest.raises(TypeError, match=r"tensor of shape \(5,\) was given\.$"):
        masked_mean(torch.zeros(3, 4), torch.ones(5, dtype=torch.bool))


def mean_of_half(rank, group, dtype):
    values = torch.full((1000 * rank,), 1000.0, dtype=dtype)
    return masked_mean(values, group=group)


@halves
def test_half_values_of_several_processes_do_not_overflow(dtype):
    for mean in on_processes(2, mean_of_half, dtype):
        assert mean == 1000
        assert mean.dtype == torch.float32


# ---------------------------------------------------------------------------- normalization


@given(st.data())
def test_normalized_vectors_are_torchs(data):
    x = data.draw(tensors((*data.draw(batches()), data.draw(st.integers(1, 5)))), label="x")
    torch.testing.assert_close(l2_normalize(x), F.normalize(x, dim=-1), **CLOSE)


@given(st.data())
def test_length_is_one_at_any_scale(data):
    x = data.draw(tensors((3, 4), 0.5, 1.0, torch.float32), label="x")
    scale = 10.0 ** data.draw(st.integers(-18, 18), label="exponent")
    got = l2_normalize(x * scale)
    torch.testing.assert_close(got, l2_normalize(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(3), rtol=1e-5, atol=1e-6)


@given(st.data())
def test_vectors_whose_square_overflows_or_vanishes_stay_finite(data):
    x = data.draw(tensors((3, 4), 0.5, 1.0, torch.float32), label="x")
    exponent = data.draw(st.sampled_from([-38, -30, -22, 20, 30, 38]), label="exponent")
    x = (x * 10.0**exponent).requires_grad_()
    got = l2_normalize(x)
    assert got.isfinite().all()
    assert torch.autograd.grad(got.sum(), x)[0].isfinite().all()


def test_a_zero_vector_stays_zero_with_zero_gradient():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    got = l2_normalize(x)
    assert torch.equal(got[0], torch.zeros(2))
    (grad,) = torch.autograd.grad((got * got.new_tensor([1.0, 2.0])).sum(), x)
    assert torch.equal(grad[0], torch.zeros(2))
    assert (grad[1] != 0).all()


def test_vectors_without_components_are_normal():
    assert l2_normalize(torch.zeros(3, 0)).shape == (3, 0)


# ----------------------------------------------------------------------------- what modules share


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_only_half_precision_is_widened(dtype):
    x = torch.tensor([1.5, -2.0], dtype=dtype)
    got = widen(x)
    assert got.dtype == (torch.float32 if dtype in HALVES else dtype)
    assert torch.equal(got.to(dtype), x)
    assert dtype in HALVES or got is x


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@given(data=st.data())
def test_a_quotient_is_torchs_and_zero_where_the_divisor_is_zero(dtype, data):
    over, under = (data.draw(tensors((2, 5)), label=name).to(dtype) for name in ("over", "under"))
    under[0] = torch.tensor([0.0, -0.0, 1.0, -2.0, 0.0])
    over, under = over.requires_grad_(), under.requires_grad_()
    got = safe_divide(over, under)
    zero = under == 0
    want = torch.where(zero, 0.0, over / torch.where(zero, 1.0, under))
    assert torch.equal(got, want)
    assert got.dtype == dtype
    grads = torch.autograd.grad(got.sum(), (over, under))
    assert all((grad[zero] == 0).all() for grad in grads)
    wanted = torch.autograd.grad(want.sum(), (over, under))
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-2 if dtype in HALVES else 1e-6, atol=0)


def test_a_quotient_has_finite_second_derivatives():
    over = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    under = torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(safe_divide(over, under).sum(), (over, under), create_graph=True)
    second = torch.autograd.grad(sum(x.sum() for x in first), (over, under))
    assert [x.tolist() for x in second] == [[0, 0, -1 / 16], [0, 0, -1 / 16 + 2 * 2 / 64]]


def test_full_precision_is_not_rounded_under_autocast():
    x = torch.tensor([[1.0, 2.0**-12]])
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x.mT).dtype == torch.bfloat16
        with full_precision(x):
            assert (x @ x.mT).dtype == torch.float32


@given(batches(), st.integers(1, 5), st.integers(0, 4), generators())
def test_rows_are_those_of_a_loop(batch, n, count, generator):
    table = uniform(generator, *batch, n, 3)
    rows = torch.randint(n, (*batch, count), generator=generator)
    got = take_rows(table, rows)
    assert got.shape == (*batch, count, 3)
    for index in np.ndindex(*batch):
        assert torch.equal(got[index], table[index][rows[index]])


@halves
def test_half_precision_draws_the_numbers_of_float32(dtype):
    half, single = (
        sample_uniform((5, 2), torch.zeros(3, dtype=d), generator=seeded(1))
        for d in (dtype, torch.float32)
    )
    assert half.dtype == torch.float32
    assert torch.equal(half, single)
    assert ((half >= 0) & (half < 1)).all()


# ------------------------------------------------------------------------------ rows of maps


@given(st.data())
def test_a_row_for_each_cell_and_back(data):
    batch, size = data.draw(batches(), label="batch"), data.draw(sizes(0, 4), label="size")
    maps = data.draw(tensors((*batch, data.draw(st.integers(0, 3)), *size)))
    rows = map_to_rows(maps)
    assert rows.shape == (*batch, size[0] * size[1], maps.shape[-3])
    for i in range(size[0]):
        for j in range(size[1]):
            assert torch.equal(rows[..., i * size[1] + j, :], maps[..., i, j])
    assert torch.equal(rows_to_map(rows, size), maps)


@given(batches(), sizes(), generators())
def test_a_map_of_coordinates_becomes_the_grid_of_points(batch, size, generator):
    view = full_view((1, 1), batch)
    maps = coordinate_map(view, size).movedim(-1, -3)
    assert torch.equal(map_to_rows(maps), grid_points(view.box, size))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_maps_of_any_dtype_become_rows(dtype):
    maps = torch.ones(2, 3, 4, 5).to(dtype)
    assert map_to_rows(maps).dtype == rows_to_map(map_to_rows(maps), (4, 5)).dtype == dtype


def test_a_number_is_a_square_map():
    assert torch.equal(rows_to_map(torch.eye(9), 3), rows_to_map(torch.eye(9), (3, 3)))


@pytest.mark.parametrize("size", [(2, 3), (5, 2), (12, 0), (-3, -4), (1, 1)])
def test_rows_that_fill_no_map_of_this_size_are_refused(size):
    with pytest.raises(ValueError, match=r"rows_to_map: size is \(.*but there are 12 rows; give"):
        rows_to_map(torch.zeros(2, 12, 3), size)
