"""The DUPR recipe: its losses against the paper's formulas. Its runs: test_recipes.py."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import dupr
import numpy as np
import pytest
import timm
import torch
import torchvision
from downstream import encoders
from dupr import DUPR, PRESETS, Views
from PIL import Image
from processes import on_processes
from steps import step_on_part
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, normalize
import densekit as dk
from densekit.testing import assert_world_size_invariant

SEEDS = torch.arange(4)  # of the images of `batch`
SMALL = replace(
    PRESETS["demo"], patches=(2, 3, 3, 2), outputs=8, bank=16, batch=8, epochs=2, workers=0,
    log_every=1, save_every=3, views=Views(size=32), device="cpu",
)  # fmt: skip
# Wrong options, and what the sentence about each of them begins with.
WRONG = [
    (["--freeze", "-1"], "--freeze is -1"),
    (["--freeze", "9"], "--freeze is 9"),
    (["--weights", " "], "--weights is empty"),
    (["--weights", "nowhere"], "nowhere does not exist"),
    (["--weights", "timm:no_such_net", "--freeze", "1"], "--weights is timm:no_such_net"),
    (["--arch", "resnet5"], "--arch is resnet5"),
    (["--arch", "levit_128s"], "--arch is levit_128s"),  # three levels alone
    (["--arch", "vit_small_patch16_224", "--views.size", "50"], "--views.size is 50: give a mul"),
    (["--alpha", "-0.1", "0", "0", "1"], "--alpha is -0.1 0.0 0.0 1.0"),
    (["--alpha", "0", "nan", "0", "1"], "--alpha is 0.0 nan 0.0 1.0"),
    (["--alpha", "0", "0", "0", "inf"], "--alpha is 0.0 0.0 0.0 inf"),
    (["--beta", "0", "-1", "0", "1"], "--beta is 0.0 -1.0 0.0 1.0"),
    (["--beta", "0", "0", "0", "nan"], "--beta is 0.0 0.0 0.0 nan"),
    (
        ["--alpha", "1", "0", "0", "0", "--beta", "0", "0", "1", "0"],
        "--alpha is 1.0 0.0 0.0 0.0 and --beta is 0.0 0.0 1.0 0.0",
    ),
    (["--patches", "1", "1", "0", "2"], "--patches is 1 1 0 2"),
    (["--outputs", "0"], "--outputs is 0"),
    (["--min-overlap", "1"], "--min-overlap is 1.0"),
    (["--min-overlap", "-0.1"], "--min-overlap is -0.1"),
    (["--min-overlap", "nan"], "--min-overlap is nan"),
    (["--bank", "0"], "--bank is 0"),
    (["--keys", "0"], "--keys is 0"),
    (["--keys", "50"], "--keys is 50: give at most 49"),  # 7 x 7
    (["--temperature", "0"], "--temperature is 0"),
    (["--temperature", "nan"], "--temperature is nan"),
    (["--momentum", "1.1"], "--momentum is 1.1"),
    (["--momentum", "1"], "--momentum is 1.0: give a number from 0 to less than 1"),
    (["--momentum", "-0.1"], "--momentum is -0.1"),
    (["--momentum", "nan"], "--momentum is nan"),
    (["--norm", "sync", "--device", "cpu"], "--norm is sync"),
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
    (
        ["--views.size", "36"],
        "--views.size is 36: give a multiple of 8, the side",
    ),
    (["--views.scale", "1.0", "0.2"], "--views.scale is 1.0 0.2"),
    (["--views.scale", "0.0", "1.0"], "--views.scale is 0.0 1.0"),
    (["--views.scale", "0.2", "1.5"], "--views.scale is 0.2 1.5"),
    (["--views.hue", "0.6"], "--views.hue is 0.6"),
    (["--views.hue", "nan"], "--views.hue is nan"),
    (["--views.blur", "2.0", "0.1"], "--views.blur is 2.0 0.1"),
    (["--views.blur", "-1.0", "2.0"], "--views.blur is -1.0 2.0"),
]
# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def batch(dtype=torch.float32):
    """Four pairs: two mirrored on one side, one not at all, one without overlap."""
    generator = torch.Generator().manual_seed(0)
    box1 = torch.tensor([[0, 0, 40, 40], [10, 0, 60, 50], [5, 5, 50, 60], [0, 0, 20, 20]])
    box2 = torch.tensor([[20, 10, 64, 64], [0, 8, 50, 40], [0, 0, 64, 64], [30, 30, 60, 60]])
    flip = torch.tensor([True, False, False, False])
    views = [dk.View(box1.to(dtype), flip), dk.View(box2.to(dtype), flip.roll(1))]
    return [torch.rand(4, 3, 32, 32, generator=generator, dtype=dtype) for _ in "12"], views


def filled_banks(model, count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    names = [name for name, _ in model.student["heads"].named_children()]
    banks = {name: dk.init_bank(32, 8) for name in names}
    keys = [torch.randn(count, 8, generator=generator, dtype=dtype) for _ in banks]
    keys = [normalize(x, dim=-1) for x in keys]  # as the keys that the model pushes
    banks = {name: bank._replace(features=bank.features.to(dtype)) for name, bank in banks.items()}
    return {x: dk.push_to_bank(bank, k) for (x, bank), k in zip(banks.items(), keys, strict=True)}


def different_teacher(model):
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter) / 50)
    return model


def pyramid(encoder, x):
    """C2 to C5, layer by layer."""
    c2 = encoder.layer1(encoder.maxpool(encoder.act1(encoder.bn1(encoder.conv1(x)))))
    c3 = encoder.layer2(c2)
    c4 = encoder.layer3(c3)
    return [c2, c3, c4, encoder.layer4(c4)]


def convolve(head, maps):
    """A head as the paper has it: convolutions of 1 x 1."""
    x = conv2d(maps, head[0].weight[:, :, None, None], head[0].bias).relu()
    return conv2d(x, head[2].weight[:, :, None, None], head[2].bias)


def nce(q, k, bank):
    """Eq 1 of one query, its key and the keys of a bank."""
    q, k, others = normalize(q, dim=0), normalize(k, dim=0), normalize(bank, dim=1)
    logits = torch.cat([(q @ k)[None], others @ q]) / 0.2
    return cross_entropy(logits, torch.tensor(0))


def test_the_losses_are_those_of_the_paper():
    torch.manual_seed(0)
    config = replace(SMALL, alpha=(0.1, 0.0, 0.7, 1.0), beta=(0.0, 0.5, 1.0, 1.0))
    model = different_teacher(DUPR(config)).double()
    (images, views), banks = batch(torch.float64), filled_banks(model, 20, torch.float64)
    names = ["image2", "image4", "image5", "patch3", "patch4", "patch5"]
    assert [*model.student["heads"]] == [*model.teacher["heads"]] == [*banks] == names
    oracle = copy.deepcopy(model)
    loss, terms, _ = model(images, views, banks, torch.tensor([2, 0, 3, 1]), SEEDS)

    maps = [
        pyramid(network["encoder"], x)
        for network, x in zip((oracle.student, oracle.teacher), images, strict=True)
    ]
    networks, total = (oracle.student["heads"], oracle.teacher["heads"]), 0
    for name, bank in banks.items():
        level, rows = int(name[-1]) - 2, bank.features[:20]
        heads, pair = [x[name] for x in networks], [x[level] for x in maps]
        if name.startswith("image"):
            pooled = [x.mean((2, 3), keepdim=True) for x in pair]
            q, k = (convolve(h, x) for h, x in zip(heads, pooled, strict=True))
            want = sum(nce(q[i, :, 0, 0], k[i, :, 0, 0], rows) for i in range(4)) / 4
        else:
            regions = []
            for h, x, view in zip(heads, pair, views, strict=True):
                low = torch.maximum(views[0].box[:, :2], views[1].box[:, :2])
                high = torch.minimum(views[0].box[:, 2:], views[1].box[:, 2:])
                size = view.box[:, 2:] - view.box[:, :2]
                low, high = (low - view.box[:, :2]) / size, (high - view.box[:, :2]) / size
                x1 = torch.where(view.flip, 1 - high[:, 0], low[:, 0])
                x2 = torch.where(view.flip, 1 - low[:, 0], high[:, 0])
                seen = torch.stack([x1, low[:, 1], x2, high[:, 1]], 1) * x.shape[-1]
                seen = [row[None] for row in seen]
                s = config.patches[level]
                region = torchvision.ops.roi_align(x, seen, s, sampling_ratio=2, aligned=True)
                region = torch.where(view.flip[:, None, None, None], region.flip(-1), region)
                regions.append(convolve(h, region))
            r1, r2 = regions
            want = [
                nce(r1[b, :, i, j], r2[b, :, i, j], rows)
                for b in range(3) for i in range(s) for j in range(s)
            ]  # fmt: skip
            want = sum(want) / len(want)
        torch.testing.assert_close(terms[name], want)
        total += (config.alpha, config.beta)[name.startswith("patch")][level] * want
    torch.testing.assert_close(loss, total)
    assert terms["overlap"] == 0.75
    assert terms["image_filled"] == terms["patch_filled"] == 20


def test_keys_of_this_batch_enter_the_banks_after_the_loss():
    torch.manual_seed(0)
    model = different_teacher(DUPR(SMALL))
    images, views = batch()
    order, banks = torch.tensor([2, 0, 3, 1]), model.init_banks(torch.device("cpu"))
    loss, _, new = model(images, views, banks, order, SEEDS)
    assert loss == 0  # no negatives yet
    assert all(bank.filled == 0 for bank in banks.values())
    for name, bank in new.items():
        assert bank.filled == (3 * SMALL.keys if name.startswith("patch") else 4)
        rows = bank.features[: bank.filled]
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    maps = pyramid(copy.deepcopy(model).teacher["encoder"], images[1])
    keys = normalize(model.teacher["heads"]["image5"](maps[3].mean((2, 3))), dim=1)
    torch.testing.assert_close(new["image5"].features[:4], keys.detach())
    pairs = dk.patch_pairs(maps[2], maps[2], *views[::-1], 3)  # view 2 first
    keys = normalize(model.teacher["heads"]["patch4"](pairs.features1), dim=-1)
    rows = new["patch4"].features[:12].view(3, 4, 8)
    distance = torch.cdist(rows, keys[:3].detach())
    assert (distance.amin(-1) < 1e-4).all()  # each is one of its image's patches...
    assert all(len(set(row.tolist())) == 4 for row in distance.argmin(-1))  # ...and no two alike
    loss, *_ = model(images, views, new, order, SEEDS)
    assert loss > 1


def test_only_the_student_learns_and_the_keys_use_batch_statistics():
    torch.manual_seed(0)
    model = DUPR(SMALL)
    loss, _, _ = model(*batch(), filled_banks(model, 20), torch.arange(4), SEEDS)
    loss.backward()
    for name, parameter in model.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert model.teacher["encoder"].bn1.num_batches_tracked == 1


def test_without_any_overlap_the_loss_is_finite_and_carries_the_graph():
    torch.manual_seed(0)
    model, (images, views) = DUPR(SMALL), batch()
    views[1] = dk.View(views[1].box + 100, views[1].flip)
    banks = filled_banks(model, 20)
    loss, terms, new = model(images, views, banks, torch.arange(4), SEEDS)
    loss.backward()
    assert loss.isfinite()
    assert terms["patch4"] == terms["patch5"] == terms["overlap"] == 0
    assert torch.equal(new["patch4"].features, banks["patch4"].features)
    for name, parameter in model.student.named_parameters():
        assert parameter.grad is not None, name  # DDP waits for every one
        assert parameter.grad.isfinite().all(), name


def test_the_order_of_the_shuffle_changes_nothing_on_one_process():
    torch.manual_seed(0)
    model, results = different_teacher(DUPR(SMALL)).double(), []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        torch.manual_seed(1)
        banks = filled_banks(model, 20, torch.float64)
        loss, _, new = model(*batch(torch.float64), banks, torch.tensor(order), SEEDS)
        results.append((loss, new["patch4"].features, new["image2"].features))
    torch.testing.assert_close(*results)


def test_processes_have_the_loss_the_gradient_and_the_banks_of_one():
    torch.manual_seed(0)
    model = different_teacher(DUPR(SMALL)).double()
    order = torch.tensor([2, 0, 3, 1])
    banks = filled_banks(model, 20, torch.float64)

    def one_step(part, group):
        torch.manual_seed(group.rank())
        (terms, new), loss, gradients, _ = step_on_part(model, *part[0], banks, order, part[1])
        features = {name: bank.features for name, bank in new.items()}
        # The last process has one pair without overlap, and of four processes no other: only a mean
        # over all valid pairs gives the same.
        return loss, terms["patch4"].detach(), gradients, features

    assert_world_size_invariant(one_step, (batch(torch.float64), SEEDS))


@pytest.mark.parametrize("min_overlap", [0.0, 0.3, 0.6])
def test_views_overlap_as_much_as_asked_for(min_overlap):
    source = dupr.harness.SceneImages(32)
    dataset = dupr.TwoViews(source, replace(SMALL, min_overlap=min_overlap))
    _, views, *_ = dupr.harness.make_batch(dataset, range(32))
    share = dk.box_iou(views[0].box, views[1].box)
    assert (share >= min_overlap).double().mean() > 0.9  # ten attempts find nearly all
    if not min_overlap:  # the views of a recipe without such an option
        generator = dupr.harness.generator(SMALL.seed, 0, 5)
        pairs = dk.sample_view_pairs((64, 64), scale=SMALL.views.scale, generator=generator)
        assert torch.equal(views[0].box[5], pairs.view1.box)


def test_pairs_that_overlap_less_have_no_patch_loss():
    torch.manual_seed(0)
    images, views = batch()
    share = dk.box_iou(views[0].box, views[1].box)
    few = DUPR(replace(SMALL, min_overlap=0.3))
    _, terms, banks = few(images, views, filled_banks(few, 20), torch.arange(4), SEEDS)
    used = share >= 0.3
    assert 0 < used.sum() < (share > 0).sum()
    assert terms["overlap"] == used.double().mean()
    assert banks["patch4"].filled == 20 + SMALL.keys * used.sum()
    assert banks["image5"].filled == 20 + 4

    # The same without them, but for the batch statistics.
    model = DUPR(SMALL)
    model.load_state_dict(few.state_dict())
    for network in (model, few):
        nn.ModuleList(x for x in network.modules() if isinstance(x, nn.BatchNorm2d)).eval()
    _, terms, _ = few(images, views, filled_banks(few, 20), torch.arange(4), SEEDS)
    own = [x[used] for x in images], [dk.View(x.box[used], x.flip[used]) for x in views]
    _, want, _ = model(*own, filled_banks(model, 20), torch.arange(int(used.sum())), SEEDS[used])
    torch.testing.assert_close(terms["patch4"], want["patch4"])


def test_a_norm_without_effect_is_said(capsys):
    def said(norm, size, network, arch="tiny"):
        world = dupr.harness.World(0, size, torch.device("cpu"))
        dupr.harness.warn_of_norm(f"--norm {norm}", arch, network, world)
        return capsys.readouterr().err

    normed = encoders.build("tiny")
    for norm in ("shuffled", "sync"):
        alone = said(norm, 1, normed)
        assert alone.startswith(f"warning: --norm {norm} has no effect: there is one process")
        assert alone.count("\n") == 1
        assert said(norm, 2, normed) == ""
        sentence = (
            f"warning: --norm {norm} has no effect: resnet50_gn has no batch normalization.\n"
        )
        assert said(norm, 2, nn.GroupNorm(2, 4), "resnet50_gn") == sentence
    other = dupr.harness.World(1, 2, torch.device("cpu"))
    dupr.harness.warn_of_norm("--norm shuffled", "tiny", nn.Identity(), other)
    assert capsys.readouterr().err == ""


def encoded(rank, group, order, norm):
    """What the two encoders are given on this process."""
    model, (images, views), seen = DUPR(replace(SMALL, norm=norm)), batch(), []
    own, levels = slice(2 * rank, 2 * rank + 2), dupr.level_maps
    views = [dk.View(view.box[own], view.flip[own]) for view in views]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dupr, "level_maps", lambda encoder, x: seen.append(x) or levels(encoder, x))
        model([x[own] for x in images], views, filled_banks(model, 20), order, torch.arange(4)[own])
    return seen


@pytest.mark.parametrize("norm", ["shuffled", "sync"])
def test_the_keys_are_shuffled_over_the_processes(norm):
    order, (first, second) = torch.tensor([2, 0, 3, 1]), batch()[0]
    for rank, (x, y) in enumerate(on_processes(2, encoded, order, norm)):
        own = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(x, first[own])
        assert torch.equal(y, second[order[own]] if norm == "shuffled" else second[own])


def test_the_encoder_is_timms():
    encoder = encoders.build("resnet50").eval()
    plain = timm.create_model("resnet50", num_classes=0, global_pool="").eval()
    plain.load_state_dict(encoder.state_dict())
    x = torch.rand(1, 3, 64, 64)
    maps = encoders.level_maps(encoder, x)
    assert [f.shape[1] for f in maps] == [256, 512, 1024, 2048]
    torch.testing.assert_close(maps[-1], plain(x))
    torchvision.models.resnet50().load_state_dict(encoder.state_dict(), strict=False)


def test_the_presets_are_the_papers():
    paper = PRESETS["paper"]
    assert (paper.alpha, paper.beta) == ((0.1, 0.4, 0.7, 1.0), (0.0, 0.0, 1.0, 1.0))
    assert (paper.patches[2:], paper.outputs, paper.bank, paper.keys) == ((14, 7), 128, 65536, 4)
    assert (paper.temperature, paper.momentum, paper.arch) == (0.2, 0.999, "resnet50")
    assert (paper.batch, paper.epochs, paper.lr, paper.weight_decay) == (256, 200, 0.06, 1e-4)
    assert paper.views == Views(224, (0.2, 1.0), 0.1, (0.1, 2.0))
    assert PRESETS["coco"] == replace(paper, preset="coco", epochs=2000)
    nothing = (0.0, 0.0, 0.0, 0.0)
    mocov2 = replace(paper, preset="mocov2", alpha=(*nothing[:3], 1.0), beta=nothing)
    assert PRESETS["mocov2"] == mocov2


def test_the_losses_are_those_with_a_weight():
    losses = dupr.list_losses(
        replace(SMALL, alpha=(0.0, 0.5, 0.0, 0.0), beta=(0.25, 0.0, 0.0, 1.0))
    )
    assert losses == [("image3", 1, 0, 0.5), ("patch2", 0, 2, 0.25), ("patch5", 3, 2, 1.0)]


def test_an_image_has_as_many_patches_as_its_keys_at_every_level_with_a_patch_loss():
    few = replace(SMALL, keys=5)  # patch4 has 3 x 3, patch5 has 2 x 2
    with pytest.raises(dupr.harness.UserError, match=r"--keys is 5: give at most 4.* at C5"):
        dupr.check_options(few)
    dupr.check_options(replace(few, beta=(0.0, 0.0, 1.0, 0.0)))


def test_a_bank_larger_than_the_images_is_refused(tmp_path, monkeypatch):
    source = dupr.harness.image_source
    monkeypatch.setattr(
        dupr.harness, "image_source", lambda data, scenes, **_: source(data, scenes=15)
    )
    with pytest.raises(dupr.harness.UserError, match=r"--bank is 16.*15"):
        dupr.train(replace(SMALL, run=tmp_path))


@pytest.mark.parametrize(
    ("alpha", "beta", "method"),
    [((0, 0, 0, 1), (0, 0, 0, 0), "mocov2"), ((0, 0, 1, 1), (0, 0, 0, 0), "dupr")],
)
def test_the_method_is_said_beside_the_weights(tmp_path, monkeypatch, capsys, alpha, beta, method):
    source = dupr.harness.image_source
    monkeypatch.setattr(
        dupr.harness, "image_source", lambda data, scenes, **_: source(data, scenes=16)
    )
    monkeypatch.setattr(dupr, "evaluate", lambda *arguments: None)
    dupr.train(replace(SMALL, run=tmp_path, epochs=1, alpha=alpha, beta=beta))
    assert json.loads((tmp_path / "encoder.json").read_text())["method"] == method
    assert capsys.readouterr().err.count("warning: --norm shuffled has no effect") == 1


def test_the_preview_of_a_view_with_itself_is_matched_everywhere(tmp_path):
    torch.manual_seed(0)
    (x, _), (view, _) = batch()
    logged = {}
    run = SimpleNamespace(
        log=lambda step, **values: logged.update(values),
        rows=lambda *_: [{"step": 0, **logged}],
        picture_path=lambda *_: tmp_path / "picture.png",
    )
    model = DUPR(replace(SMALL, patches=(2, 2, 2, 2)))
    dupr.evaluate(
        model,
        ([x, x], [view, view], torch.arange(len(x)), []),
        replace(model.config, data="."),
        run,
        0,
    )
    assert logged["matched"] == 1
    assert logged["similarity_iou_1.0"].item() == pytest.approx(1)
    assert model.training
    with Image.open(tmp_path / "picture.png") as picture:
        pixels = torch.from_numpy(np.array(picture))
    for row in range(len(x)):  # view, view, what it is matched to
        tiles = [pixels[row * 226 + 2 :, i * 226 + 2 :][:224, :224] for i in range(3)]
        assert torch.equal(tiles[0], tiles[1])
        assert torch.equal(tiles[1], tiles[2])


def test_synchronized_statistics_need_a_gpu(tmp_path):
    config = replace(SMALL, run=tmp_path, norm="sync")
    with pytest.raises(dupr.harness.UserError, match="--norm is sync: give shuffled"):
        dupr.train(config)


def test_the_key_encoder_follows_before_each_step_and_keeps_its_statistics(tmp_path, monkeypatch):
    calls, update = [], dk.ema_update

    def follow(teacher, student, **options):
        calls.append(options)
        return update(teacher, student, **options)

    monkeypatch.setattr(dk, "ema_update", follow)
    source = dupr.harness.image_source
    monkeypatch.setattr(
        dupr.harness, "image_source", lambda data, scenes, **_: source(data, scenes=16)
    )
    monkeypatch.setattr(dupr, "evaluate", lambda *arguments: None)
    dupr.train(replace(SMALL, run=tmp_path))
    assert calls == [{"momentum": SMALL.momentum, "buffers": "keep"}] * 4
