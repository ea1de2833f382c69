"""What every recipe's run shows, as a user sees it. The methods: test_<recipe>.py."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import croc
import d3ssl
import densesiam
import dupr
import harness
import proposals
import pytest
import soco
import torch
import torch._dynamo  # before any fork: importing it in the children takes long
from downstream import encoders, scene_probe
from downstream.encoders import load_encoder
from files import project_files
from PIL import Image
from safetensors.torch import load_file
from test_croc import SMALL as CROC
from test_d3ssl import SMALL as D3SSL
from test_d3ssl import write_proposals
from test_densesiam import SMALL as DENSESIAM
from test_dupr import SMALL as DUPR
from test_soco import SMALL as SOCO
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
import densekit as dk
from densekit.scenes import sample_scenes

FOLDER = Path(harness.__file__).parent
# The module, the model, a small configuration, the baseline's name and how to get it, another
# preset, an architecture that does not exist, pictures a row, the filter that resizes a view.
RECIPES = {
    "croc": SimpleNamespace(
        module=croc, model=croc.CrOC, small=CROC, preset="coco", wrong="vit_smal", panels=10,
        filter="bicubic",
        baseline=("dino", {"alpha": 0.0}), encoder=lambda: croc.build_encoder("tiny", 0.0),
    ),
    "d3ssl": SimpleNamespace(
        module=d3ssl, model=d3ssl.D3SSL, small=D3SSL, preset="paper", wrong="resnet5", panels=5,
        filter="bilinear", source=partial(proposals.image_source, path=None),
        baseline=("decoupling", {"depositioning": 0.0}),
        encoder=lambda: encoders.build("tiny"),
    ),
    "densesiam": SimpleNamespace(
        module=densesiam, model=densesiam.DenseSiam, small=DENSESIAM, preset="paper",
        wrong="resnet5", panels=6, filter="bilinear",
        baseline=("simsiam", {"loss": densesiam.PRESETS["simsiam"].loss}),
        encoder=lambda: encoders.build("tiny"),
    ),
    "dupr": SimpleNamespace(
        module=dupr, model=dupr.DUPR, small=DUPR, preset="paper", wrong="resnet5", panels=4,
        filter="bilinear",
        baseline=("mocov2", {x: getattr(dupr.PRESETS["mocov2"], x) for x in ("alpha", "beta")}),
        encoder=lambda: encoders.build("tiny"),
    ),
    "soco": SimpleNamespace(
        module=soco, model=soco.SoCo, small=SOCO, preset="paper", wrong="resnet5", panels=3,
        filter="bilinear", source=partial(proposals.image_source, path=None),
        baseline=("soco-aug", {"cut": (0.2, 0.5), "optimizer": "lars"}),
        encoder=lambda: encoders.build("tiny"),
    ),
}  # fmt: skip


def slow(name):
    """A recipe whose run D3SSL's shows in its own way: its own test is test_soco.py."""
    return pytest.param(name, marks=pytest.mark.slow) if name == "soco" else name


@pytest.fixture(params=map(slow, RECIPES))
def name(request):
    return request.param


@pytest.fixture
def recipe(name):
    return RECIPES[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty images of two sizes, and proposals of all but one."""
    folder, boxes, sizes = tmp_path_factory.mktemp("images"), {}, {}
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate(((40, 48), (48, 40))):
        drawn = sample_scenes(10, size, generator=torch.Generator().manual_seed(number)).images
        for index, image in enumerate((drawn * 255).byte().movedim(1, -1).numpy()):
            Image.fromarray(image).save(folder / (name := f"{number}-{index}.png"))
            draws, room = torch.rand(2, index % 4 + 3, 2, generator=generator), torch.tensor(size)
            side = 12 + (draws[0] * 9).int()
            low = (draws[1] * (room.flip(0) - side + 1)).int()
            boxes[name], sizes[name] = torch.cat([low, low + side], 1).numpy(), size
    boxes["1-9.png"] = boxes["1-9.png"][:0]
    write_proposals(folder, boxes, sizes)
    return folder


def image_source(recipe, folder):
    """Its images, as the recipe itself reads them."""
    return getattr(recipe, "source", harness.image_source)(folder, scenes=0)


def rows(run, name="loss"):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if name in row]


def command(recipe, *arguments, **environment):
    return subprocess.run(
        [sys.executable, FOLDER / f"{recipe}.py", *map(str, arguments)],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def test_views_are_the_same_in_any_run_and_fit_their_crops(recipe, folder):
    dataset = recipe.module.TwoViews(image_source(recipe, folder), recipe.small)
    state = torch.get_rng_state()
    indices = [12, 3, 7, 18]  # of both sizes
    images, views, *_, unreadable = harness.make_batch(dataset, indices)
    again = harness.make_batch(dataset, indices)
    assert unreadable == []
    assert all(torch.equal(a, b) for a, b in zip(images, again[0], strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(harness.make_batch(dataset, indices, epoch=1)[0][0], images[0])
    # Without photometric noise a crop is the crop of its own image by its own view.
    plain = recipe.module.TwoViews(dataset.source, recipe.small)
    nothing = torch.nn.Identity()
    plain.photometric = [nothing, nothing] if isinstance(plain.photometric, list) else nothing
    crops, views, *_ = harness.make_batch(plain, indices)
    for row, index in enumerate(indices):
        pixels = dataset.source[index][0] / 255
        for crop, view in zip(crops, views, strict=True):
            alone = dk.View(view.box[row], view.flip[row])
            alone = dk.crop_views(pixels, alone, 32, interpolation=recipe.filter)
            exact = (alone.clamp(0, 1) * 255).round().byte()
            torch.testing.assert_close(crop[row], exact, atol=1, rtol=0)


def test_the_views_are_checked_in_the_first_epoch(recipe, folder, monkeypatch):
    checked = []
    monkeypatch.setattr(dk, "check_views", lambda *given: checked.append(given))
    dataset = recipe.module.TwoViews(image_source(recipe, folder), recipe.small)
    for index, size in ((0, (40, 48)), (12, (48, 40))):
        _, views, *_ = dataset[0, index]
        stacked, checked_size = checked.pop()
        assert torch.equal(stacked.box, torch.stack([view.box for view in views]))
        assert checked_size == size
    dataset[1, 3]
    assert checked == []


def test_views_and_colors_draw_other_numbers(recipe, folder, monkeypatch):
    drawn = {}
    generator, seeded = harness.generator, harness.seeded
    monkeypatch.setattr(
        harness, "generator", lambda *key: drawn.setdefault("views", key) and generator(*key)
    )
    monkeypatch.setattr(
        harness, "seeded", lambda *key: drawn.setdefault("colors", key) and seeded(*key)
    )
    recipe.module.TwoViews(image_source(recipe, folder), recipe.small)[0, 1]
    first = [torch.rand(4, generator=generator(*drawn[name])) for name in ("views", "colors")]
    assert not torch.equal(*first)


def test_a_run_leaves_everything_and_resumes_in_the_middle_of_an_epoch(
    name, recipe, tmp_path, folder, monkeypatch
):
    train = recipe.module.train
    config = replace(recipe.small, data=folder, epochs=3, keep=(1,))  # 2 batches an epoch, 6 steps
    train(replace(config, run=tmp_path / "whole"))
    whole = rows(tmp_path / "whole")
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    assert {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "pictures"} <= {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    pictures = sorted((tmp_path / "whole" / "pictures").glob("step-*"))
    assert [path.stem[-1] for path in pictures] == ["0", "2", "3", "6"]
    with Image.open(pictures[-1]) as picture:  # six rows
        assert picture.size == (recipe.panels * 226 + 2, 6 * 226 + 2)
    sidecar = json.loads((tmp_path / "whole" / "encoder.json").read_text())
    assert (sidecar["architecture"], sidecar["method"]) == ("tiny", name)
    assert (sidecar["step"], sidecar["color_order"]) == (6, "RGB")
    saved = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert [path.name for path in saved] == [
        "step-00000002-epoch-1", "step-00000003", "step-00000006",
    ]  # fmt: skip
    for path in (*saved, tmp_path / "whole"):
        recipe.encoder().load_state_dict(load_file(path / "encoder.safetensors"))
    assert not same_weights(*[load_file(path / "encoder.safetensors") for path in saved[:2]])
    assert same_weights(
        *[load_file(x / "encoder.safetensors") for x in (saved[2], saved[2].parents[1])]
    )

    asked = iter([False, True])  # stopped after the second step... and again after the third
    with monkeypatch.context() as patch:
        patch.setattr(harness.Run, "stop_requested", lambda self: next(asked, True))
        train(replace(config, run=tmp_path / "halted"))
        train(replace(config, run=tmp_path / "halted"))
    assert len(rows(tmp_path / "halted")) == 3
    encoder = load_encoder(str(tmp_path / "halted"))  # of the run that has not ended
    assert (encoder.facts["method"], encoder.facts["step"]) == (name, 3)
    train(replace(config, run=tmp_path / "halted", workers=1))
    assert rows(tmp_path / "halted") == whole
    train(replace(config, run=tmp_path / "halted"))  # finished: nothing more happens
    assert rows(tmp_path / "halted") == whole


def same_weights(first, second):
    return all(torch.equal(first[name], second[name]) for name in {**first, **second})


@pytest.fixture(scope="module")
def plain_rows(folder, tmp_path_factory):
    """The log of a short run of each recipe, made when it is first asked for."""
    made = {}

    def short(name):
        if name not in made:
            run = tmp_path_factory.mktemp("plain")
            RECIPES[name].module.train(short_config(name, folder, run))
            made[name] = rows(run)
        return made[name]

    return short


def short_config(name, folder, run, **changes):
    return replace(RECIPES[name].small, data=folder, epochs=1, run=run, **changes)


def assert_stays_close(name, folder, run, plain_rows, **changes):
    RECIPES[name].module.train(short_config(name, folder, run, **changes))
    for plain, other in zip(plain_rows(name), rows(run), strict=True):
        assert other == pytest.approx(plain, rel=0.1, abs=0.1)


def test_a_run_in_bfloat16_stays_close(name, tmp_path, folder, plain_rows):
    assert_stays_close(name, folder, tmp_path, plain_rows, precision="bf16")


# It says nothing of the result.
@pytest.mark.filterwarnings("ignore:Grad strides do not match")
@pytest.mark.parametrize(
    "name",
    # Compiling takes the longest; the networks and heads of the others are those of these two.
    [x if x in ("croc", "d3ssl") else pytest.param(x, marks=pytest.mark.slow) for x in RECIPES],
)
def test_a_compiled_run_stays_close(name, tmp_path, folder, plain_rows, monkeypatch):
    def compile_in_eager(self, disable):  # the graph without the minutes of code generation
        torch.nn.Module.compile(self, backend="aot_eager", disable=disable)

    monkeypatch.setattr(RECIPES[name].model, "compile", compile_in_eager)
    assert_stays_close(name, folder, tmp_path, plain_rows, compile=True)


def test_the_baseline_says_so_beside_its_weights(recipe, tmp_path, folder):
    method, changes = recipe.baseline
    config = replace(recipe.small, data=folder, epochs=1, run=tmp_path, **changes)
    recipe.module.train(config)
    assert json.loads((tmp_path / "encoder.json").read_text())["method"] == method


def two_processes(rank, name, port, config, killed_in):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=port)
    if killed_in and rank:
        calls = iter(range(1, killed_in))

        def stop_requested(self):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        harness.Run.stop_requested = stop_requested
    RECIPES[name].module.train(config)


def launch(function, *arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    name, *others = arguments
    torch.multiprocessing.start_processes(
        function, (name, port, *others), nprocs=2, start_method="fork"
    )


def test_two_processes_train_and_resume_alike(name, recipe, tmp_path, folder):
    """One of them is killed in step 4, in the middle of an epoch; the checkpoint is of step 3."""
    config = replace(recipe.small, data=folder)

    launch(two_processes, name, replace(config, run=tmp_path / "whole"), 0)
    killed = replace(config, run=tmp_path / "killed")
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        launch(two_processes, name, killed, 4)
    assert [x.name for x in (tmp_path / "killed/checkpoints").glob("step-*")] == ["step-00000003"]
    launch(two_processes, name, killed, 0)
    assert len(rows(tmp_path / "whole")) == 4
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")


def valid_on_the_other_process_only(rank, name, port, config):
    prune = dk.prune_clusters

    def none(assignments):
        found = prune(assignments)
        return found._replace(assignments=found.assignments * 0, valid=found.valid & False)

    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(dk, "prune_clusters", none)
        two_processes(rank, name, port, config, 0)


def test_a_process_without_any_valid_cluster_holds_no_other_up(tmp_path, folder):
    config = replace(CROC, data=folder, run=tmp_path)
    launch(valid_on_the_other_process_only, "croc", config)
    assert len(rows(tmp_path)) == 4
    assert all(row["cluster"] > 0 for row in rows(tmp_path))


def test_the_demo_prints_the_probe_and_the_prior(recipe, tmp_path, monkeypatch, capsys):
    for module, name in ((harness, "SceneImages"), (proposals, "SceneProposals")):
        scenes = getattr(module, name)
        monkeypatch.setattr(module, name, lambda _, scenes=scenes, **more: scenes(16, **more))
    probe = dk.probe_scenes
    monkeypatch.setattr(dk, "probe_scenes", lambda encode: probe(encode, count=16))
    monkeypatch.setattr(scene_probe, "FITTED", 16)
    recipe.module.train(replace(recipe.small, run=tmp_path, epochs=1))
    printed = capsys.readouterr().out
    scores = rows(tmp_path, "probe_miou")
    assert [row["step"] for row in scores] == [0, 2]
    assert f"step    2: probe mIoU {scores[1]['probe_miou']:.3f}" in printed
    assert f"most frequent class {scores[0]['prior_miou']:.3f}" in printed
    pictures = {path.name for path in (tmp_path / "pictures").glob("probe-*.png")}
    assert pictures == {"probe-000000.png", "probe-000002.png"}


def test_a_loss_that_is_not_finite_stops_the_run(recipe, tmp_path, folder, monkeypatch):
    config = replace(recipe.small, data=folder, run=tmp_path, save_every=1)
    forward, calls = recipe.model.forward, []

    def broken(self, *arguments):
        loss, *others = forward(self, *arguments)
        calls.append(1)
        return (loss * torch.nan if len(calls) == 3 else loss), *others

    monkeypatch.setattr(recipe.model, "forward", broken)
    with pytest.raises(harness.NonFiniteError, match=r"step 2.*loss = nan.*step-00000002"):
        recipe.module.train(config)
    monkeypatch.undo()
    recipe.module.train(config)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_unreadable_files_are_named_and_the_run_goes_on(recipe, tmp_path, folder):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in folder.iterdir():
        (mixed / path.name).write_bytes(path.read_bytes())
    known = proposals.default_path(folder)
    (tmp_path / "mixed.proposals.npz").write_bytes(known.read_bytes())
    (mixed / "0-5.png").write_bytes((folder / "0-5.png").read_bytes()[:200])
    (mixed / "1-0.png").write_text("no image")
    recipe.module.train(replace(recipe.small, data=mixed, run=tmp_path / "run", epochs=3))
    named = (tmp_path / "run" / "unreadable.txt").read_text()
    assert "0-5.png" in named
    assert "1-0.png" in named
    assert len(named.splitlines()) == 2
    assert len(rows(tmp_path / "run")) == 6


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("davit_tiny", "."),
        ("resnet18", "."),
        ("vit_base_patch16_siglip_224", r"; this network has no \[CLS\] token."),
        ("vit_dwee_patch16_reg1_gap_256", r"."),
        ("vit_little_patch16_reg1_gap_256", r"; this network has no \[CLS\] token."),
        ("vit_relpos_small_patch16_224", "; the last block of this network gives no queries"),
    ],
)
def test_croc_takes_vits_only(arch, reason):
    with pytest.raises(
        harness.UserError, match=f"--arch is {arch}: give a ViT of timm, .* tiny{reason}"
    ):
        croc.build_encoder(arch, 0.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"start": 1}, "--start is 1: give a number from 2 to 32"),
        ({"start": 33}, "--start is 33: give a number from 2 to 32"),
        ({"views": croc.Views(size=36)}, "--views.size is 36: give a multiple of 8"),
    ],
)
def test_croc_answers_impossible_numbers_of_tokens_with_a_sentence(changes, sentence):
    with pytest.raises(harness.UserError, match=sentence):
        croc.check_options(replace(CROC, **changes))


def test_a_warm_up_longer_than_the_run_is_the_run(tmp_path, folder):
    croc.train(replace(CROC, data=folder, run=tmp_path, warmup=10.0))
    lr = [row["lr"] for row in rows(tmp_path)]
    assert lr == sorted(lr)
    assert len(set(lr)) == 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"preset": "preset"}, "--data"),
        ({"data": Path("nowhere")}, "nowhere"),
        ({"data": Path(__file__)}, "test_recipes.py"),
        ({"data": "folder", "batch": 64}, "--batch is 64: give at most"),
        ({"data": "folder", "arch": "wrong"}, "--arch is .* timm"),
    ],
)
def test_bad_input_gets_one_sentence(recipe, tmp_path, folder, changes, sentence):
    known = {"folder": folder, "preset": recipe.preset, "wrong": recipe.wrong}
    changes = {key: known.get(value, value) for key, value in changes.items()}
    with pytest.raises(harness.UserError, match=sentence) as error:
        recipe.module.train(replace(recipe.small, run=tmp_path / "run", **changes))
    assert "\n" not in str(error.value)


def test_an_empty_folder_ends_the_command_with_one_sentence(tmp_path):
    """In a process of its own; the others have the same head, which test_options.py runs."""
    (tmp_path / "empty").mkdir()
    options = ["--data", tmp_path / "empty", "--run", tmp_path / "run", "--device", "cpu"]
    done = command("densesiam", *options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No image" in done.stderr
    assert "empty" in done.stderr


def test_the_recipes_have_the_same_sections_in_the_same_order(recipe):
    """So that a diff of two recipes shows what differs between the methods."""
    text = Path(recipe.module.__file__).read_text()
    banners = re.findall(r"^ *# ==== (\w+) =+$", text, flags=re.MULTILINE)
    assert banners == ["configuration", "views", "model", "loss", "evaluation", "loop"]


@pytest.mark.parametrize("path", project_files("recipes/*.py"), ids=lambda path: path.stem)
def test_every_file_but_the_harness_is_a_command(path):
    count = path.read_text().count('\nif __name__ == "__main__":\n')
    assert count == (0 if path.stem == "harness" else 1)
