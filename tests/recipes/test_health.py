"""The health of features: what counts as a collapse, and that measuring changes nothing else."""

import importlib
import importlib.util
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import adapt
import harness
import minimal
import pytest
import torch
from downstream import encoders, health
from files import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import on_processes
from scipy import stats
from strategies import generators
from test_adapt import SMALL as ADAPT
from torch import nn
import densekit as dk

MINIMAL = minimal.Config(size=32, grid=3, batch=8, workers=0, device="cpu", log_every=1)
# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def of_maps(maps):
    return health.Maps(maps, maps)


def gaussian(generator, *shape):
    return torch.randn(shape, generator=generator)


def turn(generator, d):
    return torch.linalg.qr(gaussian(generator, d, d)).Q


def run_of(rank=0, rows=()):
    """What a monitor needs of a run."""
    world = harness.World(rank, 2, torch.device("cpu"))
    return SimpleNamespace(world=world, rows=lambda *_: list(rows))


class Shown(nn.Module):
    """A network whose maps are given; it is no ViT."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps
        self.feature_info = [{}]

    def forward_intermediates(self, images, **_):
        return [self.maps]


def monitor_of(maps, **options):
    return health.Monitor(Shown(maps), [torch.zeros(1, 3, 8, 8)], run_of(), **options)


# ---- tokens ----------------------------------------------------------------------------------
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 70))
def test_tokens_are_few_and_of_many_images(images, h, w):
    maps = torch.arange(images * h * w).view(images, 1, h, w)
    kept = health.keep_tokens(maps)
    tokens = kept.numel()
    assert min(images * h * w, health.TOKENS // 4) <= tokens or len(kept) == images
    assert tokens <= health.TOKENS
    assert len(kept) >= min(images, health.IMAGES)
    assert len(set(kept.flatten().tolist())) == tokens
    assert torch.equal(health.keep_tokens(health.thin(maps)), kept)
    if h * w <= health.TOKENS // health.IMAGES:
        assert torch.equal(kept, maps[: len(kept)].float())


def test_the_maps_of_a_vit_come_with_those_before_its_norm():
    network = encoders.build("tiny-vit").eval()
    images = torch.randn(2, 3, 64, 64)
    found = health.encode(network, images)
    torch.testing.assert_close(found.last, encoders.last_map(network, images))
    (before,) = dk.layer_features(network, images, ["blocks.2"], patch=8).values()
    torch.testing.assert_close(found.before_norm, before)
    # A token of great length shows before the norm alone.
    long = before.detach().clone()
    long[0, :, 0, 0] *= 100
    normed = dk.rows_to_map(network.norm(dk.map_to_rows(long)), (8, 8))
    scores = [health.measure(health.Maps(normed, x))["norm_outliers"] for x in (long, normed)]
    assert [round(float(x) * 128) for x in scores] == [1, 0]

    encoder = encoders.load_encoder("random:tiny")
    plain = health.encode(encoder, torch.rand(2, 3, 64, 64))
    assert plain.last.shape == plain.before_norm.shape == (2, 64, 8, 8)


# ---- a collapse ------------------------------------------------------------------------------
@st.composite
def healthy(draw):
    """Maps of features that use all their dimensions, and a generator."""
    generator = draw(generators())
    return gaussian(generator, draw(st.integers(2, 6)), draw(st.integers(8, 16)), 5, 5), generator


def say_of(monitor, maps):
    """What a monitor says has collapsed, once the network gives these maps."""
    monitor.network.maps = maps
    monitor.measure()
    return monitor.collapse


@settings(max_examples=25)
@given(healthy(), st.floats(-3, 3), st.floats(0.01, 0.05))
def test_a_planted_collapse_is_found_and_turned_or_scaled_features_are_none(case, exponent, rest):
    maps, generator = case
    _, d, h, w = maps.shape
    monitor = monitor_of(maps)
    start = monitor.measure()
    assert say_of(monitor, maps) == ""
    turned = dk.map_to_rows(maps) @ turn(generator, d) * 10.0**exponent
    turned = dk.rows_to_map(turned, (h, w))
    assert say_of(monitor, turned) == ""
    for name, value in monitor.score(of_maps(turned)).items():
        assert abs(value - start[name]) < 1e-3 * max(1, abs(start[name]))

    one_point = gaussian(generator, 1, d, 1, 1)
    one_point = one_point / one_point.norm() * d**0.5
    assert "mean cosine" in say_of(monitor, one_point + rest * maps)
    assert say_of(monitor, torch.zeros_like(maps)) != ""
    few = turn(generator, d)[: d // 8]  # the directions that are left
    flat = dk.rows_to_map(dk.map_to_rows(maps) @ few.T @ few, (h, w))
    assert "effective rank" in say_of(monitor, flat)
    assert say_of(monitor, maps) == ""


@settings(max_examples=10)
@given(healthy(), st.floats(0.1, 0.9))
def test_the_share_says_how_much_may_be_lost(case, share):
    start = health.measure(of_maps(case[0]))
    weaker = dict(start)
    weaker["effective_rank"] = start["effective_rank"] * share * 1.01
    assert health.find_collapse(weaker, start, share) == ""
    weaker["effective_rank"] = start["effective_rank"] * share * 0.99
    assert health.find_collapse(weaker, start, share) != ""
    assert health.find_collapse(weaker, start, 0.0) == ""


def test_features_that_are_not_finite_have_no_scores():
    maps = torch.randn(2, 8, 5, 5)
    monitor = monitor_of(maps)
    maps[0, 0, 0, 0] = torch.inf
    assert monitor.measure() == {}
    assert monitor.collapse == ""


@pytest.mark.parametrize(("against_start", "known"), [(False, "99.0"), (True, "77.0")])
def test_the_log_says_what_to_compare_with_and_a_warning_comes_once(against_start, known, capsys):
    maps = torch.randn(2, 16, 5, 5)
    rows = [{"effective_rank": x, "off_diagonal_cosine": 0.0} for x in (77.0, 99.0, 88.0)]
    monitor = health.Monitor(
        Shown(maps), [torch.zeros(1, 3, 8, 8)], run_of(rows=rows), against_start=against_start
    )
    for step in (20, 40):
        monitor.measure()
        monitor.warn(step)
    assert re.fullmatch(
        r"warning: The features collapse at step 20: their effective rank is [\d.]+, and was "
        rf"{known}\.\n",
        capsys.readouterr().err,
    )


def ask(rank, group):
    monitor = health.Monitor(Shown(None), [torch.zeros(1, 3, 8, 8)], run_of(rank))
    if rank == 0:
        monitor.collapse = "all"
    return monitor.collapse_on_all(), monitor.measure() if rank else {}, monitor.known


def test_all_processes_hear_of_a_collapse_and_one_measures():
    assert on_processes(2, ask) == [("all", {}, [])] * 2


def test_measuring_leaves_the_network_and_the_random_numbers_as_they_are():
    network = encoders.build("tiny").train()
    network.layer1.eval()
    modes = [x.training for x in network.modules()]
    state = {name: x.clone() for name, x in network.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    draws = torch.get_rng_state()
    monitor = health.Monitor(network, [images, images.flip(-1)], run_of())
    first = monitor.measure_all()
    assert list(first) == list(health.SCORES)
    assert monitor.measure_all() == first
    assert [x.training for x in network.modules()] == modes
    assert torch.equal(draws, torch.get_rng_state())
    assert all(torch.equal(x, state[name]) for name, x in network.state_dict().items())


# ---- runs ------------------------------------------------------------------------------------
def read_rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def scenes(monkeypatch):
    """Runs on few scenes, which are not scored."""
    images = harness.SceneImages
    monkeypatch.setattr(harness, "SceneImages", lambda _: images(16))
    monkeypatch.setattr(adapt, "score", lambda *_: {})
    monkeypatch.setattr(minimal, "probe", lambda *_: 0.0)


@pytest.mark.usefixtures("scenes")
@pytest.mark.parametrize("name", ["adapt", "minimal"])
def test_a_run_logs_its_health_and_is_the_same_without(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    config = replace({"adapt": ADAPT, "minimal": MINIMAL}[name], epochs=1)
    module.train(replace(config, run=tmp_path / "with"))
    rows = read_rows(tmp_path / "with")
    steps = [row["step"] for row in rows if "loss" in row]
    quick = health.SCORES[:4]
    assert [row["step"] for row in rows if "dense_structure" in row] == [0, steps[-1]]
    for row in rows:
        found = tuple(score for score in health.SCORES if score in row)
        assert found == quick if "loss" in row else found in ((), health.SCORES)
        assert all(math.isfinite(row[score]) for score in found)
    for method in ("measure", "measure_all"):
        monkeypatch.setattr(health.Monitor, method, lambda _: {})
    monkeypatch.setattr(adapt, "print_results", lambda *_: None)
    module.train(replace(config, run=tmp_path / "without"))
    plain = [{x: row[x] for x in row if x not in health.SCORES} for row in rows]
    assert read_rows(tmp_path / "without") == plain


@pytest.mark.usefixtures("scenes")
def test_a_collapse_in_a_recipe_is_said_within_a_hundred_steps(tmp_path, monkeypatch, capsys):
    def be_alike(self, images, views, valid):
        maps = encoders.last_map(self.encoder, images[0])
        rows = dk.l2_normalize(dk.map_to_rows(maps).flatten(0, 1))
        unused = sum(x.sum() for x in self.parameters()) * 0
        return unused - rows.mean(0).square().sum()

    monkeypatch.setattr(minimal.Minimal, "forward", be_alike)
    minimal.train(replace(MINIMAL, run=tmp_path, epochs=10, log_every=10, lr=1.0))
    said = re.findall(r"The features collapse at step (\d+)", capsys.readouterr().err)
    assert len(said) == 1
    assert int(said[0]) <= 20


@pytest.mark.parametrize("size", [(64, 96), (300, 296)])
def test_the_protocol_measures_the_first_images(size, monkeypatch):
    monkeypatch.setattr(
        health, "measure_structure", lambda _, seeds: {"dense_structure": seeds - 1.0}
    )
    encoder = encoders.load_encoder("random:tiny")
    images = torch.rand(40 if size == (64, 96) else 9, 3, *size)
    samples = [SimpleNamespace(image=image) for image in images]
    batches = [samples[start : start + 7] for start in range(0, len(samples), 7)]
    found = health.health(encoder, batches, None, Path())
    with torch.no_grad():
        kept = of_maps(health.keep_tokens(encoder(images)))
    want = {name: float(value) for name, value in health.measure(kept).items()}
    want |= {"dense_structure": 2.0, "tokens": kept.last[:, 0].numel()}
    assert found == pytest.approx(want, rel=1e-3, abs=1e-3)


# ---- the study -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def study():
    """benchmarks/health.py, by its path: a module of downstream/ has the same name."""
    specification = importlib.util.spec_from_file_location(
        "health_study", ROOT / "benchmarks" / "health.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=20))
def test_the_study_correlates_as_scipy_does(study, pairs):
    x, y = torch.tensor([*pairs, (0, 1), (1, 0)], dtype=torch.float64).T
    torch.testing.assert_close(study.spearman(x, y).item(), stats.spearmanr(x, y).statistic)


def test_the_study_has_a_column_for_each_set_and_large_architecture(study):
    rows = []
    for number in range(12):
        architecture = "tiny" if number % 3 else "resnet18"
        scores = dict.fromkeys(study.SCORES, float(number))
        miou = [number / 20, 0.0, 1.0]
        rows.append({"set": "a", "architecture": architecture, "miou": miou, **scores})
    head, _, *lines = study.table(rows).splitlines()
    assert head == "| score | better | a, all 12 | a, 8 of `tiny` |"
    assert [line.split("|")[3] for line in lines] == [" 1.00 [1.00, 1.00] "] * len(study.SCORES)
    assert "constant" in study.table([row | {"norm_outliers": 0.0} for row in rows])
