"""The complete method in one short file."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import harness
import minimal
import pytest
import torch
from downstream.encoders import load_encoder
from minimal import Config
import densekit as dk

WRONG = [
    (["--freeze", "-1"], "--freeze is -1"),
    (["--freeze", "9"], "--freeze is 9"),
    (["--weights", " "], "--weights is empty"),
    (["--weights", "nowhere"], "nowhere does not exist"),
    (["--weights", "timm:no_such_net", "--freeze", "1"], "--weights is timm:no_such_net"),
    (["--size", "7"], "--size is 7: give 8 pixels or more"),
    (["--grid", "0"], "--grid is 0"),
    (["--arch", "vit_tin_patch16_224"], "--arch is vit_tin_patch16_224"),
    (["--arch", "vit_tiny_patch16_224", "--size", "15"], "--size is 15: give a multiple of 16"),
    (["--size", "36"], "--size is 36: give a multiple of 8, the side of a cell of tiny"),
    (
        ["--arch", "convnext_tiny", "--size", "100"],
        "--size is 100: give a multiple of 32,",
    ),
    (["--batch", "1"], "--batch is 1"),
    (["--epochs", "0"], "--epochs is 0"),
    (["--lr", "-1"], "--lr is -1.0"),
    (["--seed", "-1"], "--seed is -1"),
    (["--workers", "-1"], "--workers is -1"),
    (["--log-every", "0"], "--log-every is 0"),
    (["--save-every", "0"], "--save-every is 0"),
]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A configuration of two epochs of four steps, without the probe, which takes long."""
    monkeypatch.setattr(minimal, "probe", lambda model: 0.25)
    source = harness.image_source(None, scenes=16)
    monkeypatch.setattr(harness, "image_source", lambda *_, **__: source)
    return Config(
        run=tmp_path / "run", size=32, grid=3, batch=4, epochs=2, workers=0, log_every=1,
        save_every=4, device="cpu",
    )  # fmt: skip


def losses(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["loss"] for row in rows if "loss" in row]


def test_it_learns_and_resumes_to_the_same_losses(small, monkeypatch, tmp_path):
    minimal.train(small)
    whole = losses(small.run)
    assert len(whole) == 8
    assert sum(whole[-4:]) < sum(whole[:4])

    stopped = replace(small, run=tmp_path / "stopped")
    monkeypatch.setattr(harness.Run, "stop_requested", lambda run: len(losses(run.folder)) == 3)
    minimal.train(stopped)
    assert losses(stopped.run) == whole[:3]
    monkeypatch.setattr(harness.Run, "stop_requested", lambda _: False)
    minimal.train(stopped)
    assert losses(stopped.run) == whole

    weights = [load_encoder(str(run)).state_dict() for run in (small.run, stopped.run)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_pair_of_views_that_is_not_valid_changes_nothing(small):
    torch.manual_seed(0)
    with harness.process_group("cpu"):
        model = minimal.Minimal(small).eval()
        dataset = minimal.TwoViews(harness.image_source(None), small)
        normalize = (model.mean, model.std)
        images, views, valid, *_ = harness.make_batch(dataset, range(4), normalize=normalize)
        assert valid.all()
        first_views = [dk.index_views(view, slice(3)) for view in views]
        expected = model([x[:3] for x in images], first_views, valid[:3])
        images[0][3] = torch.nan
        found = model(images, views, torch.tensor([True, True, True, False]))
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_any_convolutional_backbone_trains(small):
    minimal.train(replace(small, arch="convnext_atto", epochs=1, size=64))
    assert load_encoder(str(small.run)).architecture == "convnext_atto"


def test_a_copy_runs_itself(tmp_path):
    folder = Path(harness.__file__).parent
    text = (folder / "minimal.py").read_text()
    start = "def train(config: Config) -> None:\n"
    assert start in text
    (tmp_path / "my-method.py").write_text(text.replace(start, f"{start}    sys.exit('my own')\n"))
    for name in ("harness.py", "minimal.py", "downstream"):
        (tmp_path / name).symlink_to(folder / name)
    done = subprocess.run(
        [sys.executable, "my-method.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr.endswith("my own\n")
