"""Collectives over real processes: values, gradients, and one process that saw all the rows."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from processes import on_processes
from strategies import tensors, uniform
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from densekit import (
    Negatives,
    all_gather,
    all_max,
    all_mean,
    all_sum,
    info_nce,
    masked_mean,
    minibatch_kmeans,
    shuffle_batch,
    unshuffle_batch,
)

# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
processes = pytest.mark.parametrize("size", [1, 2, 4])
COUNTS = {1: [7], 2: [7, 0], 4: [2, 0, 4, 1]}
"""Rows on each process where their number differs: 7 of them, none on one of several."""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------- without a group


@pytest.mark.parametrize(
    "collective", [all_sum, all_mean, all_max, all_gather], ids=lambda f: f.__name__
)
@given(x=tensors((2, 3)))
def test_without_a_group_a_tensor_is_its_own_result(collective, x):
    x.requires_grad_()
    got = collective(x)
    assert torch.equal(got, x)
    assert torch.equal(torch.autograd.grad(got.sum(), x)[0], torch.ones_like(x))


def reduced(rank, group, parts):
    x = parts[rank].clone().requires_grad_()
    results = []
    for reduce in (all_sum, all_mean, all_max):
        result = reduce(x, group)
        results.append((result.detach(), result.requires_grad))
    return results, torch.equal(x, parts[rank])


def test_sums_means_and_maxima_over_processes():
    parts = torch.tensor([[[1.0, -5.0], [0.5, 2.0]], [[3.0, -7.0], [-0.5, 2.0]]])
    for (total, mean, most), untouched in on_processes(2, reduced, parts):
        assert torch.equal(total[0], torch.tensor([[4.0, -12.0], [0.0, 4.0]]))
        assert torch.equal(mean[0], total[0] / 2)
        assert torch.equal(most[0], torch.tensor([[3.0, -5.0], [0.5, 2.0]]))
        assert (total[1], mean[1], most[1]) == (True, True, False)
        assert untouched


def test_a_group_of_one_is_this_process_alone():
    parts = torch.tensor([[[1.0, -5.0], [0.5, 2.0]]])
    ((results, _),) = on_processes(1, reduced, parts)
    assert all(torch.equal(x, parts[0]) for x, _ in results)


def odd_layouts(rank, group, x):
    x = x if rank else x.mT.contiguous().mT
    results = [all_sum(x, group), all_gather(x, group)]
    slopes = []
    for collective in (all_sum, all_gather):
        y = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad(collective(y, group).sum(), y)[0])  # one number, expanded
    return results, slopes


def test_the_layout_in_memory_does_not_matter():
    x = torch.arange(6.0).view(2, 3)
    for (total, rows), slopes in on_processes(2, odd_layouts, x):
        assert torch.equal(total, 2 * x)
        assert torch.equal(rows, torch.cat([x, x]))
        assert all(torch.equal(slope, torch.full_like(x, 2.0)) for slope in slopes)


# ------------------------------------------------------------------------ values and gradients


def derivatives(result, leaf, weight, direction):
    """First and second derivatives of a weighted sum of cubes."""
    (slope,) = torch.autograd.grad((result**3 * weight).sum(), leaf, create_graph=True)
    (bend,) = torch.autograd.grad((slope * direction).sum(), leaf)
    return slope.detach(), bend


COLLECTIVES = {
    "sum": (all_sum, lambda parts: torch.stack(parts).sum(0)),
    "mean": (all_mean, lambda parts: torch.stack(parts).mean(0)),
    "gather": (all_gather, torch.cat),
    "ragged": (lambda x, group: all_gather(x, group, ragged=True), torch.cat),
}


def collected(rank, group, problems):
    results = {}
    for name, (parts, weights, directions) in problems.items():
        leaf = parts[rank].clone().requires_grad_()
        result = COLLECTIVES[name][0](leaf, group)
        found = derivatives(result, leaf, weights[rank], directions[rank])
        results[name] = result.detach(), *found
    return results


@processes
def test_a_gradient_is_that_of_the_sum_of_all_processes_losses(size):
    problems, wants = {}, {}
    for name, (_, collect) in COLLECTIVES.items():
        counts = COUNTS[size] if name == "ragged" else [2] * size
        parts, directions = (
            [uniform(seeded(seed + i), n, 2, 3) for i, n in enumerate(counts)] for seed in (0, 10)
        )
        leaves = [x.clone().requires_grad_() for x in parts]
        want = collect(leaves)
        weights = [uniform(seeded(20 + i), *want.shape) for i in range(size)]
        total = sum((want**3 * weight).sum() for weight in weights)
        slopes = torch.autograd.grad(total, leaves, create_graph=True)
        turned = sum((x * y).sum() for x, y in zip(slopes, directions, strict=True))
        problems[name] = parts, weights, directions
        wants[name] = want, slopes, torch.autograd.grad(turned, leaves)
    for rank, results in enumerate(on_processes(size, collected, problems)):
        for name, (want, slopes, bends) in wants.items():
            for got, other in zip(results[name], (want, slopes[rank], bends[rank]), strict=True):
                torch.testing.assert_close(got, other.detach(), **CLOSE, msg=f"{name} on {rank}")


def half_of_the_processes(rank, group, x):
    halves = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    part = x[rank].clone().requires_grad_()
    group = halves[rank % 2]
    rows = all_gather(part, group)
    (slope,) = torch.autograd.grad((rows * (rank + 1)).sum(), part)
    order = torch.tensor([1, 0])
    dealt = shuffle_batch(part.detach(), order, group)
    return rows.detach(), all_mean(part.detach(), group), slope, dealt


def test_a_group_may_be_a_part_of_the_processes():
    x = torch.arange(8.0).view(4, 1, 2)
    results = on_processes(4, half_of_the_processes, x)
    for rank, (rows, mean, slope, dealt) in enumerate(results):
        other = (rank + 2) % 4
        assert torch.equal(rows, torch.cat([x[min(rank, other)], x[max(rank, other)]]))
        assert torch.equal(mean, (x[rank] + x[other]) / 2)
        assert torch.equal(slope, torch.full((1, 2), rank + other + 2.0))
        assert torch.equal(dealt, x[other])


def half_precision(rank, group, dtype):
    x = torch.full((rank, 2), rank + 1.0, dtype=dtype, requires_grad=True)
    rows = all_gather(x, group, ragged=True)
    total, mean = (reduce(x.sum(), group) for reduce in (all_sum, all_mean))
    (slope,) = torch.autograd.grad(rows.sum() + total + mean, x)
    return rows.detach(), total.detach(), mean.detach(), slope


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_collectives_keep_their_dtype(dtype):
    for rank, (rows, total, mean, slope) in enumerate(on_processes(2, half_precision, dtype)):
        assert torch.equal(rows, torch.full((1, 2), 2.0, dtype=dtype))
        assert torch.equal(total, torch.tensor(4.0, dtype=dtype))
        assert torch.equal(mean, torch.tensor(2.0, dtype=dtype))
        assert torch.equal(slope, torch.full((rank, 2), 2.0 + 2.0 + 1.0, dtype=dtype))


def other_dtypes(rank, group, rows, order):
    part = rows[2 * rank : 2 * rank + 2]
    results = [all_gather(part, group), all_gather(part[rank:], group, ragged=True)]
    shuffled = shuffle_batch(part, order, group)
    return *results, shuffled, unshuffle_batch(shuffled, order, group)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_rows_of_any_dtype_travel(dtype):
    rows = (torch.arange(12).view(4, 3) % 5 * 60).to(dtype)
    order = torch.tensor([3, 0, 1, 2])
    for rank, results in enumerate(on_processes(2, other_dtypes, rows, order)):
        mine = slice(2 * rank, 2 * rank + 2)
        wants = rows, rows[[0, 1, 3]], rows[order][mine], rows[mine]
        for got, want in zip(results, wants, strict=True):
            assert got.dtype == dtype
            assert torch.equal(got, want)


@pytest.mark.parametrize("reduce", [all_sum, all_mean, all_max], ids=lambda f: f.__name__)
def test_sums_of_whole_numbers_are_refused(reduce):
    for bad in (torch.ones(2).long(), torch.ones(2).bool()):
        with pytest.raises(TypeError, match=rf"distributed\.{reduce.__name__}: argument 'x'"):
            reduce(bad)


# ------------------------------------------------------------------------------------- the law


class Encoder(nn.Module):
    """Two views to features."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def forward(self, one, two):
        return self.net(one), self.net(two)


def contrast_of_the_valid(net, one, two, valid, group=None, **options):
    """The keys of all processes are negatives; every valid query of any process counts once."""
    query, key = net(one, two)
    others = Negatives(*(all_gather(x, group, **options) for x in (key, valid)))
    each = info_nce(query, key, others, valid, temperature=0.5, reduction="none")
    return masked_mean(each, valid, group=group)


def mean_of_contrasts(net, one, two, valid, group=None):
    """The in-set loss on gathered rows, with a target for each query; a mean of equal parts."""
    query, key = (F.normalize(x, dim=-1) for x in net(one, two))
    first = 0 if group is None else group.rank() * len(one)
    target = torch.arange(first, first + len(one))
    return all_mean(F.cross_entropy(query @ all_gather(key, group).mT / 0.5, target), group)


def one_processes_contrast(net, one, two, valid, group=None):
    """The same, each process with the loss of its own queries only."""
    query, key = (F.normalize(x, dim=-1) for x in net(one, two))
    first = 0 if group is None else group.rank() * len(one)
    target = torch.arange(first, first + len(one))
    return F.cross_entropy(query @ all_gather(key, group).mT / 0.5, target)


def distances_of_the_valid(net, one, two, valid, group=None):
    """No gathered rows; processes have different numbers of valid entries, some none."""
    query, key = net(one, two)
    each = torch.where(valid[:, None], (query - key).square(), torch.nan)
    return masked_mean(each, valid[:, None], group=group)


def ragged_contrast(net, one, two, valid, group=None):
    return contrast_of_the_valid(net, one, two, valid, group, ragged=True)


def deviation_from_the_mean_feature(net, one, two, valid, group=None):
    """Statistics of the whole batch inside of a nonlinear loss, on every process alike."""
    query, _ = net(one, two)
    total = all_sum(query.sum(0), group)
    return all_sum((query - total / 8).square().sum(), group).sqrt()


LAWS = [
    contrast_of_the_valid,
    mean_of_contrasts,
    one_processes_contrast,
    distances_of_the_valid,
    ragged_contrast,
    deviation_from_the_mean_feature,
]
SOME = torch.tensor([0, 0, 1, 0, 1, 1, 1, 1]).bool()  # the first of four processes has none


def laws_on_a_part(rank, group, laws, net, data, counts, wrapped):
    part, results = [x.split(counts)[rank] for x in data], []
    for law in laws:
        copied = copy.deepcopy(net)
        called = DistributedDataParallel(copied) if wrapped else copied
        loss = law(called, *part, group)
        loss.backward()
        grads = [x.grad for x in copied.parameters()]
        if not wrapped:
            for grad in grads:  # as DistributedDataParallel does
                dist.all_reduce(grad.div_(group.size()), group=group)
        if law is one_processes_contrast:
            loss = all_mean(loss.detach(), group)
        results.append((loss.detach(), grads))
    return results


def assert_one_process_gives_the_same(laws, counts, valid=SOME, wrapped=False):
    torch.manual_seed(0)
    net = Encoder()
    data = [*(uniform(seeded(i), 8, 4, low=-1) for i in range(2)), valid]
    wants = []
    for law in laws:
        want = law(net, *data)
        wants.append((want.detach(), torch.autograd.grad(want, [*net.parameters()])))
    for results in on_processes(len(counts), laws_on_a_part, laws, net, data, counts, wrapped):
        for law, got, (want, grads) in zip(laws, results, wants, strict=True):
            torch.testing.assert_close(got[0], want, **CLOSE, msg=law.__name__)
            for one, other in zip(got[1], grads, strict=True):
                torch.testing.assert_close(one, other, **CLOSE, msg=law.__name__)
    return wants


@processes
def test_loss_and_averaged_gradients_are_those_of_one_process(size):
    for want, grads in assert_one_process_gives_the_same(LAWS, [8 // size] * size):
        assert want > 0
        assert all((grad != 0).any() for grad in grads[:-1])


@pytest.mark.parametrize("counts", [[8, 0], [1, 4, 0, 3]])
def test_parts_of_any_size_give_what_one_process_gives(counts):
    assert_one_process_gives_the_same([ragged_contrast, distances_of_the_valid], counts)


def test_nothing_valid_anywhere_is_a_zero_everywhere():
    laws = [contrast_of_the_valid, distances_of_the_valid]
    for want, grads in assert_one_process_gives_the_same(laws, [4, 4], torch.zeros(8).bool()):
        assert want == 0
        assert all((grad == 0).all() for grad in grads)


def test_distributed_data_parallel_finds_the_gradient_of_one_process():
    assert_one_process_gives_the_same(LAWS, [4, 4], wrapped=True)


# ------------------------------------------------------------------------------------ shuffling


def dealt(rank, group, x, order, weights):
    part = x.tensor_split(group.size())[rank].clone().requires_grad_()
    shuffled = shuffle_batch(part, order, group)
    back = unshuffle_batch(shuffled, order, group)
    weight = weights.tensor_split(group.size())[rank]
    slopes = [
        torch.autograd.grad((y * weight).sum(), part, retain_graph=True) for y in (shuffled, back)
    ]
    return shuffled.detach(), back.detach(), *(slope for (slope,) in slopes)


@processes
def test_shuffled_rows_are_the_permuted_batch_and_find_their_way_back(size):
    x, weights = (uniform(seeded(i), 8, 2, 3) for i in range(2))
    order = torch.randperm(8, generator=seeded(5))
    assert not torch.equal(order, order.argsort())  # or forth and back would be the same
    results = zip(*on_processes(size, dealt, x, order, weights), strict=True)
    shuffled, back, slope, identity = (torch.cat(parts) for parts in results)
    assert torch.equal(shuffled, x[order])
    assert torch.equal(back, x)
    assert torch.equal(slope, weights[order.argsort()])
    assert torch.equal(identity, weights)


@given(x=tensors((6, 2)))
def test_a_batch_of_one_process_is_permuted(x):
    order = torch.randperm(6, generator=seeded(5))
    assert torch.equal(shuffle_batch(x, order), x[order])
    assert torch.equal(unshuffle_batch(x[order], order), x)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_an_order_may_have_any_integer_dtype(dtype):
    x, order = uniform(seeded(), 6, 2), torch.randperm(6, generator=seeded(5))
    assert torch.equal(shuffle_batch(x, order.to(dtype)), x[order])
    assert torch.equal(unshuffle_batch(x[order], order.to(dtype)), x)


def refused(rank, group, order):
    messages = []
    for function in (shuffle_batch, unshuffle_batch):
        with pytest.raises(ValueError, match="the order has") as error:
            function(torch.zeros(3, 2), order, group)
        messages.append(str(error.value))
    return messages


def test_an_order_of_another_length_is_refused():
    for messages in on_processes(2, refused, torch.arange(3)):
        for name, message in zip(("shuffle", "unshuffle"), messages, strict=True):
            assert f"densekit.distributed.{name}_batch: the order has 3 entries" in message
            assert "3 rows on each of 2 processes" in message
    for function in (shuffle_batch, unshuffle_batch):
        with pytest.raises(ValueError, match="2 entries for 3 rows on each of 1 processes"):
            function(torch.zeros(3, 2), torch.arange(2))


# --------------------------------------------------------------------------- k-means in batches


def centroids_of_a_part(rank, group, points, counts):
    part = points.split(counts)[rank]
    options = {"steps": 10, "batch": 64, "sample": 40, "group": group}
    return [minibatch_kmeans(part, 4, generator=seeded(seed), **options) for seed in range(9)]


def median_inertia(points, runs):
    square = torch.stack([torch.cdist(points, centers).square().amin(1).sum() for centers in runs])
    return square.median().item()  # a single start may miss a cluster


@pytest.mark.parametrize("apart", [False, True], ids=["alike", "apart"])
@pytest.mark.parametrize("counts", [[600, 600], [1100, 100], [100, 1100], [0, 1200]])
def test_kmeans_over_uneven_parts_has_one_result_as_good_as_one_process(counts, apart):
    middles = torch.tensor([[0.0, 0], [30, 0], [30, 30], [0, 30]], dtype=torch.float64)
    labels = torch.arange(1200) % 4
    labels = labels.sort().values if apart else labels  # the processes have other clusters
    points = torch.randn(1200, 2, generator=seeded(2), dtype=torch.float64) + middles[labels]
    runs, others = on_processes(2, centroids_of_a_part, points, counts)
    assert all(torch.equal(x, y) for x, y in zip(runs, others, strict=True))
    options = {"steps": 10, "batch": 128, "sample": 40}
    alone = [minibatch_kmeans(points, 4, generator=seeded(seed), **options) for seed in range(9)]
    got, want = (median_inertia(points, x) for x in (runs, alone))
    assert got == pytest.approx(want, rel=0.05)


def no_generator(rank, group):
    with pytest.raises(ValueError, match="minibatch_kmeans: a group needs a generator"):
        minibatch_kmeans(torch.zeros(3, 2), 2, group=group)


def test_kmeans_over_processes_needs_a_generator_in_the_same_state():
    on_processes(1, no_generator)


def no_point(rank, group):
    with pytest.raises(ValueError, match="minibatch_kmeans: there is no point"):
        minibatch_kmeans(torch.zeros(0, 2), 2, group=group, generator=seeded())


def test_kmeans_over_processes_without_any_point_ends_on_all():
    on_processes(2, no_point)
