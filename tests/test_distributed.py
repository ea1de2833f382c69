"""Sums and maxima over real processes."""

import pytest
import torch
from hypothesis import given
from processes import on_processes
from strategies import tensors
from densekit import all_max, all_sum

# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.mark.parametrize("reduce", [all_sum, all_max], ids=lambda f: f.__name__)
@given(x=tensors((2, 3)))
def test_without_a_group_a_tensor_is_its_own_sum_and_maximum(reduce, x):
    x.requires_grad_()
    got = reduce(x)
    assert torch.equal(got, x)
    assert torch.equal(torch.autograd.grad(got.sum(), x)[0], torch.ones_like(x))


def reduced(rank, group, parts):
    x = parts[rank].clone().requires_grad_()
    results = []
    for reduce in (all_sum, all_max):
        result = reduce(x, group)
        results.append((result.detach(), result.requires_grad))
    return results, torch.equal(x, parts[rank])


def test_sums_and_maxima_over_processes():
    parts = torch.tensor([[[1.0, -5.0], [0.5, 2.0]], [[3.0, -7.0], [-0.5, 2.0]]])
    for (total, most), untouched in on_processes(2, reduced, parts):
        assert torch.equal(total[0], torch.tensor([[4.0, -12.0], [0.0, 4.0]]))
        assert torch.equal(most[0], torch.tensor([[3.0, -5.0], [0.5, 2.0]]))
        assert not total[1]
        assert not most[1]
        assert untouched


def test_a_group_of_one_is_this_process_alone():
    parts = torch.tensor([[[1.0, -5.0], [0.5, 2.0]]])
    ((results, _),) = on_processes(1, reduced, parts)
    assert all(torch.equal(x, parts[0]) for x, _ in results)


def transposed_on_one(rank, group, x):
    return all_sum(x if rank else x.mT.contiguous().mT, group)


def test_the_layout_in_memory_does_not_matter():
    x = torch.arange(6.0).view(2, 3)
    for total in on_processes(2, transposed_on_one, x):
        assert torch.equal(total, 2 * x)
