"""Weights of others: files in the layouts that they have in the wild, made of networks of timm."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import densesiam
import pytest
import safetensors.torch
import test_densesiam
import timm
import torch
import torchvision
from downstream import encoders, weights
from harness import UserError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

VIT = "vit_tiny_patch16_224"
REGISTERS = "vit_small_patch14_reg4_dinov2"
ROTARY = "vit_small_patch16_dinov3_qkvb"
SMALL = {  # so that the real architectures are quick: their names and options are the true ones
    VIT: {"depth": 2, "embed_dim": 32, "num_heads": 2},
    REGISTERS: {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 56},
    ROTARY: {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 64},
    "resnet18": {"channels": (8, 8, 16, 16)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
}


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """`timm.create_model` makes the networks of these tests small; nothing is downloaded."""
    create = timm.create_model

    def create_small(name, pretrained=False, **options):
        own = SMALL.get(name.partition(".")[0], {})
        return create(name, **{**own, **options})

    monkeypatch.setattr(timm, "create_model", create_small)


def values(network, seed=0):
    """The tensors of a network with other values, so that none is at its start."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, x in network.state_dict().items():
        noise = torch.rand(x.shape, generator=generator) / 50
        state[name] = x + noise.to(x.dtype) if x.is_floating_point() else x
    return state


def prefixed(state, prefix):
    return {f"{prefix}{name}": x for name, x in state.items()}


def classifier(name):
    """The values of a network with its classifier, as a file of a classification has them."""
    return values(timm.create_model(name, num_classes=5))


# ---- layouts -------------------------------------------------------------------------------------
def dino(state, other):
    """DINO's checkpoint: student and teacher with heads, the optimizer, the options."""
    head = {"head.mlp.0.weight": torch.rand(4, 4), "head.last_layer.weight_g": torch.rand(4, 1)}
    return {
        "student": prefixed({**prefixed(other, "backbone."), **head}, "module."),
        "teacher": {**prefixed(state, "backbone."), **head},
        "optimizer": {"state": {0: {"exp_avg": torch.rand(4)}}},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small"),
        "dino_loss": {"center": torch.rand(1, 4)},
    }


def moco(state, other):
    queue = {"module.queue": torch.rand(4, 8), "module.queue_ptr": torch.zeros(1)}
    return {
        "epoch": 3,
        "arch": "resnet50",
        "state_dict": {
            **prefixed(other, "module.encoder_k."),
            **prefixed(state, "module.encoder_q."),
            **queue,
        },
    }


def mae(state, other):
    decoder = {
        "mask_token": torch.rand(1, 1, 8),
        "decoder_pos_embed": torch.rand(1, 5, 8),
        "decoder_blocks.0.norm1.weight": torch.rand(8),
        "decoder_norm.weight": torch.rand(8),
    }
    return {"model": {**state, **decoder}, "args": argparse.Namespace(mask_ratio=0.75)}


LAYOUTS = {
    "plain": lambda state, _: state,
    "state_dict": lambda state, _: {"state_dict": state},
    "model": lambda state, _: {"model": state, "optimizer": {"lr": 0.1}},
    "module": lambda state, _: {"state_dict": prefixed(state, "module.")},
    "compiled": lambda state, _: {"model": prefixed(state, "_orig_mod.")},
    "backbone": lambda state, _: {"state_dict": prefixed(state, "backbone.")},
    "encoder": lambda state, _: {"model": prefixed(state, "encoder.")},
    "lightning": lambda state, _: {"state_dict": prefixed(state, "model._orig_mod.backbone.")},
    "dino": dino,
    "moco": moco,
    "moco v3": lambda state, other: {
        "state_dict": {
            **prefixed(other, "module.momentum_encoder."),
            **prefixed(state, "module.base_encoder."),
        }
    },
    "ema": lambda state, other: {"state_dict": other, "state_dict_ema": state},
    "mae": mae,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", [VIT, "resnet18"])
def test_a_layout_of_the_wild_gives_the_weights(layout, architecture, tmp_path, capsys):
    if layout == "mae" and architecture != VIT:
        return
    state = classifier(architecture)
    other = values(timm.create_model(architecture, num_classes=5), seed=1)
    content = LAYOUTS[layout](state, other)
    path = tmp_path / "file.pth"
    torch.save(content, str(path))
    start = encoders.find_start(str(path), architecture)

    network = encoders.build_start(start)
    for name, x in network.state_dict().items():
        assert torch.equal(x, state[name]), name
    said = capsys.readouterr().err
    assert f"{path}: " in said  # the classifier, at least, is listed
    for word in {"dino": ["optimizer", "student"], "mae": ["decoder_blocks"]}.get(layout, []):
        assert word in said
    assert start.facts["unused"] in said


@given(
    parts=st.lists(
        st.sampled_from(["module", "backbone", "model", "_orig_mod", "net", "0"]), max_size=4
    ),
    wrapper=st.sampled_from([None, "state_dict", "model", "teacher", "student"]),
)
def test_any_prefix_and_wrapper_are_found(parts, wrapper):
    network = timm.create_model("resnet18", num_classes=0)
    state = network.state_dict()
    content = prefixed(state, "".join(f"{part}." for part in parts))
    tensors = weights.flatten({wrapper: content} if wrapper else content)
    fitted = weights.fit(tensors, network)
    assert all(torch.equal(fitted.tensors[name], x) for name, x in state.items())
    assert fitted.unmatched == []


def test_dinov2s_registers_and_chunks_of_blocks():
    """Its own names: register_tokens, mask_token, blocks in groups, a place of [CLS] of its own."""
    network = encoders.build(REGISTERS)
    state = values(network)
    cls_place = torch.rand(1, 1, 32)
    theirs = {
        "cls_token": state["cls_token"] - cls_place,
        "register_tokens": state["reg_token"],
        "mask_token": torch.rand(1, 32),
        "pos_embed": torch.cat([cls_place, state["pos_embed"]], 1),
    }
    for name, x in state.items():
        if name not in ("cls_token", "reg_token", "pos_embed"):
            chunked = name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1.")
            theirs[chunked] = x
    content = {"teacher": prefixed(theirs, "backbone.")}
    fitted = weights.fit(weights.flatten(content), network)
    for name, x in state.items():
        torch.testing.assert_close(fitted.tensors[name], x)
    assert fitted.unmatched == []


@pytest.mark.skipif(not timm.is_model(ROTARY), reason="this version of timm has no DINOv3")
def test_dinov3s_names():
    network = encoders.build(ROTARY)
    state = values(network)
    theirs = {"rope_embed.periods": torch.rand(16), "mask_token": torch.rand(1, 1, 64)}
    for name, x in state.items():
        if name.endswith("attn.q_bias"):
            v_bias = state[name.replace("q_bias", "v_bias")]
            theirs[name.replace("q_bias", "qkv.bias")] = torch.cat([x, torch.zeros_like(x), v_bias])
        elif not name.endswith("attn.v_bias"):
            name = name.replace("reg_token", "storage_tokens")
            name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
            theirs[name] = x
    fitted = weights.fit(theirs, network)
    for name, x in state.items():
        torch.testing.assert_close(fitted.tensors[name], x)


# ---- files that do not fit -----------------------------------------------------------------------
@pytest.mark.parametrize("architecture", [VIT, "resnet18", "convnext_atto"])
def test_a_file_that_fits_by_half_is_refused(architecture):
    network = encoders.build(architecture)
    state = network.state_dict()
    needed = [name for name in state if not name.endswith("num_batches_tracked")]
    lacking = {name: x for name, x in state.items() if name != needed[3]}
    with pytest.raises(UserError, match=f"1 of {len(needed)} tensors are missing, {needed[3]}"):
        weights.fit(lacking, network)
    larger = {**state, needed[0]: torch.zeros(1, 1, 1, 7)}
    with pytest.raises(UserError, match=r"1 of .* have another shape, such as .* 1 x 1 x 1 x 7"):
        weights.fit(larger, network)
    part = needed[-1].split(".")[0]
    deeper = {**state, f"{part}.99.weight": torch.zeros(3)}
    with pytest.raises(UserError, match=rf"1 tensors have no place in the network, {part}.99"):
        weights.fit(deeper, network)
    with pytest.raises(UserError, match=r"no tensor has a name of the network's"):
        weights.fit({"a.b": torch.zeros(3)}, network)


def test_a_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "file.pth"
    for content in (b"", b"no weights", b"\x80\x02cposix\nsystem\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"file.pth cannot be read as tensors alone"):
            encoders.find_start(str(path), "resnet18")
    torch.save({"model": Path("code")}, str(path))  # an object is code that would run
    with pytest.raises(UserError, match=r"file.pth cannot be read as tensors alone"):
        encoders.find_start(str(path), "resnet18")
    torch.save({"epoch": 3}, str(path))
    with pytest.raises(UserError, match=r"file.pth holds no tensor"):
        encoders.find_start(str(path), "resnet18")
    with pytest.raises(UserError, match=r"nowhere.pth does not exist"):
        encoders.find_start("timm:resnet18:nowhere.pth")


# ---- where weights are from ----------------------------------------------------------------------
def test_what_is_known_of_the_weights_follows_them(tmp_path):
    path = tmp_path / "dino.pth"
    torch.save(dino(classifier(VIT), classifier(VIT)), str(path))
    plain = encoders.find_start(str(path), VIT)
    assert (plain.mean, plain.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    with_tag = encoders.find_start(f"timm:{VIT}.augreg_in21k:{path}")
    assert (with_tag.mean, with_tag.std) == ((0.5,) * 3, (0.5,) * 3)
    told = with_tag.side_car()
    assert told["start"] == f"timm:{VIT}.augreg_in21k:{path}"
    assert told["start_source"] == str(path)
    known = timm.get_pretrained_cfg(f"{VIT}.augreg_in21k")
    assert told["start_license"] == (getattr(known, "license", None) or "not told")
    assert told["start_license"] in ("apache-2.0", "not told")  # older versions tell none
    assert tuple(told["input_size"]) == (3, 224, 224)

    encoder = encoders.load_encoder(f"timm:{VIT}.augreg_in21k:{path}")
    network = encoders.build_start(with_tag).eval()
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(encoder(images), encoders.last_map(network, images * 2 - 1))


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_torchvisions_weights_compute_the_same_in_timms_network(name, monkeypatch):
    monkeypatch.undo()  # both networks at their true sizes
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name).eval()
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: theirs)
    start = encoders.find_start(f"torchvision:{name}")
    assert start.side_car()["start_source"].startswith("https://download.")
    network = encoders.build_start(start).eval()
    images = torch.randn(1, 3, 224, 224)
    features = []
    head = theirs.fc if name == "resnet18" else theirs.heads
    head.register_forward_pre_hook(lambda _, rows: features.append(rows[0]))
    with torch.no_grad():
        theirs(images)
        found = network.forward_features(images)
    pooled = found.mean((-2, -1)) if found.ndim == 4 else found[:, 0]
    torch.testing.assert_close(pooled, features[0], rtol=1e-4, atol=1e-4)


def test_a_run_starts_from_weights_and_keeps_what_is_frozen(tmp_path):
    """The side-car says where it began; frozen stages, their statistics too, stay as they were."""
    state = classifier("resnet18")
    path = tmp_path / "file.pth"
    torch.save(LAYOUTS["module"](state, None), str(path))
    config = replace(
        test_densesiam.SMALL, arch="resnet18", weights=f"timm:resnet18.a1_in1k:{path}",
        freeze=2, run=tmp_path / "run", data=tmp_path / "images", epochs=1, batch=2,
    )  # fmt: skip
    (tmp_path / "images").mkdir()
    for number in range(4):
        color = (80 * number, 90, 200)
        Image.new("RGB", (48, 40), color).save(tmp_path / "images" / f"{number}.png")
    densesiam.train(config)
    told = json.loads((tmp_path / "run" / "encoder.json").read_text())
    assert (told["architecture"], told["method"]) == ("resnet18.a1_in1k", "densesiam")
    assert told["start_source"] == str(path)
    trained = safetensors.torch.load_file(tmp_path / "run" / "encoder.safetensors")
    for name, x in trained.items():
        is_frozen = name.startswith(("conv1", "bn1", "layer1", "layer2"))
        assert torch.equal(x, state[name]) == is_frozen, name
    # A run folder is a start, too; and its mean and standard deviation go on.
    again = encoders.find_start(str(tmp_path / "run"))
    assert torch.equal(again.weights["conv1.weight"], state["conv1.weight"])
    assert list(again.mean) == told["mean"]
