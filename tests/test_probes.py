"""Probes of frozen features against scikit-learn and slow loops, and their promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from strategies import flips, generators, largest, sizes, tensors, uniform
from torch import nn
from densekit import (
    LinearProbe,
    confusion_matrix,
    fit_linear_probe,
    fit_svm,
    linear_maps,
    linear_segmentation,
    mean_iou,
    numerics,
    probe_scenes,
    sample_scenes,
    segmentation_counts,
    train_linear_probe,
)

CLASSES = 4


# ------------------------------------------------------------------------------ linear probe


@st.composite
def probes(draw):
    """Features with a spread in each channel, labels with rows to leave out, a penalty."""
    n, d = draw(st.integers(8, 20)), draw(st.integers(1, 4))
    generator = draw(generators())
    features = uniform(generator, n, d) * 10 ** uniform(generator, d, low=-2, high=2)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    labels[3:][torch.rand(n - 3, generator=generator) < 0.3] = 255
    return features, labels, draw(st.sampled_from([1e-3, 0.1, 10.0]))


@given(probes())
def test_the_probe_is_scikit_learns_ridge_on_one_hot_labels(case):
    features, labels, penalty = case
    keep = labels != 255
    scaler = StandardScaler().fit(features[keep])
    target = torch.nn.functional.one_hot(labels[keep], CLASSES).double()
    ridge = Ridge(alpha=penalty * int(keep.sum()), solver="cholesky")
    ridge.fit(scaler.transform(features[keep]), target)
    want = torch.from_numpy(ridge.predict(scaler.transform(features)))
    probe = fit_linear_probe(features, labels, classes=CLASSES, penalty=penalty)
    got = features @ probe.weight.double() + probe.bias.double()
    # The weights are float32, and the scores are of the order of one.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@given(probes(), st.floats(0.01, 100), st.floats(-5, 5))
def test_the_scores_do_not_depend_on_the_scale_of_the_features(case, scale, shift):
    features, labels, penalty = case
    scores = []
    for x in (features, features * scale + shift * scale):
        probe = fit_linear_probe(x, labels, classes=CLASSES, penalty=penalty)
        scores.append(x @ probe.weight.double() + probe.bias.double())
    torch.testing.assert_close(*scores, rtol=0, atol=1e-2)


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 123.456])
def test_a_constant_feature_gets_no_weight(value):
    # Its mean rounds at some of the counts, and leaves a deviation that is not zero.
    for count in range(5, 30):
        features = uniform(torch.Generator().manual_seed(count), count, 2)
        features[:, 1] = value
        labels = (torch.arange(count) % 3 == 0).long()
        probe = fit_linear_probe(features, labels, classes=2)
        assert (probe.weight[0] != 0).all()
        torch.testing.assert_close(probe.weight[1], torch.zeros(2), rtol=0, atol=1e-6)


@given(probes())
def test_rows_to_ignore_may_hold_anything(case):
    features, labels, penalty = case
    want = fit_linear_probe(features, labels, classes=CLASSES, penalty=penalty)
    poisoned = torch.where((labels == 255)[:, None], torch.nan, features)
    got = fit_linear_probe(poisoned, labels, classes=CLASSES, penalty=penalty)
    assert torch.equal(got.weight, want.weight)
    assert torch.equal(got.bias, want.bias)


@given(probes(), generators())
def test_a_row_that_is_not_finite_is_left_out_of_the_fit(case, generator):
    features, labels, penalty = case
    lost = flips(generator, len(labels))
    options = {"classes": CLASSES, "penalty": penalty}
    want = fit_linear_probe(features, torch.where(lost, -1, labels), **options)
    value = torch.tensor([torch.nan, torch.inf, -torch.inf])[int(lost.sum()) % 3]
    spoiled = torch.where(lost[:, None] & (torch.arange(features.shape[1]) == 0), value, features)
    got = fit_linear_probe(spoiled, labels, **options)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_the_255th_class_of_300_is_learned():
    labels = torch.arange(300)
    features = torch.eye(300)
    for probe in (
        fit_linear_probe(features, labels, classes=300),
        train_linear_probe(features[..., None, None], labels[:, None, None], classes=300, epochs=1),
    ):
        assert (features @ probe.weight + probe.bias).argmax(-1)[255] == 255
        torch.testing.assert_close(probe.prior, torch.full((300,), 1 / 300))
    counts = segmentation_counts(features.T[None, :, None], labels[None, None])
    assert mean_iou(counts.sum(0)) == 1
    maps, small = features.T[None, :, None], labels[None, None]
    assert linear_segmentation(maps, maps, small, small, classes=300, stride=1).miou > 0.99


def test_the_memory_of_the_fits_is_that_of_blocks(monkeypatch):
    monkeypatch.setattr(numerics, "BLOCK", 2**10)
    features, labels = torch.rand(2000, 8), torch.arange(2000) % CLASSES
    assert largest(lambda: fit_linear_probe(features, labels, classes=CLASSES)) <= 8 * 2000
    maps, small = features.view(500, 8, 2, 2), labels.view(500, 2, 2)
    options = {"classes": CLASSES, "epochs": 1, "batch": 100}
    assert largest(lambda: train_linear_probe(maps, small, **options)) <= 8 * 2000


@given(probes())
def test_the_prior_is_the_share_of_each_class(case):
    features, labels, _ = case
    counts = torch.bincount(labels[labels != 255], minlength=CLASSES).float()
    got = fit_linear_probe(features, labels, classes=CLASSES).prior
    torch.testing.assert_close(got, counts / counts.sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_are_fitted_as_the_numbers_they_are(dtype):
    features = uniform(torch.Generator().manual_seed(0), 30, 3).to(dtype)
    labels = torch.arange(30) % CLASSES
    got = fit_linear_probe(features, labels, classes=CLASSES)
    want = fit_linear_probe(features.double(), labels, classes=CLASSES)
    assert torch.equal(got.weight, want.weight)


def test_a_probe_of_nothing_is_finite():
    for features, labels in (
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)),
        (torch.rand(4, 3), torch.full((4,), 255)),
        (torch.rand(1, 3), torch.zeros(1, dtype=torch.long)),
        (torch.rand(4, 0), torch.arange(4)),
    ):
        probe = fit_linear_probe(features, labels, classes=CLASSES)
        assert probe.weight.isfinite().all()
        assert probe.bias.isfinite().all()


def test_classes_that_a_line_can_tell_apart_are_told_apart():
    labels = torch.arange(60) % 3
    corners = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    features = corners[labels] + uniform(
        torch.Generator().manual_seed(0), 60, 2, dtype=torch.float32
    )
    probe = fit_linear_probe(features, labels, classes=3)
    assert torch.equal((features @ probe.weight + probe.bias).argmax(-1), labels)


@pytest.mark.parametrize("options", [{"classes": 0}, {"classes": 2, "penalty": 0.0}])
def test_the_probe_refuses_what_makes_no_sense(options):
    *_, (name, value) = options.items()
    with pytest.raises(ValueError, match=f"fit_linear_probe: {name} is {value}; give"):
        fit_linear_probe(torch.rand(3, 2), torch.zeros(3, dtype=torch.long), **options)


def test_the_probe_wants_a_label_for_each_row():
    with pytest.raises(TypeError, match=r"argument 'labels' should be .* n=3"):
        fit_linear_probe(torch.rand(3, 2), torch.zeros(4, dtype=torch.long), classes=2)


# ----------------------------------------------------------------------- linear segmentation


def stripes(generator, count, stride):
    """Label maps of blocks of `stride` pixels, and features at a block a cell that tell them."""
    cells = torch.randint(0, CLASSES, (count, 6, 6), generator=generator)
    labels = cells.repeat_interleave(stride, 1).repeat_interleave(stride, 2)
    return torch.nn.functional.one_hot(cells, CLASSES).movedim(-1, 1).float(), labels


def test_features_that_tell_the_classes_score_one_and_noise_scores_little():
    generator = torch.Generator().manual_seed(0)
    # The middle of each block of 3 pixels is the center of its cell.
    (train, labels), (test, test_labels) = (stripes(generator, n, 3) for n in (4, 2))
    options = {"classes": CLASSES, "stride": 3}
    assert linear_segmentation(train, test, labels, test_labels, **options).miou == 1
    noise = [torch.rand(x.shape, generator=generator) for x in (train, test)]
    assert linear_segmentation(*noise, labels, test_labels, **options).miou < 0.5


def test_linear_segmentation_is_its_parts():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.rand(n, 5, 4, 3, generator=generator) for n in (3, 2))
    labels, test_labels = (
        torch.randint(0, CLASSES, (n, 9, 7), generator=generator) for n in (3, 2)
    )
    labels[0, :4] = 255

    def rows(maps, targets):
        # torch's own resize holds the feature at every pixel center; every second is used.
        up = torch.nn.functional.interpolate(maps, (9, 7), mode="bilinear")[:, :, 1::2, 1::2]
        return up.movedim(1, -1).flatten(0, 2), targets[:, 1::2, 1::2].flatten()

    x, y = rows(train, labels)
    probe = fit_linear_probe(x, y, classes=CLASSES, penalty=0.1)
    x, y = rows(test, test_labels)
    frequent = torch.tensor([int((labels[:, 1::2, 1::2] == c).sum()) for c in range(CLASSES)])
    guesses = (x @ probe.weight + probe.bias).argmax(-1), torch.full_like(y, frequent.argmax())
    want = [mean_iou(confusion_matrix(y, guess, classes=CLASSES)) for guess in guesses]
    got = linear_segmentation(
        train, test, labels, test_labels, classes=CLASSES, stride=2, penalty=0.1
    )
    torch.testing.assert_close(list(got), want)


def test_linear_segmentation_refuses_what_does_not_fit():
    maps, labels = torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.long)
    with pytest.raises(ValueError, match=r"densekit.probes.linear_segmentation: stride is 0"):
        linear_segmentation(maps, maps, labels, labels, classes=2, stride=0)
    with pytest.raises(ValueError, match="classes is 0"):
        linear_segmentation(maps, maps, labels, labels, classes=0)
    with pytest.raises(TypeError, match=r"argument 'labels'.*n=2"):
        linear_segmentation(maps, maps, labels[:1], labels, classes=2)
    with pytest.raises(TypeError, match=r"argument 'test_features'.*d=3"):
        linear_segmentation(maps, maps[:, :1], labels, labels, classes=2)


# ------------------------------------------------------------------------ linear layer by SGD


@st.composite
def labeled_maps(draw, dtype=torch.float64):
    """Feature maps of any scale, and label maps of another size, some pixels without a class."""
    generator, n, d = draw(generators()), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    size, big = draw(sizes(high=4)), draw(sizes(high=6))
    features = uniform(generator, n, d, *size, low=-1)
    features = features * 10 ** uniform(generator, d, 1, 1, low=-2, high=2)
    labels = torch.randint(0, CLASSES, (n, *big), generator=generator)
    labels[torch.rand(n, *big, generator=generator) < 0.2] = 255
    labels[:, 0, 0] = torch.randint(0, CLASSES, (n,), generator=generator)  # no image is empty
    return features.to(dtype), labels


@given(labeled_maps(), st.sampled_from([math.nan, math.inf, 7.0, -1e6]))
def test_cells_that_only_ignored_pixels_depend_on_may_hold_anything(case, value):
    features, labels = case
    cells = cells_of_labels(labels, features.shape[-2:])
    spoiled = torch.where(cells[:, None], features, value)
    got, want = trained(spoiled, labels), trained(features, labels)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@given(labeled_maps(), generators())
def test_a_cell_that_is_not_finite_is_left_out_with_the_pixels_that_depend_on_it(case, generator):
    features, labels = case
    size = features.shape[-2:]
    lost = flips(generator, len(labels), *size)
    spread = nn.functional.interpolate(lost[:, None].float(), labels.shape[1:], mode="bilinear")
    want = trained(features, torch.where(spread[:, 0] > 0, 255, labels))
    got = trained(torch.where(lost[:, None], torch.nan, features), labels)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_an_ignored_row_without_numbers_trains_nothing():
    features = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9) % 2
    labels[4] = 255
    weights = []
    for value in (0.0, torch.nan):
        features[4] = value
        maps = features[..., None, None], labels[:, None, None]
        weights.append(trained(*maps).weight)
    assert torch.equal(*weights)
    assert weights[0].isfinite().all()


OPTIONS = {"classes": CLASSES, "epochs": 3, "batch": 2, "lr": 0.3}


def trained(features, labels, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return train_linear_probe(features, labels, generator=generator, **OPTIONS | options)


def cells_of_labels(labels, size):
    """The cells that some pixel with a class depends on, one cell at a time."""
    count = size[0] * size[1]
    alone = torch.eye(count).view(count, 1, *size)
    reach = nn.functional.interpolate(alone, labels.shape[-2:], mode="bilinear")[:, 0] > 0
    seen = (reach & (labels != 255)[:, None]).any(-1).any(-1)
    return seen.unflatten(1, size)


def slow_training(features, labels, *, epochs, batch, lr, momentum=0.9, weight_decay=0.0):
    """torch's convolution, resizing, loss, SGD and cosine schedule: scores of all maps."""
    n, d, h, w = features.shape
    cells = features.double().movedim(1, -1)[cells_of_labels(labels, (h, w))]
    variance, mean = (
        x[:, None, None] for x in torch.var_mean(cells, 0, correction=0)
    )  # of what is ignored, nothing counts
    # As a batch norm on the whole set; one cell alone has no variance.
    maps = ((features - mean) / variance.sqrt().clamp(min=1e-9)).float()
    net = nn.Conv2d(d, CLASSES, 1)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=momentum, weight_decay=weight_decay)
    steps = epochs * math.ceil(n / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    loss = nn.CrossEntropyLoss(ignore_index=255)
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)
        for rows in order.split(batch):
            scores = net(maps[rows])
            scores = nn.functional.interpolate(scores, labels.shape[-2:], mode="bilinear")
            optimizer.zero_grad()
            loss(scores, labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return net(maps).detach()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0, "weight_decay": 0.1}])
@given(case=labeled_maps(torch.float32), epochs=st.integers(1, 3), batch=st.integers(1, 6))
def test_training_is_that_of_a_loop_of_torchs_parts(options, case, epochs, batch):
    features, labels = case
    features = features[..., :1, :1] if epochs == 1 else features  # one cell: classification
    options = options | {"epochs": epochs, "batch": batch, "lr": 0.3}
    probe = train_linear_probe(
        features, labels, classes=CLASSES, generator=torch.Generator().manual_seed(0), **options
    )
    got, want = linear_maps(probe, features), slow_training(features, labels, **options)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@given(labeled_maps(), st.floats(0.1, 100), st.floats(-5, 5))
def test_trained_scores_do_not_depend_on_the_scale_of_the_features(case, scale, shift):
    features, labels = case
    shift = shift * features.abs().amax((0, 2, 3), keepdim=True)
    moved = scale * (features + shift)
    got, want = (linear_maps(trained(x, labels), x) for x in (moved, features))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-2)


@given(labeled_maps())
def test_pixels_to_ignore_may_have_any_number(case):
    features, labels = case
    want = trained(features, labels)
    for other in (-1, CLASSES, 254):
        got = trained(features, torch.where(labels == 255, other, labels))
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    # A class to ignore is as pixels without one.
    got = trained(features, labels, ignore=2)
    want = trained(features, torch.where(labels == 2, 255, labels))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@given(labeled_maps(), st.integers(0, 99))
def test_a_generator_fixes_the_training_and_the_prior_is_the_share_of_each_class(case, seed):
    features, labels = case
    one, other = (trained(features, labels, seed) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    counts = torch.bincount(labels[labels != 255], minlength=CLASSES)
    torch.testing.assert_close(one.prior, counts / counts.sum())


def test_another_generator_trains_in_another_order():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 3, 2, 2, generator=generator)
    labels = torch.randint(CLASSES, (6, 4, 4), generator=generator)
    assert not torch.equal(trained(features, labels, 0).weight, trained(features, labels, 1).weight)


def test_maps_that_tell_the_classes_score_one():
    features, labels = stripes(torch.Generator().manual_seed(0), 6, 1)
    noise = 0.15 * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    features = (features + noise) * 100 + 7
    probe = train_linear_probe(features, labels, classes=CLASSES, epochs=50, batch=2, lr=0.5)
    counts = segmentation_counts(linear_maps(probe, features), labels)
    assert mean_iou(counts.sum(0)) > 0.98
    rows = features.movedim(1, -1).flatten(0, 2)[:200]
    cells = labels.flatten()[:200]
    probe = train_linear_probe(
        rows[..., None, None], cells[:, None, None], classes=CLASSES, epochs=20, batch=20
    )
    assert ((rows @ probe.weight + probe.bias).argmax(-1) == cells).float().mean() > 0.98


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fitting_works_where_gradients_are_off_and_in_full_precision_under_autocast(mode):
    features = torch.rand(5, 2, 2, 2, requires_grad=True)
    labels, targets = torch.randint(CLASSES, (5, 4, 4)), torch.eye(5).bool()

    def fitted(maps):
        return *trained(maps, labels), *fit_svm(maps[..., 0, 0], targets)

    want = fitted(features)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        made = features * 1
        inside = fitted(made)
    for got in (inside, fitted(made)):
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert not any(x.requires_grad for x in got)
    assert features.grad is None


def test_linear_segmentation_is_in_full_precision_under_autocast():
    generator = torch.Generator().manual_seed(0)
    maps = 100 + torch.rand(3, 5, 4, 4, generator=generator)
    labels = torch.randint(CLASSES, (3, 4, 4), generator=generator)
    options = {"classes": CLASSES, "stride": 1}
    want = linear_segmentation(maps, maps, labels, labels, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_segmentation(maps, maps, labels, labels, **options) == want


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_labels_of_few_bits_train_alike(dtype):
    features, labels = torch.rand(3, 2, 2, 2), torch.tensor([0, 3, 255]).repeat(3, 3, 1)
    want = trained(features, labels)
    got = trained(features, labels.to(dtype))
    assert torch.equal(got.weight, want.weight)


def test_training_on_nothing_that_tells_is_finite():
    labels = torch.randint(CLASSES, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    maps = torch.rand(3, 2, 2, 2)
    constant = torch.cat([maps, torch.full_like(maps, 123.4)], 1)
    assert (trained(constant, labels).weight[2:] == 0).all()
    nothing = trained(maps, torch.full_like(labels, 255))
    assert all((x == 0).all() for x in nothing)
    assert trained(maps[:, :0], labels).weight.shape == (0, CLASSES)
    one = trained(maps[:1, :, :1, :1], labels[:1])
    assert all(x.isfinite().all() for x in one)


@pytest.mark.parametrize("option", [{"classes": 0}, {"epochs": 0}, {"batch": 0}])
def test_training_refuses_what_makes_no_sense(option):
    maps, labels = torch.rand(3, 2, 2, 2), torch.zeros(3, 4, 4).long()
    (name,) = option
    with pytest.raises(ValueError, match=rf"densekit.probes.train_linear_probe: {name} is 0; give"):
        train_linear_probe(maps, labels, **{"classes": 2} | option)


def test_training_refuses_maps_that_do_not_fit():
    maps, labels = torch.rand(3, 2, 2, 2), torch.zeros(3, 4, 4).long()
    for empty, found in ((maps[:0], "the number of maps is 0"), (maps[:, :, :0], "a map is 0 x 2")):
        with pytest.raises(ValueError, match=f"train_linear_probe: {found}; give"):
            train_linear_probe(empty, labels[: len(empty)], classes=2)
    with pytest.raises(TypeError, match=r"train_linear_probe: argument 'labels'.*n=3"):
        train_linear_probe(maps, labels[:2], classes=2)


# ------------------------------------------------------------------- support vector machine


@st.composite
def images_with_classes(draw):
    """Rows and targets, at times apart, at times mixed; every class has both kinds."""
    generator, n, d = draw(generators()), draw(st.integers(4, 20)), draw(st.integers(1, 4))
    features, targets = uniform(generator, n, d, low=-1), flips(generator, n, 3)
    targets[0], targets[1] = True, False
    gap = draw(st.sampled_from([0.0, 0.5, 3.0]))
    features[:, 0] += gap * (targets[:, 0] * 2.0 - 1)
    return features, targets, draw(st.sampled_from([0.1, 1.0, 10.0]))


@given(images_with_classes())
def test_the_svm_is_that_of_liblinear(case):
    features, targets, cost = case
    got = fit_svm(features, targets, cost=cost)
    for c in range(3):
        oracle = LinearSVC(C=cost, loss="squared_hinge", dual=False, tol=1e-10, max_iter=10_000)
        oracle.fit(features.numpy(), targets[:, c].numpy())
        want = torch.from_numpy(oracle.coef_[0]), torch.from_numpy(oracle.intercept_)[0]
        torch.testing.assert_close(got.weight[:, c].double(), want[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.bias[c].double(), want[1], rtol=1e-4, atol=1e-4)


@given(images_with_classes(), generators(), st.data())
def test_the_svm_is_at_the_minimum_whatever_the_order_and_the_other_classes(case, generator, data):
    features, targets, cost = case
    got = fit_svm(features, targets, cost=cost)
    sign, x = targets * 2.0 - 1, nn.functional.pad(features, (0, 1), value=1.0)
    weight = torch.cat([got.weight, got.bias[None]]).double()
    slack = (1 - sign * (x @ weight)).clamp(min=0)
    slope = weight - 2 * cost * x.mT @ (sign * slack)
    # The weights are float32: the slope at them is their rounding times the curvature.
    curvature = 1 + 2 * cost * x.square().sum()
    assert (slope.abs() <= 1e-6 * curvature * weight.abs().amax().clamp(min=1)).all()
    order, c = torch.randperm(len(x), generator=generator), data.draw(st.integers(0, 2))
    one = fit_svm(features[order], targets[order, c : c + 1], cost=cost)
    alone = [part[..., c : c + 1] for part in got]
    torch.testing.assert_close([*one], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.prior, targets.float().mean(0))


@given(images_with_classes(), generators())
def test_a_row_that_is_not_finite_is_left_out_of_the_svm(case, generator):
    features, targets, cost = case
    lost = flips(generator, len(features))
    spoiled = torch.where(lost[:, None], torch.nan, features)
    got = fit_svm(spoiled, targets, cost=cost)
    want = fit_svm(features[~lost], targets[~lost], cost=cost)
    torch.testing.assert_close([*got], [*want], rtol=1e-4, atol=1e-4)


@given(images_with_classes(), generators())
def test_a_weight_counts_an_image_as_often_as_it_says(case, generator):
    features, targets, cost = case
    times = torch.randint(0, 3, (len(features),), generator=generator)
    weights = times.float()[:, None].expand(targets.shape).contiguous()
    got = fit_svm(features, targets, weights, cost=cost)
    want = fit_svm(
        features.repeat_interleave(times, 0), targets.repeat_interleave(times, 0), cost=cost
    )
    torch.testing.assert_close([*got][:2], [*want][:2], rtol=1e-4, atol=1e-4)
    none = torch.zeros_like(weights)
    none[:, 0] = 1
    one = fit_svm(features, targets, none, cost=cost)
    alone = fit_svm(features, targets[:, :1], cost=cost)
    torch.testing.assert_close(one.weight[:, :1], alone.weight, rtol=1e-4, atol=1e-4)
    assert not one.weight[:, 1:].any()


def test_the_svm_of_nothing_is_finite_and_of_one_kind_sure():
    rows = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    for targets, side in ((torch.ones(5, 2), 1), (torch.zeros(5, 2), -1)):
        svm = fit_svm(rows, targets.bool(), cost=100.0)
        assert (side * (rows @ svm.weight + svm.bias) > 0.9).all()
    for features, targets in ((rows[:0], torch.ones(0, 2)), (rows, torch.ones(5, 0))):
        svm = fit_svm(features, targets.bool())
        assert svm.weight.shape == (3, targets.shape[1])
        assert all(x.isfinite().all() for x in svm)
    assert (fit_svm(rows[:0], torch.ones(0, 2).bool()).weight == 0).all()


@pytest.mark.parametrize("options", [{"cost": 0.0}, {"cost": math.nan}, {"iterations": 0}])
def test_the_svm_refuses_what_makes_no_sense(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"densekit.probes.fit_svm: {name} is .*; give"):
        fit_svm(torch.zeros(2, 3), torch.zeros(2, 1).bool(), **options)
    with pytest.raises(TypeError, match=r"fit_svm: argument 'targets'.*n=2"):
        fit_svm(torch.zeros(2, 3), torch.zeros(3, 1).bool())


# ------------------------------------------------------------------------- scores and counts


@given(st.data())
def test_linear_maps_are_the_classifier_at_every_cell(data):
    n, d = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3))
    maps = data.draw(tensors((n, d, *data.draw(sizes(high=4)))), label="maps")
    probe = LinearProbe(*(data.draw(tensors(shape)) for shape in ((d, 5), (5,), (5,))))
    got = linear_maps(probe, maps)
    want = (maps.movedim(1, -1) @ probe.weight + probe.bias).movedim(-1, 1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_maps_are_float32_also_under_autocast(dtype):
    maps = torch.rand(2, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    probe = LinearProbe(maps[0, :, 0], maps[0, 0, 0], maps[0, 0, 0])
    want = linear_maps(probe, maps.to(dtype).float())
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_maps(probe, maps.to(dtype))
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    with pytest.raises(TypeError, match="linear_maps"):
        linear_maps(probe, maps[:, 1:])


@given(st.data())
def test_counts_are_those_of_scores_resized_by_torch(data):
    n, clusters = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    scores = data.draw(tensors((n, clusters, *data.draw(sizes(high=4)))), label="scores").float()
    big, generator = data.draw(sizes()), data.draw(generators())
    labels = torch.randint(-1, 6, (n, *big), generator=generator)
    ignore = data.draw(st.integers(0, 5), label="ignore")
    classes = data.draw(st.sampled_from([None, 1, 5]), label="classes")
    up = nn.functional.interpolate(scores, big, mode="bilinear").argmax(1)
    got = segmentation_counts(scores, labels, classes=classes, ignore=ignore)
    assert got.shape == (n, classes or clusters, clusters)
    for one, y, guess in zip(got, labels, up, strict=True):
        want = torch.zeros(classes or clusters, clusters, dtype=torch.long)
        for a, b in zip(y.flatten().tolist(), guess.flatten().tolist(), strict=True):
            if a != ignore and 0 <= a < len(want):
                want[a, b] += 1
        assert torch.equal(one, want)


@given(generators(), sizes())
def test_the_scores_of_the_labels_themselves_count_on_the_diagonal(generator, size):
    labels = torch.randint(0, CLASSES, (3, *size), generator=generator)
    scores = nn.functional.one_hot(labels, CLASSES).movedim(-1, 1).float()
    got = segmentation_counts(scores, labels.to(torch.uint8))
    assert torch.equal(got.sum(0), got.sum(0).diagonal().diag())
    assert (got.sum((1, 2)) == size[0] * size[1]).all()
    halves = torch.cat([segmentation_counts(scores[k], labels[k]) for k in (slice(1), slice(1, 3))])
    assert torch.equal(halves, got)


def test_a_pixel_whose_scores_are_nan_is_not_counted():
    scores = torch.eye(2).expand(1, 2, 2, 2).clone()
    labels = torch.tensor([[[0, 1], [1, 0]]])
    want = segmentation_counts(scores, torch.tensor([[[-1, 1], [1, 0]]]))
    scores[0, 1, 0, 0] = torch.nan
    assert torch.equal(segmentation_counts(scores, labels), want)


@given(generators(), sizes(), st.sampled_from([torch.float32, torch.float16, torch.float64]))
def test_a_score_of_minus_infinity_excludes_a_class_and_no_pixel(generator, size, dtype):
    scores = uniform(generator, 2, 5, 4, 3).to(dtype)
    labels = torch.randint(0, 5, (2, *size), generator=generator)
    excluded = torch.arange(5) > 2
    for axis in (slice(None), 0):  # everywhere, or in one row of cells
        infinite, low = scores.clone(), scores.clone()
        infinite[:, excluded, axis], low[:, excluded, axis] = -torch.inf, -3e4
        got = segmentation_counts(infinite, labels)
        assert got.sum() == labels.numel()
        if axis == slice(None):
            assert torch.equal(got, segmentation_counts(low, labels))


@pytest.mark.parametrize("size", [(0, 8), (8, 0)])
def test_maps_without_a_cell_are_refused_by_the_name_of_the_function(size):
    maps, labels = torch.rand(2, 3, 4, 4), torch.zeros(2, 8, 8).long()
    cases = [
        (segmentation_counts, "a map of scores", (maps.new_zeros(2, 3, *size), labels), {}),
        (segmentation_counts, "a label map", (maps, labels.new_zeros(2, *size)), {}),
        (train_linear_probe, "a label map", (maps, labels.new_zeros(2, *size)), {"classes": 2}),
    ]
    no_maps, no_labels = maps.new_zeros(2, 3, *size), labels.new_zeros(2, *size)
    cases += [
        (linear_segmentation, "a map", (no_maps, no_maps, labels, labels), {"classes": 2}),
        (linear_segmentation, "a label map", (maps, maps, no_labels, no_labels), {"classes": 2}),
    ]
    for function, name, arguments, options in cases:
        sentence = f"^densekit.probes.{function.__name__}: {name} is {size[0]} x {size[1]}; give a"
        with pytest.raises(ValueError, match=sentence):
            function(*arguments, **options)


def test_linear_segmentation_leaves_out_what_is_not_finite():
    generator = torch.Generator().manual_seed(0)
    (train, labels), (test, test_labels) = (stripes(generator, n, 3) for n in (4, 2))
    options = {"classes": CLASSES, "stride": 3}
    for maps in (train, test):
        maps[0, 1, 2, 3] = torch.nan
    assert linear_segmentation(train, test, labels, test_labels, **options).miou == 1


def test_counts_of_no_image_are_empty_and_of_no_class_refused():
    scores, labels = torch.zeros(2, 3, 2, 2), torch.zeros(2, 4, 4).long()
    assert segmentation_counts(scores[:0], labels[:0], classes=5).shape == (0, 5, 3)
    with pytest.raises(ValueError, match=r"probes.segmentation_counts: classes is 0; give 1"):
        segmentation_counts(scores, labels, classes=0)
    with pytest.raises(ValueError, match=r"segmentation_counts: the number of scores is 0; give 1"):
        segmentation_counts(scores[:, :0], labels)
    with pytest.raises(TypeError, match=r"segmentation_counts: argument 'labels'.*n=2"):
        segmentation_counts(scores, labels[:1])


# ---- the probe on scenes ---------------------------------------------------------------------


def test_the_probe_scores_what_features_know_and_what_the_prior_knows():
    size = (24, 32)
    blind = probe_scenes(torch.zeros_like, count=24, size=size)
    assert blind.miou == blind.prior_miou  # constants can only name the most frequent class
    test = sample_scenes(24, size, generator=torch.Generator().manual_seed(1)).labels
    fit = sample_scenes(24, size, generator=torch.Generator().manual_seed(0)).labels
    offset = slice(2, None, 4)
    frequent = fit[:, offset, offset].flatten().mode().values
    truth = test[:, offset, offset]
    classes = torch.cat([truth.flatten(), frequent[None]]).unique()
    expected = (truth == frequent).float().mean() / len(classes)
    torch.testing.assert_close(blind.prior_miou, expected)

    calls = []

    def oracle(images):
        calls.append(images)
        drawn = sample_scenes(24, size, generator=torch.Generator().manual_seed(len(calls) - 1))
        assert torch.equal(drawn.images, images)
        return torch.nn.functional.one_hot(drawn.labels, 12).movedim(-1, 1).float()

    assert probe_scenes(oracle, count=24, size=size).miou > 0.99
    assert not torch.equal(*calls)  # it is scored on other scenes than it was fitted on
    other = probe_scenes(lambda x: x, count=24, size=size, seed=1)
    assert other.miou != probe_scenes(lambda x: x, count=24, size=size).miou


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_weight_that_is_no_weight_counts_as_zero(bad):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, generator=generator)
    targets = torch.rand(30, 3, generator=generator) > 0.5
    weights = torch.ones(30, 3)
    weights[0, 1] = bad
    got = fit_svm(features, targets, weights)
    want = fit_svm(features, targets, torch.where(weights == 1, 1.0, 0.0))
    assert torch.equal(got.weight, want.weight)
    assert got.weight.isfinite().all()


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("number", [-1.0, math.nan, math.inf])
def test_a_wrong_rate_of_the_linear_probe_is_named(name, number):
    with pytest.raises(ValueError, match=f"train_linear_probe: {name} is {number}; give a finite"):
        train_linear_probe(
            torch.rand(2, 3, 2, 2), torch.zeros(2, 2, 2).long(), classes=2, **{name: number}
        )
