"""The DenseSiam recipe: its losses against the paper's formulas. Its runs: test_recipes.py."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import densesiam
import pytest
import torch
import torchvision
from densesiam import PRESETS, DenseSiam, Loss, Views
from downstream import encoders
from downstream.encoders import last_map
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from steps import step_on_part
from strategies import generators
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, normalize, softmax
import densekit as dk
from densekit.testing import assert_world_size_invariant

SEEDS = torch.arange(4)  # of the images of `batch`
SMALL = replace(
    PRESETS["demo"], hidden=32, categories=16, batch=8, epochs=2, workers=0, log_every=1,
    save_every=3, views=Views(size=32), device="cpu",
)  # fmt: skip

# Wrong options, and how the sentence about each of them begins.
WRONG = [
    (["--freeze", "-1"], "--freeze is -1"),
    (["--freeze", "9"], "--freeze is 9"),
    (["--weights", " "], "--weights is empty"),
    (["--weights", "nowhere"], "nowhere does not exist"),
    (["--weights", "timm:no_such_net", "--freeze", "1"], "--weights is timm:no_such_net"),
    (["--arch", "resnet5"], "--arch is resnet5"),
    (["--arch", "vit_small_patch14_dinov2"], "--views.size is 48: give a multiple of 14, the"),
    (
        ["--arch", "swin_tiny_patch4_window7_224"],
        "--views.size is 48: swin_tiny_patch4_window7",
    ),
    (["--weights", "timm:resnet5"], "--weights is timm:resnet5"),
    (["--weights", "torchvision:mnasnet1_0"], "--weights is torchvision:mnasnet1_0"),
    (["--hidden", "3"], "--hidden is 3"),
    (["--categories", "1"], "--categories is 1"),
    (["--batch", "1"], "--batch is 1"),
    (["--epochs", "0"], "--epochs is 0"),
    (["--lr", "-1"], "--lr is -1"),
    (["--lr", "nan"], "--lr is nan"),
    (["--weight-decay", "-0.1"], "--weight-decay is -0.1"),
    (["--weight-decay", "nan"], "--weight-decay is nan"),
    (["--seed", "-1"], "--seed is -1"),
    (["--workers", "-1"], "--workers is -1"),
    (["--log-every", "0"], "--log-every is 0"),
    (["--save-every", "0"], "--save-every is 0"),
    (["--views.size", "0"], "--views.size is 0"),
    (["--arch", "resnet18", "--views.size", "48"], "--views.size is 48: give a multiple of 32"),
    (["--views.scale", "1.0", "0.2"], "--views.scale is 1.0 0.2"),
    (["--views.scale", "0.0", "1.0"], "--views.scale is 0.0 1.0"),
    (["--views.scale", "0.2", "1.5"], "--views.scale is 0.2 1.5"),
    (["--views.hue", "0.6"], "--views.hue is 0.6"),
    (["--views.hue", "nan"], "--views.hue is nan"),
    (["--views.vertical-flip", "1.5"], "--views.vertical-flip is 1.5"),
    (["--views.vertical-flip", "nan"], "--views.vertical-flip is nan"),
    (["--views.blur", "2.0", "0.1"], "--views.blur is 2.0 0.1"),
    (["--views.blur", "-1.0", "2.0"], "--views.blur is -1.0 2.0"),
    (["--loss.dense", "-1"], "--loss.dense is -1"),
    (["--loss.dense", "nan"], "--loss.dense is nan"),
    (["--loss.region", "-1"], "--loss.region is -1"),
    (["--loss.region", "inf"], "--loss.region is inf"),
    (["--loss.region-start", "1.5"], "--loss.region-start is 1.5"),
    (["--loss.region-start", "nan"], "--loss.region-start is nan"),
    (["--loss.grid", "-1"], "--loss.grid is -1"),
    (["--loss.grid", "0", "--loss.pooled", "overlap"], "--loss.grid is 0"),
    (["--loss.candidates", "0"], "--loss.candidates is 0"),
    (["--loss.hard-share", "1.5"], "--loss.hard-share is 1.5"),
    (["--loss.points", "hard", "--loss.order", "sample_project_predict"], "--loss.points is hard"),
    (["--loss.points", "hard", "--loss.order", "project_sample_predict"], "--loss.points is hard"),
    (["--loss.correspondence", "pixel_distance"], "--loss.correspondence is pixel_distance"),
    (
        [
            "--loss.correspondence",
            "candidate_regions",
            "--loss.region",
            "0",
            "--loss.points",
            "hard",
        ],
        "--loss.correspondence is candidate_regions",
    ),
    (["--loss.temperature", "0"], "--loss.temperature is 0"),
    (["--loss.temperature", "nan"], "--loss.temperature is nan"),
]


# ---- the method ------------------------------------------------------------------------------


def batch(count=4, size=64):
    pairs = dk.sample_view_pairs((64, 64), (count,), generator=torch.Generator().manual_seed(0))
    # The last pair shares nothing, and must not count.
    boxes = [view.box.clone() for view in pairs[:2]]
    boxes[0][-1], boxes[1][-1] = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 60]])
    views = [dk.View(box, view.flip) for box, view in zip(boxes, pairs[:2], strict=True)]
    return [torch.rand(count, 3, size, size) for _ in range(2)], views


@pytest.mark.parametrize("distance", ["cross_entropy_similarity", "negative_cosine"])
def test_the_losses_are_those_of_the_paper(distance):
    torch.manual_seed(0)
    model = DenseSiam(replace(SMALL, loss=Loss(grid=3, distance=distance))).double()
    images, views = batch()
    images = [x.double() for x in images]
    views = [dk.View(view.box.double(), view.flip) for view in views]
    model.train()
    loss, terms = model(images, views, True, SEEDS)

    maps = [last_map(model.encoder, x) for x in images]
    z = [model.projector(f.mean((2, 3))) for f in maps]
    p = [model.predictor(x) for x in z]
    sim = (
        -sum((normalize(a) * normalize(b)).sum(1).mean() for a, b in zip(p, z[::-1], strict=True))
        / 2
    )
    torch.testing.assert_close(terms["sim"], sim)

    zs = [model.dense_projector(f) for f in maps]
    ps = [model.dense_predictor(x) for x in zs]
    zs, ps, fs = (list(dk.gridsample_pairs(*x, *views, 3)[:2]) for x in (zs, ps, maps))
    keep = slice(0, 3)  # all but the pair that shares nothing

    def d(a, b):
        if distance == "negative_cosine":
            return -(normalize(a, dim=-1) * normalize(b, dim=-1)).sum(-1)[keep].mean()
        return -(b.softmax(-1) * a.log_softmax(-1)).sum(-1)[keep].mean()

    dense = (d(ps[0], zs[1]) + d(ps[1], zs[0])) / 2
    torch.testing.assert_close(terms["dense"], dense)

    # Eq 4 as printed: sum over the points of mask times feature, then all of g'.
    e = [torch.einsum("bnk,bnd->bkd", z.softmax(-1), f) for z, f in zip(zs, fs, strict=True)]
    v = [model.region_projector(x.flatten(0, 1)) for x in e]
    u = [model.region_predictor(x) for x in v]

    def contrast(u, v):
        u, v = (normalize(x, dim=-1).unflatten(0, (4, 16))[keep] for x in (u, v))
        logits = (u @ v.mT / 0.1).flatten(0, 1)
        return cross_entropy(logits, torch.arange(16).repeat(3))

    region = (contrast(u[0], v[1]) + contrast(u[1], v[0])) / 2
    torch.testing.assert_close(terms["region"], region)
    torch.testing.assert_close(loss, sim + dense + 0.1 * region)


def test_regionsim_waits_and_simsiam_has_no_dense_heads():
    model = DenseSiam(SMALL)
    loss, terms = model(*batch(), False, SEEDS)
    loss.backward()
    assert "region" not in terms
    assert all(p.grad is None for p in model.region_projector.parameters())
    baseline = DenseSiam(replace(SMALL, loss=PRESETS["simsiam"].loss))
    names = {name.split(".")[0] for name, _ in baseline.named_parameters()}
    assert names == {"encoder", "projector", "predictor"}
    loss, terms = baseline(*batch(), False, SEEDS)
    assert loss is terms["sim"]


def test_the_gradients_of_pixsim_stop_at_the_teacher():
    torch.manual_seed(0)
    model = DenseSiam(replace(SMALL, loss=Loss(grid=3, region=0.0)))
    images, views = batch()
    parameters = [*model.dense_projector.parameters(), *model.dense_predictor.parameters()]
    _, terms = model(images, views, False, SEEDS)
    found = torch.autograd.grad(terms["dense"], parameters)

    with torch.no_grad():
        maps = [last_map(model.encoder, x) for x in images]
    zs = [model.dense_projector(f) for f in maps]
    ps = [model.dense_predictor(x) for x in zs]
    zs, ps = (list(dk.gridsample_pairs(*x, *views, 3)[:2]) for x in (zs, ps))

    def gradient(teachers):
        ce = [
            -(z.softmax(-1) * p.log_softmax(-1)).sum(-1)[:3].mean()
            for p, z in zip(ps, teachers, strict=True)
        ]
        return torch.autograd.grad(sum(ce) / 2, parameters, retain_graph=True)

    torch.testing.assert_close(found, gradient([zs[1].detach(), zs[0].detach()]))
    with pytest.raises(AssertionError):  # without the stop-gradient they are others
        torch.testing.assert_close(found, gradient([zs[1], zs[0]]))


VARIANTS = [
    {},
    {"order": "project_sample_predict"},
    {"order": "sample_project_predict"},
    {"pooled": "overlap"},
    {"points": "random"},
    {"points": "hard"},
    {"correspondence": "feature_similarity", "region": 0.0},
    {"correspondence": "pixel_distance", "region": 0.0},
    {"correspondence": "candidate_regions", "region": 0.0},
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", VARIANTS)
def test_without_any_overlap_the_loss_is_finite_and_carries_the_graph(changes, precision):
    torch.manual_seed(0)
    model = DenseSiam(replace(SMALL, loss=replace(Loss(grid=3), **changes)))
    images, _ = batch()
    flip = torch.zeros(4, dtype=torch.bool)
    views = [dk.View(torch.tensor([x, 0.0, x + 9, 9]).expand(4, 4), flip) for x in (0.0, 20.0)]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss, terms = model(images, views, model.loss.region > 0, SEEDS)
    loss.backward()
    assert terms.get("region", 0) == terms.get("overlap", 0) == 0
    assert changes.get("correspondence") == "feature_similarity" or terms["dense"] == 0
    assert changes.get("pooled") != "overlap" or loss == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


# ---- the ablations ---------------------------------------------------------------------------


def double(case):
    images, views = case
    return [x.double() for x in images], [dk.View(x.box.double(), x.flip) for x in views]


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return DenseSiam(replace(SMALL, loss=replace(Loss(grid=3), **changes))).double()


def at_points(maps, pairs):
    """Features at the points of both views, by torch's own function."""
    found = []
    for x, points in zip(maps, (pairs.points1, pairs.points2), strict=True):
        grid = 2 * points[:, :, None] - 1
        rows = nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
        found.append(rows[..., 0].mT)
    return found


def by_rows(head, x):
    """A head of 1 x 1 convolutions, as the linear layers that it is."""
    images, rows = x.shape[:2]
    x = x.flatten(0, 1)
    for layer in head:
        if isinstance(layer, nn.Conv2d):
            x = nn.functional.linear(x, layer.weight[:, :, 0, 0], layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            x = nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
        else:
            x = x.relu()
    return x.unflatten(0, (images, rows))


def pixel_distances(student, teacher):
    """Eq 3, the way round that the code has it."""
    return -(softmax(teacher, -1) * log_softmax(student, -1)).sum(-1)


@pytest.mark.parametrize(
    "order", ["project_predict_sample", "project_sample_predict", "sample_project_predict"]
)
def test_the_points_are_sampled_when_the_order_says(order):
    model = make(order=order)
    images, views = double(batch())
    loss, terms = model(images, views, True, SEEDS)
    pairs = dk.grid_pairs(*views, 3)
    maps = [last_map(model.encoder, x) for x in images]

    if order == "sample_project_predict":
        z = [by_rows(model.dense_projector, x) for x in at_points(maps, pairs)]
        p = [by_rows(model.dense_predictor, x) for x in z]
    else:
        projected = [model.dense_projector(x) for x in maps]
        z = at_points(projected, pairs)
        if order == "project_sample_predict":
            p = [by_rows(model.dense_predictor, x) for x in z]
        else:
            p = at_points([model.dense_predictor(x) for x in projected], pairs)

    forth, back = pixel_distances(p[0], z[1]), pixel_distances(p[1], z[0])
    dense = (forth + back)[:3].mean() / 2  # the last pair shares nothing
    torch.testing.assert_close(terms["dense"], dense)
    region = model.region_loss(maps, z, pairs)  # its masks are of the same points
    torch.testing.assert_close(terms["region"], region)
    torch.testing.assert_close(loss, terms["sim"] + dense + 0.1 * region)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@given(generators(), st.integers(1, 6))
def test_random_points_are_the_same_of_the_image_and_lie_in_both_views(generator, count):
    found = dk.sample_view_pairs((48, 64), (3,), generator=generator)
    views = [found.view1, found.view2]
    pairs = densesiam.overlap_pairs(views, Loss(grid=count, points="random"), SEEDS[:3])
    assert pairs.points.shape == (3, count**2, 2)
    overlap = dk.intersect_views(*views).valid
    assert torch.equal(pairs.valid, overlap[:, None].expand(3, count**2))
    for view, points in zip(views, (pairs.points1, pairs.points2), strict=True):
        torch.testing.assert_close(dk.view_to_image(view, points), pairs.points)
        inside = (points > -1e-4) & (points < 1 + 1e-4)
        assert inside[pairs.valid].all()


@pytest.mark.parametrize(("candidates", "share"), [(1, 0.0), (3, 0.75), (10, 1.0)])  # Table A2
def test_hard_points_are_the_most_dissimilar_candidates(monkeypatch, candidates, share):
    model = make(points="hard", candidates=candidates, hard_share=share)
    images, views = double(batch())
    drawn, sample = [], dk.sample_points
    monkeypatch.setattr(
        dk, "sample_points", lambda *x, **y: drawn.append(sample(*x, **y)) or drawn[-1]
    )
    projected = [model.dense_projector(last_map(model.encoder, x)) for x in images]
    predicted = [model.dense_predictor(x) for x in projected]
    pairs = model.hard_pairs(projected, predicted, views, SEEDS)

    many, others = drawn
    assert many.shape[1] == candidates * 9
    hard = round(share * 9)
    assert torch.equal(pairs.points[:, hard:], others[:, hard:])
    tried = densesiam.pair_points(views, many, pairs.valid[:, 0])
    z, p = at_points(projected, tried), at_points(predicted, tried)
    dissimilarity = pixel_distances(p[0], z[1]) + pixel_distances(p[1], z[0])
    for row in range(3):
        hardest = many[row, dissimilarity[row].argsort(descending=True)[:hard]]
        torch.testing.assert_close(pairs.points[row, :hard], hardest)
    assert all(x.grad_fn is None for x in pairs)

    loss, terms = model(images, views, True, SEEDS)
    loss.backward()
    assert terms["overlap"] == 0.75


def match_by_hand(name, features, views, size):
    """Pairs of cells (image, cell of view 1, cell of view 2) that Table A1's methods compare."""
    if name == "feature_similarity":
        rows = [normalize(x.flatten(2).mT, dim=-1) for x in features]
        nearest = (rows[0] @ rows[1].mT).argmax(-1)
        return [(k, i, int(nearest[k, i])) for k in range(len(rows[0])) for i in range(size**2)]
    centers = [dk.coordinate_map(view, (size, size)).flatten(1, 2) for view in views]
    diagonals = [(view.box[:, 2:] - view.box[:, :2]).norm(dim=1) / size for view in views]
    limit = 0.7 * torch.maximum(*diagonals)
    near = torch.cdist(*centers) <= limit[:, None, None]
    near &= dk.intersect_views(*views).valid[:, None, None]
    return near.nonzero().tolist()


@pytest.mark.parametrize("distance", ["cross_entropy_similarity", "negative_cosine"])
@pytest.mark.parametrize("name", ["feature_similarity", "pixel_distance"])
def test_cells_are_compared_as_densecl_and_pixpro_do(name, distance):
    model = make(correspondence=name, region=0.0, distance=distance)
    images, views = double(batch())
    loss, terms = model(images, views, False, SEEDS)
    maps = [last_map(model.encoder, x) for x in images]
    z = [model.dense_projector(x) for x in maps]
    p = [model.dense_predictor(x).flatten(2).mT for x in z]
    z = [x.flatten(2).mT for x in z]
    means = []
    for a, b in ((0, 1), (1, 0)):
        pairs = match_by_hand(name, (maps[a], maps[b]), (views[a], views[b]), maps[0].shape[-1])
        assert len({k for k, *_ in pairs}) == (4 if name == "feature_similarity" else 3)
        student = torch.stack([p[a][k, i] for k, i, _ in pairs])
        teacher = torch.stack([z[b][k, j] for k, _, j in pairs]).detach()
        if distance == "negative_cosine":
            values = -(normalize(student, dim=-1) * normalize(teacher, dim=-1)).sum(-1)
        else:
            values = pixel_distances(student, teacher)
        means.append(values.mean())
    torch.testing.assert_close(terms["dense"], sum(means) / 2)
    torch.testing.assert_close(loss, terms["sim"] + terms["dense"])
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_regions_are_the_windows_that_both_views_show():
    """Of a map of places, a region's mean is the place of its center: in both views the same."""
    _, views = double(batch())
    maps = [dk.coordinate_map(view, (56, 56)).movedim(-1, 1) for view in views]
    student, teacher = (densesiam.Side(view, x, x) for view, x in zip(views, maps, strict=True))
    found = densesiam.match_regions(student, teacher, 224)
    assert found.valid.shape == (4, 36)  # windows of 48 every 32 pixels
    assert found.valid.any(1).tolist()[3] is False  # the last pair shares nothing
    inside = found.valid.nonzero()
    assert len(inside) > 0
    torch.testing.assert_close(
        found.students[found.valid], found.teachers[found.valid], atol=0.1, rtol=0.0
    )


def test_the_global_branch_on_the_overlap_pools_what_both_views_show():
    model = make(pooled="overlap", dense=0.0, region=0.0)
    images, views = double(batch())
    loss, terms = model(images, views, False, SEEDS)
    maps = [last_map(model.encoder, x) for x in images]
    pooled = [x.mean(1) for x in at_points(maps, dk.grid_pairs(*views, 3))]
    z = [model.projector(x) for x in pooled]
    p = [model.predictor(x) for x in z]
    cosines = (normalize(p[0]) * normalize(z[1]) + normalize(p[1]) * normalize(z[0])).sum(1)
    torch.testing.assert_close(loss, -cosines[:3].mean() / 2)  # the last pair shares nothing
    assert loss is terms["sim"]


def test_a_grid_of_no_point_is_simsiam(tmp_path):
    images, views = double(batch())
    model = make(grid=0)
    baseline = make(dense=0.0, region=0.0)
    assert model.state_dict().keys() == baseline.state_dict().keys()
    loss, terms = model(images, views, True, SEEDS)
    want, _ = baseline(images, views, False, SEEDS)
    assert torch.equal(loss, want)
    assert set(terms) == {"sim", "spread"}
    densesiam.draw(
        model.float(), [x.float() for x in images], views, SEEDS, tmp_path / "picture.png"
    )


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("densesiam", {}),
        ("pixsim", {"region": 0.0}),
        ("regionsim", {"dense": 0.0}),  # Table 4f, without PixSim
        ("simsiam", {"dense": 0.0, "region": 0.0}),
        ("simsiam", {"grid": 0}),
    ],
)
def test_the_method_and_the_picture_say_what_was_trained(tmp_path, method, changes):
    loss = replace(Loss(grid=3), **changes)
    assert densesiam.method_of(loss) == method
    model = DenseSiam(replace(SMALL, loss=loss))
    densesiam.draw(model, *batch(), SEEDS, tmp_path / "picture.png")
    panels = 2 if method == "simsiam" else 3  # the pseudo-categories between the view and the PCA
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (2 * panels * 226 + 2, 4 * 226 + 2)


def test_a_run_of_random_points_resumes_to_the_same_losses(tmp_path, monkeypatch):
    scenes = densesiam.harness.SceneImages
    monkeypatch.setattr(densesiam.harness, "SceneImages", lambda _: scenes(16))
    monkeypatch.setattr(densesiam, "evaluate", lambda *arguments: None)
    config = replace(SMALL, loss=Loss(grid=3, points="hard"))
    densesiam.train(replace(config, run=tmp_path / "whole"))
    asked = iter([True])
    with monkeypatch.context() as patch:
        patch.setattr(densesiam.harness.Run, "stop_requested", lambda self: next(asked, False))
        densesiam.train(replace(config, run=tmp_path / "halted"))
        densesiam.train(replace(config, run=tmp_path / "halted"))
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "halted")]
    assert logs[0] == logs[1]
    assert sum("loss" in json.loads(line) for line in logs[0].splitlines()) == 4
    assert json.loads((tmp_path / "whole" / "encoder.json").read_text())["method"] == "densesiam"


# ---- processes -------------------------------------------------------------------------------


def eight_pairs():
    """Processes of two or four have other numbers of pairs that overlap; the last of four none."""
    pairs = dk.sample_view_pairs((64, 64), (8,), generator=torch.Generator().manual_seed(0))
    apart = torch.tensor([False, False, False, True, False, True, True, True])[:, None]
    boxes1 = torch.where(apart, torch.tensor([0.0, 0, 20, 20]), pairs.view1.box)
    boxes2 = torch.where(apart, torch.tensor([30.0, 30, 60, 60]), pairs.view2.box)
    views = [dk.View(boxes1, pairs.view1.flip), dk.View(boxes2, pairs.view2.flip)]
    images = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return double(([*images], views))


@pytest.mark.parametrize(("sizes", "changes"), [((2, 4), {}), ((2,), {"pooled": "overlap"})])
def test_processes_with_other_numbers_of_valid_pairs_have_the_loss_and_gradient_of_one(
    sizes, changes
):
    model = make(**changes).eval()  # one process would have other batch statistics

    def one_step(part, group):
        (terms,), loss, gradients, _ = step_on_part(model, *part[0], True, part[1])
        # The overlap and the global loss are logged as means over the processes.
        mean = dk.all_mean(loss, group)
        return mean, terms["dense"].detach(), terms["region"].detach(), gradients

    assert_world_size_invariant(one_step, (eight_pairs(), torch.arange(8)), sizes)


def test_the_rows_of_the_tables_are_commands(monkeypatch):
    """The options that the page gives for the rows of the paper's tables; no two are the same."""
    page = (Path(__file__).parents[2] / "docs/recipes/densesiam.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| (4|A)\w+ \|", line)]
    assert len(rows) == 20
    found = {}
    for row in rows:
        for options in re.findall(r"`(--[^`]+)`", row):
            command = ["densesiam.py", "--preset", "paper", "--arch", "tiny", *options.split()]
            monkeypatch.setattr(sys, "argv", command)
            config = densesiam.read_options()
            densesiam.check_options(config)
            found[options] = config
    names = [name for name in found if "--preset simsiam" not in name]
    only_pixsim = [found[name] for name in names if found[name].loss == replace(Loss(), region=0.0)]
    assert len({str(found[name]) for name in names}) == len(names)
    assert len(only_pixsim) == 1


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_option_flips_views_top_to_bottom(probability):
    config = replace(SMALL, views=replace(SMALL.views, vertical_flip=probability))
    dataset = densesiam.TwoViews(densesiam.harness.SceneImages(8), config)
    flips = [view.vertical_flip.item() for index in range(8) for view in dataset[0, index][1]]
    assert flips == [probability == 1] * 16


def test_the_encoder_has_torchvisions_layout():
    encoder = encoders.build("resnet50")
    torchvision.models.resnet50().load_state_dict(
        {**encoder.state_dict(), "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    )
    assert last_map(encoder, torch.rand(1, 3, 224, 224)).shape == (1, 2048, 7, 7)


def test_the_presets_are_the_papers():
    paper = PRESETS["paper"]
    assert (paper.batch, paper.epochs, paper.lr, paper.weight_decay) == (512, 800, 0.05, 1e-4)
    assert (paper.views.size, paper.views.scale, paper.views.hue) == (224, (0.2, 1.0), 0.1)
    assert paper.views.vertical_flip == 0
    assert (paper.arch, paper.hidden, paper.categories) == ("resnet50", 2048, 512)
    assert paper.loss == Loss(1.0, 0.1, 0.5, 7, "cross_entropy_similarity", 0.1)
    assert replace(PRESETS["simsiam"], preset="paper", loss=paper.loss) == paper
