"""PiCIE and its baselines: losses against slow ones, clusters of an epoch, whole runs."""

import inspect
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import densesiam_segment
import harness
import picie
import pytest
import torch
import torch._dynamo  # before any fork: importing it in the children takes long
from downstream import encoders, segmentation
from hypothesis import given
from hypothesis import strategies as st
from picie import PRESETS, Segmenter, cluster_weights, nearest, train
from safetensors.torch import load_file
from test_densesiam_segment import WRONG as SEGMENT_WRONG
from test_densesiam_segment import batch, folder, slow_replay, two_processes
from test_recipes import launch, rows
from torch.nn.functional import normalize
import densekit as dk

__all__ = ["folder"]  # a fixture
OWN = {"--segment", "--region", "--region-start", "--sim"}  # of DenseSiam alone
# Arguments that make no sense, and how the sentence that answers them begins.
WRONG = [
    *(row for row in SEGMENT_WRONG if row[0][0] not in OWN),
    (["--preset", "mdc"], "--data is missing: the preset mdc"),
    (["--preset", "iic"], "--data is missing: the preset iic"),
    (["--pixels", "0"], "--pixels is 0"),
    (["--radius", "-1"], "--radius is -1"),
]
SMALL = replace(
    PRESETS["demo"], image=32, size=32, aux=8, pixels=8, batch=8, epochs=2, workers=0,
    device="cpu", log_every=1, save_every=5,
)  # fmt: skip
METHODS = ["picie", "mdc", "iic"]


def small_on(folder, **changes):
    return replace(SMALL, data=folder, **changes)


def test_the_views_are_densesiams_word_for_word():
    """It took them from PiCIE: their geometry is tested in test_densesiam_segment.py."""
    for name in ("photometric", "TwoViews", "replay"):
        own, other = (
            inspect.getsource(getattr(module, name)) for module in (picie, densesiam_segment)
        )
        assert own == other


# ---- the loss --------------------------------------------------------------------------------


def with_clusters(method, **changes):
    """A small model of 5 classes, whose clusters are random, and those of the cells of a batch."""
    torch.manual_seed(0)
    model = Segmenter(replace(SMALL, method=method, **changes), 5).double()
    draws = torch.Generator().manual_seed(1)
    for clusters in model.clusters.values():
        shape = clusters.centroids.shape
        clusters.centroids.copy_(0.2 * torch.randn(shape, generator=draws))
        clusters.weights.copy_(torch.rand(shape[:2], generator=draws))
    if method == "iic":
        return model, {}
    model.add_labeler()
    with torch.no_grad():
        for parameter in model.labeler.parameters():  # the pyramid has been trained since
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    return model, model.assign(*batch())


def slow_terms(model, images, view, labels):
    """The losses, in plain torch, cell by cell or pair by pair."""
    maps = [model.pyramid(x) for x in images[: model.views]]
    if model.views == 2:
        views = zip(maps[1], view.box, view.flip, strict=True)
        maps[1] = torch.stack([slow_replay(*x) for x in views])
    cells = [x.movedim(1, -1).flatten(0, 2) for x in maps]
    unit = [normalize(x) for x in cells]

    def entropy(logits, labels, weights):
        chances = logits.exp() / logits.exp().sum(1, keepdim=True)
        losses = [-chances[i, k].log() for i, k in enumerate(labels.flatten().tolist())]
        weights = weights[labels.flatten()]
        return (weights * torch.stack(losses)).sum() / weights.sum()

    terms = {}
    for name in ("dense", "aux") if model.config.aux else ("dense",):
        if model.config.method == "picie":
            of = model.clusters[name]
            pairs = {
                (i, j): entropy(unit[i] @ of.centroids[j].T, labels[name][j], of.weights[j])
                for i in range(2)
                for j in range(2)
            }
            terms[name] = sum(pairs.values()) / 4
            if name == "dense":
                terms["within"] = (pairs[0, 0] + pairs[1, 1]) / 2
                terms["cross"] = (pairs[0, 1] + pairs[1, 0]) / 2
        elif model.config.method == "mdc":
            layer = model.classifiers[name]
            logits = unit[0] @ layer.weight.T + layer.bias
            terms[name] = entropy(logits, labels[name][0], model.clusters[name].weights[0])
        else:
            layer = model.classifiers[name]
            shares = [
                torch.softmax(x.movedim(1, -1) @ layer.weight.T + layer.bias, -1) for x in maps
            ]
            terms[name] = slow_information(*shares, model.config.radius)
    return terms


def slow_information(near, whole, radius):
    """IIC's loss of maps of shares (b, h, w, k), by the pairs of cells of each displacement."""
    h, w = near.shape[1:3]
    losses = []
    for down in range(-radius, radius + 1):
        for right in range(-radius, radius + 1):
            table = 0
            for y in range(max(0, -down), min(h, h - down)):
                for x in range(max(0, -right), min(w, w - right)):
                    one, other = near[:, y, x], whole[:, y + down, x + right]
                    table = table + one.T @ other + other.T @ one
            table = table / table.sum()
            sides = table.sum(1)[:, None] * table.sum(0)
            losses.append(-(table * (table / sides).log()).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("picie", {}),
        ("picie", {"aux": 0}),
        ("mdc", {"aux": 0}),
        ("mdc", {}),
        ("iic", {"radius": 0, "aux": 0}),
        ("iic", {"radius": 1}),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_a_slow_one(method, changes):
    model, labels = with_clusters(method, **changes)
    loss, terms = model(*batch())
    slow = slow_terms(model, *batch(), labels)
    torch.testing.assert_close(terms, slow)
    total = slow["dense"]
    if model.config.aux:
        n, m = math.log(5), math.log(model.config.aux)
        total = m / (n + m) * slow["dense"] + n / (n + m) * slow["aux"]
    torch.testing.assert_close(loss, total)
    # There are no weights that nothing trains, which DDP would wait for.
    parameters = [x for x in model.parameters() if x.requires_grad]
    found, expected = (torch.autograd.grad(x, parameters) for x in (loss, total))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_a_pixel_and_its_partner_lie_at_most_as_far_apart_as_the_map_is_wide():
    model, _ = with_clusters("iic", aux=0, radius=99)
    found = model(*batch())[0]
    model.config = replace(model.config, radius=model.pyramid(batch()[0][0]).shape[-1] - 1)
    torch.testing.assert_close(model(*batch())[0], found)


@pytest.mark.parametrize("method", ["picie", "mdc"])
def test_the_cluster_of_a_cell_is_the_nearest_centroid_of_its_view(method):
    model, labels = with_clusters(method)
    images, view = batch()
    labeler = model.labeler.eval()
    maps = [labeler(images[0]), picie.replay(labeler(images[1]), view)]
    for name, clusters in model.clusters.items():
        assert len(labels[name]) == model.views
        for x, centroids, found in zip(maps, clusters.centroids, labels[name], strict=False):
            unit = normalize(x.flatten(2).mT, dim=-1)
            assert torch.equal(found, torch.cdist(unit, centroids).argmin(-1))


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_the_nearest_centroid_is_densekits_and_its_distance_is_euclidean(n, k, seed):
    draws = torch.Generator().manual_seed(seed)
    points = normalize(torch.randn(n, 4, generator=draws, dtype=torch.float64), dim=-1)
    centroids = torch.randn(k, 4, generator=draws, dtype=torch.float64) / 2
    labels, distance = nearest(points, centroids)
    assert torch.equal(labels, dk.nearest_centroids(points, centroids))
    torch.testing.assert_close(distance, (points - centroids[labels]).square().sum(-1))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_the_weights_of_the_clusters(counts):
    counts = torch.tensor(counts)
    plain, frequent, balanced = (
        cluster_weights(counts, x) for x in ("plain", "frequency", "balanced")
    )
    assert (plain == 1).all()
    torch.testing.assert_close(frequent * counts.sum(), counts.float())
    assert balanced.isfinite().all()
    shares = (balanced * counts)[counts > 0]  # each cluster that has pixels counts the same
    torch.testing.assert_close(shares, shares.new_full(shares.shape, float(shares.mean())))
    torch.testing.assert_close(shares.sum(), counts.sum().float())


# ---- runs ------------------------------------------------------------------------------------


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr(segmentation, "draw", lambda *_: None)


def stop_after_each_step(monkeypatch):
    monkeypatch.setattr(harness.Run, "stop_requested", lambda self: True)


SLOW = [pytest.param(method, 8, marks=pytest.mark.slow) for method in METHODS]


@pytest.mark.parametrize(("method", "aux"), [("picie", 0), *SLOW])
@pytest.mark.usefixtures("without_pictures")
def test_a_run_resumes_in_the_middle_and_at_the_end_of_an_epoch(
    method, aux, tmp_path, folder, monkeypatch
):
    config = small_on(folder, method=method, aux=aux)  # 2 batches an epoch, 4 steps
    train(replace(config, run=tmp_path / "whole"))
    whole = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert [row["step"] for row in rows(tmp_path / "whole")] == [1, 2, 3, 4]
    assert [row["step"] for row in rows(tmp_path / "whole", "miou")] == [0, 4]
    found = [] if method == "iic" else [0, 2, 4]
    assert [row["step"] for row in rows(tmp_path / "whole", "distance")] == found

    halted = tmp_path / "halted"
    with monkeypatch.context() as patch:
        stop_after_each_step(patch)
        for step in (1, 2):
            train(replace(config, run=halted))
            assert len(rows(halted)) == step
    train(replace(config, run=halted))
    assert (halted / "metrics.jsonl").read_text() == whole
    for name in ("encoder", "segmenter"):
        left, right = (load_file(x / f"{name}.safetensors") for x in (tmp_path / "whole", halted))
        torch.testing.assert_close(left, right, rtol=0, atol=0)

    side_car = json.loads((halted / "segmenter.json").read_text())
    assert (side_car["method"], side_car["step"]) == (method, 4)
    model = Segmenter(config, 12)
    model.load_state_dict(load_file(halted / "segmenter.safetensors"))
    assert sorted(model.names.tolist()) == list(range(12))
    assert encoders.load_encoder(str(halted)).facts["method"] == method


@pytest.mark.parametrize("weighting", ["frequency", "balanced"])
def test_empty_clusters_make_no_value_nan(weighting, monkeypatch):
    model, _ = with_clusters("picie", weighting=weighting)
    equal = torch.ones(3, 2, 4, picie.WIDTH, dtype=torch.float64) / picie.WIDTH**0.5
    monkeypatch.setattr(picie, "take_pixels", lambda *_: (equal, torch.arange(3)))
    run = SimpleNamespace(check=lambda: None)
    optimizer = torch.optim.Adam(model.parameters())
    with harness.process_group("cpu"):
        found = picie.renew_clusters(model, optimizer, [], run, 0)
        loss, _ = model(*batch())
    assert found["used"] == 1
    assert found["distance"] < 1e-6
    loss.backward()
    for x in (loss, *model.buffers(), *(x.grad for x in model.pyramid.parameters())):
        assert x.isfinite().all()


def test_two_processes_make_the_clusters_of_one(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(picie, "evaluate", lambda *_: None)
    config = small_on(folder, aux=0, epochs=1)
    launch(of_two, "picie", replace(config, run=tmp_path / "two"))
    train(replace(config, run=tmp_path / "one"))
    one, two = (rows(tmp_path / run, "distance") for run in ("one", "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [0, 2]
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    # The first step, too, has the labels and the weights of all images of both.
    first = [rows(tmp_path / run)[0]["loss"] for run in ("one", "two")]
    assert first[1] == pytest.approx(first[0], rel=0.02)  # batch norm's statistics are of a half


def of_two(rank, name, port, config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_densesiam_segment.train", train)
        two_processes(rank, name, port, config)


def test_the_paper_presets_are_the_papers():
    paper, mdc, iic = (PRESETS[x] for x in ("paper", "mdc", "iic"))
    for preset in (paper, mdc, iic):
        assert (preset.arch, preset.batch, preset.epochs) == ("resnet18", 128, 10)
        assert (preset.lr, preset.weight_decay, preset.image, preset.size) == (1e-4, 0, 640, 320)
        assert preset.weighting == "frequency"
    assert [x.method for x in (paper, mdc, iic)] == METHODS
    assert [x.aux for x in (paper, mdc, iic)] == [128, 0, 3 * 27]
