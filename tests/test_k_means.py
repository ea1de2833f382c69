"""k-means against scikit-learn and slow loops, and its promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import make_blobs
from strategies import batches, flips, generators, largest, tensors, uniform
from densekit import kmeans, kmeans_plus_plus, minibatch_kmeans, nearest_centroids, numerics

halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chi_square(counts, chances):
    """How far counts are from their expectation, in standard deviations of that distance."""
    possible = chances > 0
    assert (counts[~possible] == 0).all()
    expected = chances[possible] * counts.sum()
    distance = ((counts[possible] - expected) ** 2 / expected).sum()
    degrees = possible.sum() - 1
    return ((distance - degrees) / math.sqrt(2 * degrees)).item()


def assert_same(got, want, **tolerance):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


# ------------------------------------------------------------------------------------- k-means


def slow_kmeans(points, start, iterations):
    """Lloyd's algorithm, point by point; empty clusters start again at the farthest points."""
    centers = start.copy()

    def nearest():
        distance = cdist(points, centers, "sqeuclidean")
        return distance.argmin(1), distance.min(1)

    for _ in range(iterations):
        labels, square = nearest()
        farthest = iter(np.argsort(-square, kind="stable"))
        for cluster in range(len(centers)):
            own = points[labels == cluster]
            if len(own):
                centers[cluster] = own.mean(0)
            elif (far := next(farthest, None)) is not None and square[far] > 0:
                centers[cluster] = points[far]
    labels, square = nearest()
    return centers, labels, square.sum()


@st.composite
def clouds(draw, batch=()):
    """Points, start centroids of which some may be far from all points, and valid points.

    There are as many valid points as centroids, or more: else it is a matter of rounding whether a
    spare centroid goes to a point that has one.
    """
    generator, n = draw(generators()), draw(st.integers(5, 8))
    d, k = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    points = uniform(generator, *batch, n, d, low=-1)
    start = uniform(generator, *batch, k, d, low=-1)
    useless = flips(generator, *batch, k, 1) & draw(st.booleans())
    rank = torch.rand(*batch, n, generator=generator).argsort(-1)
    return points, torch.where(useless, 50 + start, start), rank < draw(st.integers(5, n))


@given(clouds(), st.integers(0, 4))
def test_kmeans_is_that_of_a_loop(problem, iterations):
    points, start, _ = problem
    got = kmeans(points, start, iterations=iterations)
    want = slow_kmeans(points.numpy(), start.numpy(), iterations)
    np.testing.assert_allclose(got.centroids.numpy(), want[0], rtol=0, atol=1e-10)
    np.testing.assert_array_equal(got.labels.numpy(), want[1])
    assert got.inertia.item() == pytest.approx(want[2], rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_kmeans_is_scikit_learns(seed, iterations):
    generator = seeded(seed)
    points = torch.randn(120, 3, generator=generator, dtype=torch.float64)
    start = kmeans_plus_plus(points, 6, generator=generator)
    got = kmeans(points, start, iterations=iterations)
    oracle = KMeans(6, init=start.numpy(), n_init=1, max_iter=iterations, tol=0)
    oracle.fit(points.numpy())
    np.testing.assert_allclose(got.centroids.numpy(), oracle.cluster_centers_, atol=1e-12)
    np.testing.assert_array_equal(got.labels.numpy(), oracle.labels_)
    assert got.inertia.item() == pytest.approx(oracle.inertia_, rel=1e-12)


@given(clouds())
def test_masked_points_are_as_if_they_were_not_there(problem):
    points, start, valid = problem
    filled = torch.where(valid[:, None], points, torch.nan)
    got = kmeans(filled, start, valid, iterations=3)
    assert all(x.isfinite().all() for x in got)
    assert (got.labels[~valid] == -1).all()
    want = kmeans(points[valid], start, iterations=3)
    assert torch.equal(got.labels[valid], want.labels)
    assert_same((got.centroids, got.inertia), (want.centroids, want.inertia), rtol=0, atol=1e-10)


@given(clouds((3,)))
def test_batched_kmeans_is_that_of_each_problem(problem):
    got = kmeans(*problem, iterations=3)
    for b in range(3):
        alone = kmeans(*(x[b] for x in problem), iterations=3)
        assert_same([x[b] for x in got], alone, rtol=0, atol=1e-10)


@given(clouds())
def test_inertia_never_increases(problem):
    points, start, _ = problem
    runs = [kmeans(points, start, iterations=i) for i in range(6)]
    inertia = torch.stack([run.inertia for run in runs])
    assert (inertia.diff() <= 1e-12).all()
    for run in runs:
        distance = torch.cdist(points, run.centroids).square()
        torch.testing.assert_close(run.inertia, distance.min(-1).values.sum())


def test_empty_clusters_get_the_farthest_points():
    points = torch.tensor([[0.0], [0.1], [5.0], [9.0]])
    start = torch.tensor([[0.0], [1e3], [-1e3]])
    got = kmeans(points, start, iterations=1)
    torch.testing.assert_close(got.centroids[1:], torch.tensor([[9.0], [5.0]]))
    got = kmeans(points, start)
    assert sorted(got.labels.bincount(minlength=3).tolist()) == [1, 1, 2]
    torch.testing.assert_close(got.inertia, torch.tensor(0.005))


def test_clusters_beyond_the_different_points_stay_empty_and_finite():
    points, start = torch.ones(4, 2), torch.tensor([[1.0, 1.0], [7.0, 7.0], [8.0, 8.0]])
    got = kmeans(points, start)
    assert got.labels.tolist() == [0] * 4
    assert got.inertia == 0
    torch.testing.assert_close(got.centroids, start)


def test_kmeans_far_from_the_origin_is_as_precise():
    points = torch.randn(100, 2, generator=seeded()) * 0.1
    points[50:] += 0.5
    points = points + 1e4
    start = points[[0, 60]]
    got = kmeans(points, start)
    want = kmeans(points.double(), start.double())
    assert torch.equal(got.labels, want.labels)
    torch.testing.assert_close(got.inertia.double(), want.inertia, rtol=1e-4, atol=0)
    torch.testing.assert_close(got.centroids.double(), want.centroids, rtol=0, atol=2e-3)


@halves
def test_half_precision_kmeans_is_widened_and_without_gradient(dtype):
    points = torch.randn(20, 3, generator=seeded()).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = kmeans(points, points[:4], iterations=3)
    want = kmeans(points.detach().float(), points[:4].detach().float(), iterations=3)
    assert got.centroids.dtype == torch.float32
    assert not got.centroids.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_no_points_leave_the_centroids_where_they_are():
    start = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for points, valid in (
        (torch.zeros(0, 2), None),
        (torch.full((3, 2), torch.nan), torch.zeros(3, dtype=torch.bool)),
    ):
        got = kmeans(points, start, valid)
        assert torch.equal(got.centroids, start)
        assert got.inertia == 0
        assert (got.labels == -1).all()


@pytest.mark.parametrize(("count", "iterations"), [(0, 5), (2, -1)])
def test_kmeans_without_centroids_or_with_negative_iterations_is_refused(count, iterations):
    said = "iterations is -1" if count else "the number of centroids is 0"
    with pytest.raises(ValueError, match=f"kmeans: {said};"):
        kmeans(torch.zeros(3, 2), torch.zeros(count, 2), iterations=iterations)


@given(st.data())
def test_drawn_centroids_are_different_valid_points(data):
    batch, n, d = data.draw(batches()), data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    points = data.draw(tensors((*batch, n, d)), label="points").requires_grad_()
    valid = flips(data.draw(generators()), *batch, n)
    valid[..., 0] = True
    count = data.draw(st.integers(0, 8), label="count")
    filled = torch.where(valid[..., None], points, torch.nan)
    seed = data.draw(st.integers(0, 999), label="seed")
    drawn = kmeans_plus_plus(filled, count, valid, generator=seeded(seed))
    assert drawn.shape == (*batch, count, d)
    assert not drawn.requires_grad
    assert torch.equal(drawn, kmeans_plus_plus(filled, count, valid, generator=seeded(seed)))
    same = (drawn[..., :, None, :] == filled[..., None, :, :]).all(-1)  # none is NaN's
    assert same.any(-1).all()
    assert torch.equal(same.any(-2).sum(-1), valid.sum(-1).clamp(max=count))


def test_drawn_centroids_repeat_valid_points_when_there_are_too_few():
    valid = torch.tensor([[False, True, True], [True, False, True]])
    points = torch.where(valid, 5.0, 9.0)[..., None]
    for v, x in ((valid, points), (valid[0], points[0]), (valid[1], points[1])):
        drawn = kmeans_plus_plus(x, 3, v, generator=seeded())
        assert torch.equal(drawn, torch.full_like(drawn, 5.0))


def test_centroids_drawn_from_nothing_are_zero():
    drawn = kmeans_plus_plus(torch.full((2, 3), torch.nan), 2, torch.zeros(2, dtype=torch.bool))
    assert torch.equal(drawn, torch.zeros(2, 3))


def test_centroids_are_drawn_by_their_squared_distance():
    points = torch.tensor([[0.0], [1.0], [3.0], [3.5]], dtype=torch.float64)
    drawn = kmeans_plus_plus(points.expand(20_000, 4, 1), 3, generator=seeded())[..., 0]
    first, second, third = (drawn[..., None] == points[:, 0]).int().argmax(-1).unbind(-1)
    square = (points - points.mT).square()
    pairs = square / square.sum(-1, keepdim=True) / 4
    left = torch.minimum(square[:, None], square[None, :])  # from the nearest of i and j
    left = left / left.sum(-1, keepdim=True)
    assert chi_square(first.bincount(minlength=4), torch.full((4,), 0.25)) < 4
    assert chi_square((4 * first + second).bincount(minlength=16), pairs.flatten()) < 4
    counts = (16 * first + 4 * second + third).bincount(minlength=64)
    assert chi_square(counts, (pairs[..., None] * left).flatten()) < 4


@pytest.mark.parametrize(("n", "count"), [(3, -1), (0, 2)])
def test_centroids_that_cannot_be_drawn_are_refused(n, count):
    said = f"the number of points is {n}" if count > 0 else f"count is {count}"
    with pytest.raises(ValueError, match=f"kmeans_plus_plus: {said}; give"):
        kmeans_plus_plus(torch.zeros(n, 2), count)
    assert kmeans_plus_plus(torch.zeros(0, 2), 0).shape == (0, 2)


# ------------------------------------------------------------------------- nearest centroids


@given(st.data())
def test_the_nearest_centroid_is_scipys(data):
    batch = data.draw(batches())
    n, k, d = (
        data.draw(st.integers(0, 8)),
        data.draw(st.integers(1, 5)),
        data.draw(st.integers(1, 3)),
    )
    points, centers = (data.draw(tensors((*batch, size, d))) for size in (n, k))
    got = nearest_centroids(points, centers)
    assert got.shape == (*batch, n)
    for index in np.ndindex(batch):
        distance = cdist(points[index].numpy(), centers[index].numpy())
        np.testing.assert_array_equal(got[index].numpy(), distance.argmin(1))


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_the_nearest_centroid_is_near_to_rounding_far_from_the_origin(offset):
    points = torch.randn(500, 8, generator=seeded()) + offset
    centers = torch.randn(20, 8, generator=seeded(1)) + offset
    distance = torch.cdist(points.double(), centers.double()).square()
    got = distance.gather(1, nearest_centroids(points, centers)[:, None])[:, 0]
    # The products are of numbers of the size of the offset: so is their rounding, in units of the
    # square distance; distances from the origin would be wrong by its square.
    honest = 100 * torch.finfo(torch.float32).eps * max(offset, 1.0)
    assert (got - distance.amin(1)).max() <= honest


def test_of_centroids_as_near_the_first_is_taken():
    assert nearest_centroids(torch.zeros(2, 1), torch.tensor([[1.0], [-1.0], [1.0]])).tolist() == [
        0,
        0,
    ]
    assert nearest_centroids(torch.zeros(1, 0), torch.zeros(3, 0)).tolist() == [0]


@halves
def test_half_points_find_their_centroids_in_full_precision_under_autocast(dtype):
    points, centers = torch.randn(50, 16, generator=seeded()).to(dtype), torch.randn(9, 16)
    want = nearest_centroids(points.double(), centers.double())
    with torch.autocast("cpu", torch.bfloat16):
        got = nearest_centroids(points, centers)
    assert torch.equal(got, want)


def test_centroids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="nearest_centroids: give one or more centroids"):
        nearest_centroids(torch.zeros(3, 2), torch.zeros(0, 2))
    with pytest.raises(TypeError, match=r"nearest_centroids: argument 'centroids'.*d=2"):
        nearest_centroids(torch.zeros(3, 2), torch.zeros(1, 3))


BLOBS = torch.tensor([[0.0, 0.0], [5.0, 5.0]]).repeat_interleave(500, 0)


def test_an_unused_far_centroid_changes_no_label():
    points = BLOBS + 0.1 * torch.randn(1000, 2, generator=seeded())
    centers = torch.tensor([[0.0, 0.0], [5.0, 5.0], [1e5, 1e5]])
    assert nearest_centroids(points, centers).bincount(minlength=3).tolist() == [500, 500, 0]
    assert kmeans(points, centers, iterations=0).labels.bincount().tolist() == [500, 500]
    far = torch.cat([points, centers[2:]])
    got = kmeans(far, centers).labels
    assert got.tolist() == [0] * 500 + [1] * 500 + [2]


@st.composite
def clouds_apart(draw, dtype):
    """Points and centroids near several origins, which are as far apart as a dtype can hold."""
    generator, d = draw(generators()), draw(st.sampled_from([1, 2, 7, 64]))
    largest_offset = draw(st.sampled_from([0.0, 1e3, 1e5]))
    origins = uniform(generator, 3, d, low=-1) * largest_offset
    spread = draw(st.sampled_from([0.5, 1e3]))
    points, centers = (
        origins[torch.arange(count) % 3] + spread * uniform(generator, count, d, low=-1)
        for count in (24, 6)
    )
    return points.to(dtype), centers.to(dtype)


JUNK = (3e38, 1e30, -1e20, 1e7, torch.nan, torch.inf, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_far_points_and_unused_centroids_change_no_other_label(dtype, data):
    points, centers = data.draw(clouds_apart(dtype))
    # In float64 the differences are exact to rounding, wherever the numbers are.
    distance = cdist(points.double().numpy(), centers.double().numpy())
    want = torch.from_numpy(distance.argmin(1))
    junk = torch.tensor(data.draw(st.lists(st.sampled_from(JUNK), max_size=9)), dtype=dtype)
    junk = junk[:, None].expand(-1, points.shape[1])
    more, slots = torch.cat([points, junk]), torch.cat([centers, junk])
    for x, c in ((points, centers), (more, centers), (points, slots)):
        assert torch.equal(nearest_centroids(x, c)[: len(points)], want)
        assert torch.equal(kmeans(x, c, iterations=0).labels[: len(points)], want)
        vmapped = torch.vmap(nearest_centroids)(x[None], c[None])[0]
        assert torch.equal(vmapped[: len(points)], want)
    assert (nearest_centroids(junk, centers)[~junk[:, 0].isfinite()] == -1).all()
    assert (nearest_centroids(points, centers * torch.nan) == -1).all()


@pytest.mark.parametrize("seed", range(3))
def test_batches_give_a_far_point_its_own_cluster_and_leave_the_others_alone(seed):
    points = torch.cat(
        [BLOBS + 0.1 * torch.randn(1000, 2, generator=seeded(seed)), BLOBS[:1] + 1e6]
    )
    centers = minibatch_kmeans(points, 3, generator=seeded(seed))
    labels = nearest_centroids(points, centers)
    assert sorted(labels.bincount(minlength=3).tolist()) == [1, 500, 500]
    near = centers[labels[[0, 500]]]
    torch.testing.assert_close(near, BLOBS[[0, 500]], rtol=0, atol=0.05)


@given(clouds(), st.integers(0, 4))
def test_points_that_are_not_finite_are_left_out(problem, iterations):
    points, start, valid = problem
    spoiled = torch.where(
        valid[:, None], points, torch.tensor([torch.nan, torch.inf, 1])[: points.shape[1]]
    )
    got = kmeans(spoiled, start, iterations=iterations)
    want = kmeans(points, start, valid, iterations=iterations)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    drawn = (
        kmeans_plus_plus(spoiled, 2, generator=seeded()),
        kmeans_plus_plus(points, 2, valid, generator=seeded()),
    )
    assert torch.equal(*drawn)


def test_a_point_without_numbers_has_no_label_and_moves_nothing():
    points = torch.tensor([[0.0], [1.0], [9.0], [10.0], [torch.nan]])
    got = kmeans(points, torch.tensor([[0.0], [10.0]]))
    assert got.labels.tolist() == [0, 0, 1, 1, -1]
    assert got.centroids.flatten().tolist() == [0.5, 9.5]
    assert got.inertia == 1


def test_memory_does_not_grow_with_points_times_centroids(monkeypatch):
    monkeypatch.setattr(numerics, "BLOCK", 2**12)
    points, clusters = torch.randn(4000, 4, generator=seeded()), 100
    bound = 8 * points.numel()  # int64 labels, and float64 of float32
    centers = points[:clusters].clone()
    assert largest(lambda: nearest_centroids(points, centers)) <= bound
    assert largest(lambda: kmeans(points, centers, iterations=2)) <= bound
    options = {"sample": 40, "batch": 500, "steps": 2, "iterations": 1}
    assert largest(lambda: minibatch_kmeans(points, clusters, **options)) <= 4 * bound


# -------------------------------------------------------------------------- k-means in batches


def inertia(points, centers):
    return torch.cdist(points.double(), centers.double()).square().amin(1).sum().item()


OPTIONS = {"steps": 30, "batch": 256, "sample": 64}


@pytest.mark.parametrize("blobs", range(2))
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_batches_come_near_to_scikit_learns_inertia(blobs, spread):
    points, _ = make_blobs(4000, 8, centers=6, cluster_std=spread, random_state=blobs)
    rows, seeds = torch.from_numpy(points), range(9)
    runs = [minibatch_kmeans(rows, 6, generator=seeded(seed), **OPTIONS) for seed in seeds]
    got = [inertia(rows, centers) for centers in runs]
    best = KMeans(6, n_init=5, random_state=0).fit(points).inertia_
    options = {"init": "random", "n_init": 1, "batch_size": 256}
    oracles = [MiniBatchKMeans(6, **options, random_state=seed).fit(points) for seed in seeds]
    assert min(got) >= 0.999 * best
    assert min(got) <= 1.02 * best
    # One start of any kind may miss a cluster; ours are better than random ones.
    assert np.median(got) <= np.median([oracle.inertia_ for oracle in oracles])


@pytest.mark.parametrize("seed", range(12))
def test_no_cluster_is_missed_that_lies_apart(seed):
    middles = 6 * torch.randn(6, 8, generator=seeded(seed))
    labels = torch.randint(6, (2000,), generator=seeded(seed))
    points = middles[labels] + torch.randn(2000, 8, generator=seeded(seed))
    best = kmeans(points, middles).inertia
    got = minibatch_kmeans(points, 6, batch=256, generator=seeded(seed))
    assert torch.cdist(points, got).amin(1).square().sum() <= 1.1 * best


def draws_by_hand(points, clusters, *, steps, batch, sample, seed):
    """The sample, and the batches."""
    generator = seeded(seed)
    torch.randint(2**31, (), generator=generator)  # the seed of the start
    known = points[torch.randperm(len(points), generator=generator)[: sample * clusters]]
    rows = [torch.randint(len(points), (batch,), generator=generator) for _ in range(steps)]
    return known, [points[row] for row in rows]


@given(st.integers(0, 999), st.integers(1, 5), st.integers(0, 3), st.integers(1, 9))
def test_a_step_moves_each_centroid_to_the_mean_of_all_points_it_was_given(
    seed, clusters, steps, batch
):
    points = torch.randn(40, 3, generator=seeded(seed), dtype=torch.float64)
    options = {"batch": batch, "sample": 4}
    known, rows = draws_by_hand(points, clusters, steps=steps, seed=seed, **options)
    centers = minibatch_kmeans(points, clusters, steps=0, generator=seeded(seed), **options)
    count = torch.cdist(known, centers).argmin(1).bincount(minlength=clusters)
    for given_now in rows:
        labels = torch.cdist(given_now, centers).argmin(1)
        for row, label in zip(given_now, labels.tolist(), strict=True):  # Sculley: one by one
            count[label] += 1
            centers[label] += (row - centers[label]) / count[label]
    got = minibatch_kmeans(points, clusters, steps=steps, generator=seeded(seed), **options)
    torch.testing.assert_close(got, centers)


@given(st.integers(0, 999), st.integers(1, 5))
def test_without_steps_it_is_kmeans_on_the_sample(seed, clusters):
    points = torch.randn(60, 3, generator=seeded(seed), dtype=torch.float64)
    options = {"steps": 0, "batch": 1, "sample": 8}
    known, _ = draws_by_hand(points, clusters, seed=seed, **options)
    got = minibatch_kmeans(points, clusters, iterations=60, generator=seeded(seed), **options)
    again = kmeans(known, got, iterations=3)
    torch.testing.assert_close(again.centroids, got)  # nothing moves any more
    start = kmeans(known, known[:clusters], iterations=0)
    assert again.inertia <= start.inertia


@pytest.mark.parametrize("steps", [0, 20])
def test_points_without_numbers_are_left_out(steps):
    points = 10 + torch.randn(300, 2, generator=seeded())  # far from the origin: zeros would show
    points[:150] += 20
    points[::3, 0], points[1::3, 1] = torch.nan, torch.inf
    got = minibatch_kmeans(points, 2, generator=seeded(), **OPTIONS | {"steps": steps})
    kept = points[2::3]
    want = torch.stack([x.mean(0) for x in (kept[50:], kept[:50])])
    torch.testing.assert_close(got.sort(0).values, want, rtol=0, atol=0.3)
    none = minibatch_kmeans(points * torch.nan, 2, generator=seeded(), **OPTIONS | {"steps": steps})
    assert torch.equal(none, torch.zeros(2, 2))


def test_clusters_beyond_the_points_are_finite_and_every_point_is_found():
    points = torch.tensor([[0.0], [3.0]])
    got = minibatch_kmeans(points, 5, steps=3, batch=4, generator=seeded())
    assert got.shape == (5, 1)
    assert inertia(points, got) == 0


def test_a_generator_fixes_the_centroids_and_no_gradient_flows():
    points = torch.randn(200, 3, generator=seeded()).requires_grad_()
    runs = [minibatch_kmeans(points, 4, generator=seeded(5), **OPTIONS) for _ in range(2)]
    assert torch.equal(*runs)
    assert not runs[0].requires_grad
    other = minibatch_kmeans(points, 4, generator=seeded(6), **OPTIONS)
    assert not torch.equal(runs[0], other)


@halves
def test_batches_of_half_points_are_widened(dtype):
    points = torch.randn(200, 3, generator=seeded()).to(dtype)
    want = minibatch_kmeans(points.float(), 4, generator=seeded(5), **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        got = minibatch_kmeans(points, 4, generator=seeded(5), **OPTIONS)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_batches_far_from_the_origin_find_the_same_clusters():
    points = torch.randn(600, 4, generator=seeded())
    points[300:] += 3
    near = minibatch_kmeans(points, 2, generator=seeded(), **OPTIONS)
    far = minibatch_kmeans(points + 1e3, 2, generator=seeded(), **OPTIONS)
    torch.testing.assert_close(far - 1e3, near, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "options",
    [{"clusters": 0}, {"steps": -1}, {"batch": 0}, {"sample": 0}, {"iterations": -1}, {"n": 0}],
)
def test_batches_that_make_no_sense_are_refused(options):
    ((name, value),) = options.items()
    options = {"clusters": 2, "n": 3} | options
    points = torch.zeros(options.pop("n"), 2)
    found = f"{name} is {value}; give" if len(points) else "there is no point"
    with pytest.raises(ValueError, match=rf"minibatch_kmeans: {found}"):
        minibatch_kmeans(points, **options)


def test_points_without_channels_have_the_first_center():
    assert kmeans(torch.rand(5, 0), torch.rand(2, 0)).labels.tolist() == [0] * 5
    assert minibatch_kmeans(torch.rand(4, 0), 2).shape == (2, 0)


def test_what_is_valid_may_be_mapped_over_alone():
    x, valid = torch.rand(6, 2), torch.rand(4, 6) > 0.3
    got = torch.vmap(lambda own: kmeans(x, x[:2], own).labels)(valid)
    assert torch.equal(got, torch.stack([kmeans(x, x[:2], own).labels for own in valid]))
