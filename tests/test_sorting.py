"""Differentiable sorting against a loop over comparisons, and what holds of every network."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, generators, tensors, uniform
from densekit import soft_sort

DATA = Path(__file__).parent / "data"
NETWORKS = ["bitonic", "odd_even"]
networks = pytest.mark.parametrize("network", NETWORKS)
CLOSE = {"rtol": 0, "atol": 1e-12}


@st.composite
def values(draw, least=0):
    return draw(tensors((*draw(batches()), draw(st.integers(least, 9)))))


def steepnesses():
    return st.floats(0.1, 1000)


def comparisons(n, network):
    """Pairs (smaller, larger), one after the other, as the networks are drawn."""
    if network == "odd_even":
        for layer in range(n):
            yield from ((i, i + 1) for i in range(layer % 2, n - 1, 2))
        return
    size = 1
    while size < n:
        size *= 2
    width = 2
    while width <= size:
        apart = width // 2
        while apart:
            for i in range(size):
                j = i + apart
                if i // apart % 2 == 0 and j < size and i >= size - n:
                    pair = (i, j) if i // width % 2 == 0 else (j, i)
                    yield tuple(wire - (size - n) for wire in pair)
            apart //= 2
        width *= 2


def slow_sort(row, steepness, network):
    """One set of values, one comparison after the other, in Python numbers."""
    x, n = [float(value) for value in row], len(row)
    plan = np.eye(n)
    for low, high in comparisons(n, network):
        share = 0.5 + math.atan(steepness * (x[high] - x[low])) / math.pi
        a, b = x[low], x[high]
        x[low], x[high] = share * a + (1 - share) * b, (1 - share) * a + share * b
        first, second = plan[:, low].copy(), plan[:, high].copy()
        plan[:, low] = share * first + (1 - share) * second
        plan[:, high] = (1 - share) * first + share * second
    return np.array(x), plan


@networks
@given(row=st.lists(st.floats(-2, 2), max_size=12), steepness=steepnesses())
def test_sorting_is_one_comparison_after_the_other(network, row, steepness):
    got = soft_sort(torch.tensor(row, dtype=torch.float64), steepness=steepness, network=network)
    want, plan = slow_sort(row, steepness, network)
    np.testing.assert_allclose(got.sorted.numpy(), want, rtol=0, atol=1e-11)
    np.testing.assert_allclose(got.plan.numpy(), plan, rtol=0, atol=1e-11)


@networks
@given(x=values(), steepness=steepnesses())
def test_a_plan_shares_each_value_and_each_rank(network, x, steepness):
    got = soft_sort(x, steepness=steepness, network=network)
    one = torch.ones_like(x)
    torch.testing.assert_close(got.plan.sum(-1), one, **CLOSE)
    torch.testing.assert_close(got.plan.sum(-2), one, **CLOSE)
    assert (got.plan >= 0).all()
    torch.testing.assert_close((x[..., None, :] @ got.plan)[..., 0, :], got.sorted, **CLOSE)
    torch.testing.assert_close(got.sorted.sum(-1), x.sum(-1), **CLOSE)


@networks
@given(x=values(), shift=st.floats(-10, 10), scale=st.floats(0.1, 10), steepness=steepnesses())
def test_a_shift_changes_nothing_and_a_scale_is_a_steepness(network, x, shift, scale, steepness):
    want = soft_sort(x, steepness=steepness, network=network)
    moved = soft_sort(x + shift, steepness=steepness, network=network)
    torch.testing.assert_close(moved.plan, want.plan, rtol=0, atol=1e-9)
    torch.testing.assert_close(moved.sorted, want.sorted + shift, rtol=0, atol=1e-9)
    scaled = soft_sort(scale * x, steepness=steepness / scale, network=network)
    torch.testing.assert_close(scaled.plan, want.plan, rtol=0, atol=1e-9)


@networks
@given(n=st.integers(0, 70), generator=generators(), top=st.sampled_from([1e12, math.inf]))
def test_a_steep_sort_sorts(network, n, generator, top):
    x = torch.randperm(n, generator=generator).double()
    got = soft_sort(x, steepness=top, network=network)
    torch.testing.assert_close(got.sorted, torch.arange(n).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(got.plan.argmax(-1) if n else x, x.long() if n else x)


@networks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_sorted_in_float32(network, dtype):
    x = uniform(torch.Generator().manual_seed(0), 5, 7).to(dtype)
    got = soft_sort(x, steepness=100.0, network=network)
    want = soft_sort(x.float(), steepness=100.0, network=network)
    assert torch.equal(got.plan, want.plan)
    assert got.plan.dtype == torch.float32


def test_a_steepness_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="steepness is 0; give one above 0"):
        soft_sort(torch.ones(3), steepness=0)


def test_a_steepness_may_be_learned():
    x = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    steepness = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_sort(x, steepness=s).plan, steepness)


@pytest.mark.parametrize("name", ["bitonic_n7_s100", "odd_even_n7_s10"])
def test_sorting_of_the_authors_program(name):
    golden = {k: torch.from_numpy(x) for k, x in np.load(DATA / f"softsort_{name}_0.npz").items()}
    x = golden["values"].requires_grad_()
    network, steepness = name.rsplit("_", 2)[0], golden["steepness"].item()
    got = soft_sort(x, steepness=steepness, network=network)
    (grad,) = torch.autograd.grad((got.plan * golden["weight"]).sum(), x)
    for one, other in ((got.sorted, "sorted"), (got.plan, "plan"), (grad, "grad_values")):
        torch.testing.assert_close(one, golden[other], rtol=1e-10, atol=1e-10)
