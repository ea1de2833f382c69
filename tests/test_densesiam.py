"""The DenseSiam recipe: its losses against the paper's formulas, and the run as a user sees it."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import densesiam
import harness
import pytest
import torch
import torch._dynamo  # before any fork: importing it in the children takes long
import torchvision
from densesiam import PRESETS, DenseSiam, Loss, Views
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, normalize
import densekit as dk
from densekit.testing import scenes

RECIPES = Path(densesiam.__file__).parent
SMALL = replace(
    PRESETS["demo"], hidden=32, categories=16, batch=8, epochs=2, workers=0, log_every=1,
    save_every=3, views=Views(size=32), device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty images of two sizes."""
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate(((40, 48), (48, 40))):
        drawn = scenes(10, size, generator=torch.Generator().manual_seed(number)).images
        for index, image in enumerate((drawn * 255).byte().movedim(1, -1).numpy()):
            Image.fromarray(image).save(folder / f"{number}-{index}.png")
    return folder


def rows(run, name="loss"):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if name in row]


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, RECIPES / "densesiam.py", *map(str, arguments)],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


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
    with pytest.raises(harness.UserError, match="resnet5"):
        densesiam.build_encoder("resnet5")


def test_views_are_the_same_in_any_run_and_fit_their_crops(folder):
    dataset = densesiam.TwoViews(harness.image_source(folder, scenes=0), SMALL)
    state = torch.get_rng_state()
    indices = [12, 3, 7, 19]  # of both sizes
    images, views, unreadable = dataset[indices]
    again = dataset[indices]
    assert unreadable == []
    assert all(torch.equal(a, b) for a, b in zip(images, again[0], strict=True))
    assert torch.equal(state, torch.get_rng_state())
    dataset.epoch = 1
    assert not torch.equal(dataset[indices][0][0], images[0])
    # Without photometric noise a crop is the crop of its own image by its own view.
    plain = densesiam.TwoViews(dataset.source, SMALL)
    plain.photometric = torch.nn.Identity()
    crops, views, _ = plain[indices]
    for row, index in enumerate(indices):
        pixels = dataset.source[index][0] / 255
        for crop, view in zip(crops, views, strict=True):
            alone = dk.crop_views(pixels, dk.View(view.box[row], view.flip[row]), 32)
            torch.testing.assert_close(crop[row], alone)


# ---- the run ---------------------------------------------------------------------------------


def test_the_presets_are_the_papers():
    paper = PRESETS["paper"]
    assert (paper.batch, paper.epochs, paper.lr, paper.weight_decay) == (512, 800, 0.05, 1e-4)
    assert (paper.views.size, paper.views.scale, paper.views.hue) == (224, (0.2, 1.0), 0.1)
    assert (paper.arch, paper.hidden, paper.categories) == ("resnet50", 2048, 512)
    assert paper.loss == Loss(1.0, 0.1, 0.5, 7, "cross_entropy_similarity", 0.1)
    assert replace(PRESETS["simsiam"], preset="paper", loss=paper.loss) == paper


def test_a_run_leaves_everything_and_resumes_in_the_middle_of_an_epoch(
    tmp_path, folder, monkeypatch
):
    config = replace(SMALL, data=folder, epochs=3)  # 2 batches an epoch, 6 steps
    densesiam.train(replace(config, run=tmp_path / "whole"))
    whole = rows(tmp_path / "whole")
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    assert [("region" in row) for row in whole] == [False] * 3 + [True] * 3
    assert {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "pictures"} <= {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    pictures = sorted((tmp_path / "whole" / "pictures").iterdir())
    assert [path.name for path in pictures] == [
        "step-000000.png",
        "step-000003.png",
        "step-000006.png",
    ]
    with Image.open(pictures[-1]) as picture:
        assert picture.size == (
            6 * 226 + 2,
            6 * 226 + 2,
        )  # six rows of two views, three panels each
    sidecar = json.loads((tmp_path / "whole" / "encoder.json").read_text())
    assert sidecar["architecture"] == "tiny"
    assert (sidecar["method"], sidecar["step"], sidecar["colour_order"]) == ("densesiam", 6, "RGB")
    densesiam.build_encoder("tiny").load_state_dict(
        load_file(tmp_path / "whole" / "encoder.safetensors")
    )

    asked = iter([False, True])  # stopped after the second step... and again after the third
    with monkeypatch.context() as patch:
        patch.setattr(harness.Run, "stop_requested", lambda self: next(asked, True))
        densesiam.train(replace(config, run=tmp_path / "halted"))
        densesiam.train(replace(config, run=tmp_path / "halted"))
    assert len(rows(tmp_path / "halted")) == 3
    assert not (tmp_path / "halted" / "encoder.json").exists()
    densesiam.train(replace(config, run=tmp_path / "halted", workers=1))
    assert rows(tmp_path / "halted") == whole
    densesiam.train(replace(config, run=tmp_path / "halted"))  # finished: nothing more happens
    assert rows(tmp_path / "halted") == whole


@pytest.fixture
def free_port():
    def find():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # says nothing of the result
@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"compile": True}])
def test_bf16_and_compiled_runs_stay_close(tmp_path, folder, monkeypatch, changes):
    def compile_in_eager(self, disable):  # the graph without the minutes of code generation
        torch.nn.Module.compile(self, backend="aot_eager", disable=disable)

    monkeypatch.setattr(DenseSiam, "compile", compile_in_eager)
    config = replace(SMALL, data=folder, epochs=1)
    densesiam.train(replace(config, run=tmp_path / "plain"))
    densesiam.train(replace(config, run=tmp_path / "other", **changes))
    for plain, other in zip(rows(tmp_path / "plain"), rows(tmp_path / "other"), strict=True):
        assert other == pytest.approx(plain, rel=0.1, abs=0.1)


def test_the_baseline_says_so_beside_its_weights(tmp_path, folder):
    config = replace(SMALL, data=folder, loss=PRESETS["simsiam"].loss, epochs=1, run=tmp_path)
    densesiam.train(config)
    assert json.loads((tmp_path / "encoder.json").read_text())["method"] == "simsiam"


def test_views_and_colours_draw_other_numbers(folder, monkeypatch):
    drawn = {}
    generator, seeded = harness.generator, harness.seeded
    monkeypatch.setattr(
        harness, "generator", lambda *key: drawn.setdefault("views", key) and generator(*key)
    )
    monkeypatch.setattr(
        harness, "seeded", lambda *key: drawn.setdefault("colours", key) and seeded(*key)
    )
    densesiam.TwoViews(harness.image_source(folder, scenes=0), SMALL)[[0, 1]]
    first = [torch.rand(4, generator=generator(*drawn[name])) for name in ("views", "colours")]
    assert not torch.equal(*first)


def two_processes(rank, store, config, stop_after):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=store)
    if stop_after:
        asked = iter([False] * (stop_after - 1) + [True])
        harness.Run.stop_requested = lambda self: next(asked)
    densesiam.train(config)


def test_two_processes_train_and_resume_alike(tmp_path, folder, free_port):
    config = replace(SMALL, data=folder)

    def launch(name, stop_after=0):
        torch.multiprocessing.start_processes(
            two_processes,
            (str(free_port()), replace(config, run=tmp_path / name), stop_after),
            nprocs=2,
            start_method="fork",
        )

    launch("whole")
    launch("halted", stop_after=1)
    launch("halted")
    assert len(rows(tmp_path / "whole")) == 4
    assert rows(tmp_path / "whole") == rows(tmp_path / "halted")


def test_the_demo_prints_the_probe_and_the_prior(tmp_path, monkeypatch, capsys):
    source = harness.image_source
    monkeypatch.setattr(harness, "image_source", lambda data, scenes: source(data, scenes=16))
    monkeypatch.setattr(densesiam, "probe_scenes", lambda e: dk.testing.probe_scenes(e, count=16))
    densesiam.train(replace(SMALL, run=tmp_path, epochs=1))
    printed = capsys.readouterr().out
    scores = rows(tmp_path, "probe_miou")
    assert [row["step"] for row in scores] == [0, 2]
    assert f"step    2 (0: random): probe mIoU {scores[1]['probe_miou']:.3f}" in printed
    assert f"prior {scores[0]['prior_miou']:.3f}" in printed


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, folder, monkeypatch):
    config = replace(SMALL, data=folder, run=tmp_path, save_every=1)
    forward, calls = DenseSiam.forward, []

    def broken(self, *arguments):
        loss, terms = forward(self, *arguments)
        calls.append(1)
        return (loss * torch.nan if len(calls) == 3 else loss), terms

    monkeypatch.setattr(DenseSiam, "forward", broken)
    with pytest.raises(harness.NonFiniteError, match=r"step 2.*loss = nan.*step-00000002"):
        densesiam.train(config)
    monkeypatch.undo()
    densesiam.train(config)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_unreadable_files_are_named_and_the_run_goes_on(tmp_path, folder):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in folder.iterdir():
        (mixed / path.name).write_bytes(path.read_bytes())
    (mixed / "0-5.png").write_bytes((folder / "0-5.png").read_bytes()[:200])
    (mixed / "1-0.png").write_text("no image")
    densesiam.train(replace(SMALL, data=mixed, run=tmp_path / "run", epochs=3))
    named = (tmp_path / "run" / "unreadable.txt").read_text()
    assert "0-5.png" in named
    assert "1-0.png" in named
    assert len(named.splitlines()) == 2
    assert len(rows(tmp_path / "run")) == 6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"preset": "paper"}, "--data"),
        ({"data": Path("nowhere")}, "nowhere"),
        ({"data": Path(__file__)}, "test_densesiam.py"),
        ({"data": "folder", "batch": 1}, "--batch 1"),
        ({"data": "folder", "batch": 64}, "20 images"),
        ({"data": "folder", "arch": "resnet5"}, "resnet5"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, folder, changes, sentence):
    changes = {k: folder if v == "folder" else v for k, v in changes.items()}
    with pytest.raises(harness.UserError, match=sentence) as error:
        densesiam.train(replace(SMALL, run=tmp_path / "run", **changes))
    assert "\n" not in str(error.value)


def test_an_empty_folder_ends_the_command_with_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    done = command("--data", tmp_path / "empty", "--run", tmp_path / "run", "--device", "cpu")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No image" in done.stderr
    assert "empty" in done.stderr


def test_help_answers_without_importing_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    done = command("--help", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "--views.size" in done.stdout
    wrong = command("--views.sise", "3", PYTHONPATH=str(tmp_path))
    assert wrong.returncode == 2
    assert "--views.size" in wrong.stdout + wrong.stderr  # the nearest option is named


def test_the_files_stay_short():
    for name, limit in {"densesiam.py": 300, "harness.py": 350}.items():
        assert len((RECIPES / name).read_text().splitlines()) <= limit, name
