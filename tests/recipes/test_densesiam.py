"""The DenseSiam recipe: its losses against the paper's formulas. Its runs: test_recipes.py."""

from dataclasses import replace

import densesiam
import pytest
import torch
import torchvision
from densesiam import PRESETS, DenseSiam, Loss, Views
from torch.nn.functional import cross_entropy, normalize
import densekit as dk

SMALL = replace(
    PRESETS["demo"], hidden=32, categories=16, batch=8, epochs=2, workers=0, log_every=1,
    save_every=3, views=Views(size=32), device="cpu",
)  # fmt: skip

# Wrong options, and how the sentence about each of them begins.
WRONG = [
    (["--arch", "resnet5"], "--arch is resnet5"),
    (["--arch", "cspresnet50"], "--arch is cspresnet50"),  # no ResNet, in spite of its name
    (["--arch", "vit_small_patch16_224"], "--arch is vit_small_patch16_224"),
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
    (["--views.scale", "1.0", "0.2"], "--views.scale is 1.0 0.2"),
    (["--views.scale", "0.0", "1.0"], "--views.scale is 0.0 1.0"),
    (["--views.scale", "0.2", "1.5"], "--views.scale is 0.2 1.5"),
    (["--views.hue", "0.6"], "--views.hue is 0.6"),
    (["--views.hue", "nan"], "--views.hue is nan"),
    (["--views.blur", "2.0", "0.1"], "--views.blur is 2.0 0.1"),
    (["--views.blur", "-1.0", "2.0"], "--views.blur is -1.0 2.0"),
    (["--loss.dense", "-1"], "--loss.dense is -1"),
    (["--loss.dense", "nan"], "--loss.dense is nan"),
    (["--loss.region", "-1"], "--loss.region is -1"),
    (["--loss.region", "inf"], "--loss.region is inf"),
    (["--loss.region-start", "1.5"], "--loss.region-start is 1.5"),
    (["--loss.region-start", "nan"], "--loss.region-start is nan"),
    (["--loss.grid", "0"], "--loss.grid is 0"),
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
    loss, terms = model(images, views, True)

    maps = [model.encoder(x) for x in images]
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
    loss, terms = model(*batch(), False)
    loss.backward()
    assert "region" not in terms
    assert all(p.grad is None for p in model.region_projector.parameters())
    baseline = DenseSiam(replace(SMALL, loss=PRESETS["simsiam"].loss))
    names = {name.split(".")[0] for name, _ in baseline.named_parameters()}
    assert names == {"encoder", "projector", "predictor"}
    loss, terms = baseline(*batch(), False)
    assert loss is terms["sim"]


def test_the_gradients_of_pixsim_stop_at_the_teacher():
    torch.manual_seed(0)
    model = DenseSiam(replace(SMALL, loss=Loss(grid=3, region=0.0)))
    images, views = batch()
    parameters = [*model.dense_projector.parameters(), *model.dense_predictor.parameters()]
    _, terms = model(images, views, False)
    found = torch.autograd.grad(terms["dense"], parameters)

    with torch.no_grad():
        maps = [model.encoder(x) for x in images]
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


def test_without_any_overlap_the_loss_is_finite_and_carries_the_graph():
    model = DenseSiam(SMALL)
    images, _ = batch()
    flip = torch.zeros(4, dtype=torch.bool)
    views = [dk.View(torch.tensor([x, 0.0, x + 9, 9]).expand(4, 4), flip) for x in (0.0, 20.0)]
    loss, terms = model(images, views, True)
    loss.backward()
    assert terms["dense"] == terms["region"] == terms["overlap"] == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_the_encoder_has_torchvisions_layout():
    encoder = densesiam.build_encoder("resnet50")
    torchvision.models.resnet50().load_state_dict(
        {**encoder.state_dict(), "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    )
    assert encoder(torch.rand(1, 3, 224, 224)).shape == (1, 2048, 7, 7)


def test_the_presets_are_the_papers():
    paper = PRESETS["paper"]
    assert (paper.batch, paper.epochs, paper.lr, paper.weight_decay) == (512, 800, 0.05, 1e-4)
    assert (paper.views.size, paper.views.scale, paper.views.hue) == (224, (0.2, 1.0), 0.1)
    assert (paper.arch, paper.hidden, paper.categories) == ("resnet50", 2048, 512)
    assert paper.loss == Loss(1.0, 0.1, 0.5, 7, "cross_entropy_similarity", 0.1)
    assert replace(PRESETS["simsiam"], preset="paper", loss=paper.loss) == paper
