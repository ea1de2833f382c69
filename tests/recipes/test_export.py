"""Exported encoders, loaded into the other framework, or into a network with its names and sizes.

Detectron2 and OpenMMLab are not installed: their networks are written here from their sources.
"""

import json
import pickletools
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import export
import harness
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import yaml
from downstream import encoders
from export import Config
from harness import UserError
from torch import nn
from torch.nn import functional as F
import densekit as dk

MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)  # no two alike
IMAGES = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0))


def save(path, architecture, **facts):
    """A checkpoint in which every tensor matters: a new ResNet's last norms are zero."""
    draws = torch.Generator().manual_seed(0)
    network = encoders.build(architecture)
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.fill_(7)
        elif name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            value.copy_(torch.rand(value.shape, generator=draws) + 0.5)
        elif value.ndim == 1 or name in ("cls_token", "pos_embed"):
            value.copy_(torch.randn(value.shape, generator=draws) / 5)
    facts = {"mean": MEAN, "std": STD, "method": "croc", "step": 12, **facts}
    name = "tiny" if architecture == "tiny-vit" else architecture  # as the recipes call it
    harness.save_encoder(path, network, architecture=name, **facts)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(architecture):
        path = folder / architecture / "encoder.safetensors"
        if not path.exists():
            path.parent.mkdir()
            save(path, architecture)
        return str(path)

    return get


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Export, and what the side-car of the file says; also printed."""

    def command(architecture, to, suffix, **changes):
        out = tmp_path / f"a b{suffix}"
        config = Config(checkpoint(architecture), to=to, out=out, **changes)
        export.export(config)
        facts = json.loads((tmp_path / f"a b{suffix}.json").read_text())
        facts["lines"] = "\n".join(facts["load"])
        assert facts["lines"] in capsys.readouterr().out
        assert sorted(tmp_path.iterdir()) == [out, tmp_path / f"a b{suffix}.json"]
        return facts

    return command


@cache
def expected(checkpoint, architecture, images=IMAGES):
    return encoders.load_encoder(checkpoint(architecture)).levels(images / 255)


def same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert b.std() > 0.01 * b.abs().max()  # it says something
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def normalized(facts, images=IMAGES):
    """What a framework feeds the network, by what the file's side-car says."""
    images = images * (facts["white"] / 255)
    images = images.flip(1) if facts["color_order"] == "BGR" else images
    mean, std = (torch.tensor(facts[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


# ---- torchvision and timm themselves -------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "tiny-vit"])
def test_torchvision_loads_it_and_computes_the_same(run, checkpoint, architecture):
    facts = run(architecture, "torchvision", ".pth")
    exec(facts["lines"], space := {"torch": torch, "torchvision": torchvision})
    network, images = space["network"].eval(), normalized(facts)
    left_out = network.load_state_dict(space["weights"], strict=False)
    assert left_out.unexpected_keys == []
    wanted = expected(checkpoint, architecture)
    if architecture == "tiny-vit":
        assert left_out.missing_keys == ["heads.head.weight", "heads.head.bias"]
        tokens = network._process_input(images)
        tokens = network.encoder(torch.cat([network.class_token.expand(2, -1, -1), tokens], 1))
        same([tokens[:, 1:].mT.unflatten(2, (8, 8))], wanted[-1:])
    else:
        assert left_out.missing_keys == ["fc.weight", "fc.bias"]
        names = [f"layer{i}" for i in (1, 2, 3, 4)]
        same(list(dk.layer_features(network, images, names).values()), wanted)


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "suffix"),
    [
        ("resnet18", ".pth"),
        ("tiny", ".safetensors"),
        ("tiny-vit", ".safetensors"),
        ("convnext_atto", ".safetensors"),  # it has a normalization in its head
    ],
)
def test_timm_loads_it_with_and_without_a_new_head(run, checkpoint, architecture, suffix):
    facts = run(architecture, "timm", suffix)
    weights = safetensors.torch.load_file(checkpoint(architecture))
    lines = facts["lines"].split("# or, with a head:\n")
    assert len(lines) == 2
    for line, classes in zip(lines, (0, 10), strict=True):
        exec(line, space := {"timm": timm})
        network = space["network"].eval()
        assert network.num_classes == classes
        parts = ("fc", "head", "head.fc", "head.norm")
        head = {f"{name}.{kind}" for name in parts for kind in ("weight", "bias")}
        state = {k: v for k, v in network.state_dict().items() if k not in head}
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[key], weights[key]) for key in weights)
        features = network.forward_features(normalized(facts))
        if architecture == "tiny-vit":
            features = features[:, 1:].mT.unflatten(2, (8, 8))
        same([features], expected(checkpoint, architecture)[-1:])


def test_an_export_to_timm_is_the_checkpoint_itself(run, checkpoint, tmp_path):
    run("tiny", "timm", ".safetensors")
    mine, theirs = (Path(x) for x in (checkpoint("tiny"), tmp_path / "a b.safetensors"))
    first, second = (safetensors.torch.load_file(x) for x in (mine, theirs))
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


# ---- detectron2 ----------------------------------------------------------------------------------
class FrozenNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.full((width,), torch.nan))

    def forward(self, x):
        scale = self.weight / (self.running_var + 1e-5).sqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


class NormedConv(nn.Conv2d):
    def __init__(self, *args, **options):
        super().__init__(*args, bias=False, **options)
        self.norm = FrozenNorm(self.out_channels)

    def forward(self, x):
        return self.norm(super().forward(x))


class Block(nn.Module):
    def __init__(self, width, middle, out, groups, stride, bottleneck):
        super().__init__()
        if width != out:
            self.shortcut = NormedConv(width, out, 1, stride=stride)
        if bottleneck:  # STRIDE_IN_1X1: False
            self.conv1 = NormedConv(width, middle, 1)
            self.conv2 = NormedConv(middle, middle, 3, stride, padding=1, groups=groups)
            self.conv3 = NormedConv(middle, out, 1)
        else:
            self.conv1 = NormedConv(width, out, 3, stride, padding=1)
            self.conv2 = NormedConv(out, out, 3, padding=1)

    def forward(self, x):
        convs = [getattr(self, name) for name in ("conv1", "conv2", "conv3") if hasattr(self, name)]
        y = x
        for conv in convs[:-1]:
            y = conv(y).relu()
        return (convs[-1](y) + (self.shortcut(x) if hasattr(self, "shortcut") else x)).relu()


class Detectron2ResNet(nn.Module):
    """As build_resnet_backbone makes it from MODEL.RESNETS."""

    def __init__(self, sizes):
        super().__init__()
        assert sizes.pop("STRIDE_IN_1X1") is False
        depth = sizes.pop("DEPTH")
        counts = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[depth]
        self.stem = nn.Module()
        self.stem.conv1 = NormedConv(3, 64, 7, 2, padding=3)
        groups, out, width = sizes.pop("NUM_GROUPS"), sizes.pop("RES2_OUT_CHANNELS"), 64
        middle = groups * sizes.pop("WIDTH_PER_GROUP")
        assert not sizes
        for number, count in enumerate(counts):
            blocks, factor = [], 2**number
            for index in range(count):
                stride = 2 if number and not index else 1
                options = groups, stride, depth >= 50
                blocks.append(Block(width, middle * factor, out * factor, *options))
                width = out * factor
            self.add_module(f"res{number + 2}", nn.Sequential(*blocks))

    def forward(self, x):
        maps = [F.max_pool2d(self.stem.conv1(x).relu(), 3, stride=2, padding=1)]
        for name in ("res2", "res3", "res4", "res5"):
            maps.append(getattr(self, name)(maps[-1]))
        return maps[1:]


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "order"),
    [("resnet18", "bgr"), ("resnet50", "rgb"), ("resnext50_32x4d", None)],
)
def test_detectron2s_resnet_computes_the_same(run, checkpoint, tmp_path, architecture, order):
    facts = run(architecture, "detectron2", ".pkl", color_order=order)
    config = yaml.safe_load(facts["lines"])
    model, form = config["MODEL"], config["INPUT"]["FORMAT"]
    assert model["WEIGHTS"] == str(tmp_path / "a b.pkl")
    assert form == ("RGB" if order == "rgb" else "BGR")  # the default is detectron2's own
    content = np.load(model["WEIGHTS"], allow_pickle=True)  # it reads plain pickles too
    assert content["__author__"] == "densekit"
    assert content["matching_heuristics"] is True
    assert all(type(x) is np.ndarray and x.dtype == "f4" for x in content["model"].values())
    assert all(x.flags.writeable for x in content["model"].values())  # torch would warn
    network = Detectron2ResNet(model["RESNETS"])
    network.load_state_dict({k: torch.from_numpy(v) for k, v in content["model"].items()})
    mean, std = (torch.tensor(model[f"PIXEL_{x}"]).view(3, 1, 1) for x in ("MEAN", "STD"))
    images = IMAGES.flip(1) if form == "BGR" else IMAGES  # as detectron2 reads them, 0..255
    same(network((images - mean) / std), expected(checkpoint, architecture))
    assert torch.equal(normalized(facts), (images - mean) / std)


def test_the_pickle_names_nothing_that_an_old_numpy_lacks(run, tmp_path):
    run("resnet18", "detectron2", ".pkl")
    content, strings, found = (tmp_path / "a b.pkl").read_bytes(), [], set()
    for code, argument, _ in pickletools.genops(content):
        if isinstance(argument, str):
            strings.append(argument)
        if "GLOBAL" in code.name:
            found.add(" ".join(strings[-2:]))
    assert found <= {"numpy ndarray", "builtins bytearray"}
    assert "numpy ndarray" in found


# ---- mmdetection and mmsegmentation --------------------------------------------------------------
class FFN(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        first = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout())
        self.layers = nn.Sequential(first, nn.Linear(hidden, width), nn.Dropout())

    def forward(self, x):
        return x + self.layers(x)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x, identity):
        return identity + self.attn(x, x, x, need_weights=False)[0]


class Layer(nn.Module):
    def __init__(self, width, heads, hidden, eps):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn, self.ffn = Attention(width, heads), FFN(width, hidden)

    def forward(self, x):
        x = self.attn(self.ln1(x), identity=x)
        return x + self.ffn.layers(self.ln2(x))


class MMVisionTransformer(nn.Module):
    """As mmsegmentation's, of these options."""

    def __init__(
        self, img_size, patch_size, embed_dims, num_layers, num_heads, mlp_ratio, **options
    ):
        super().__init__()
        norm_cfg = {"type": "LN", "eps": 1e-6}  # timm's; mmsegmentation's default is 1e-5
        assert options == {"final_norm": True, "norm_cfg": norm_cfg}
        eps, cells = norm_cfg["eps"], (img_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dims))
        self.pos_embed = nn.Parameter(torch.empty(1, cells + 1, embed_dims))
        self.patch_embed = nn.Module()
        self.patch_embed.projection = nn.Conv2d(3, embed_dims, patch_size, patch_size)
        hidden = mlp_ratio * embed_dims
        self.layers = nn.ModuleList(
            Layer(embed_dims, num_heads, hidden, eps) for _ in range(num_layers)
        )
        self.ln1 = nn.LayerNorm(embed_dims, eps)

    def forward(self, images):
        x = self.patch_embed.projection(images)
        size, x = x.shape[2:], x.flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for layer in self.layers:
            x = layer(x)
        return [self.ln1(x)[:, 1:].mT.unflatten(2, size)]


def mm_resnet(type, depth, style, groups=1, base_width=64):  # whose names are torchvision's
    assert style == "pytorch"  # the stride in the 3 x 3
    assert type == ("ResNet" if groups == 1 else "ResNeXt")
    block = torchvision.models.resnet.BasicBlock
    block = torchvision.models.resnet.Bottleneck if depth >= 50 else block
    counts = {18: [2, 2, 2, 2], 50: [3, 4, 6, 3]}[depth]
    network = torchvision.models.ResNet(block, counts, groups=groups, width_per_group=base_width)
    network.fc = nn.Identity()
    return network


@torch.no_grad()
@pytest.mark.parametrize(
    ("to", "architecture", "order"),
    [
        ("mmdetection", "resnet18", "bgr"),
        ("mmdetection", "resnext50_32x4d", None),
        ("mmsegmentation", "resnet18", "rgb"),
        ("mmsegmentation", "tiny-vit", None),
        ("mmsegmentation", "tiny-vit", "bgr"),
    ],
)
def test_openmmlabs_backbones_compute_the_same(run, checkpoint, tmp_path, to, architecture, order):
    facts = run(architecture, to, ".pth", color_order=order)
    exec(facts["lines"], space := {})
    backbone, reader = space["model"]["backbone"], space["model"]["data_preprocessor"]
    path = str(tmp_path / "a b.pth")
    assert backbone.pop("init_cfg") == {"type": "Pretrained", "checkpoint": path}
    content = torch.load(path, weights_only=True)
    assert isinstance(content["meta"], dict)
    if vit := architecture == "tiny-vit":
        assert backbone.pop("type") == "VisionTransformer"
    network = (MMVisionTransformer if vit else mm_resnet)(**backbone).eval()
    network.load_state_dict(content["state_dict"])
    images = IMAGES.flip(1)  # mmcv reads BGR, 0..255
    images = images.flip(1) if reader["bgr_to_rgb"] else images
    mean, std = (torch.tensor(reader[key]).view(3, 1, 1) for key in ("mean", "std"))
    images, wanted = (images - mean) / std, expected(checkpoint, architecture)
    if vit:
        same(network(images), wanted[-1:])
    else:
        names = [f"layer{i}" for i in (1, 2, 3, 4)]
        same(list(dk.layer_features(network, images, names).values()), wanted)
    assert reader["bgr_to_rgb"] == (order != "bgr")
    assert torch.equal(normalized(facts), images)


# ---- onnx ----------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize(("architecture", "normalize"), [("tiny", False), ("tiny-vit", True)])
def test_onnxruntime_computes_the_same_of_images_of_any_size(
    run, checkpoint, architecture, normalize
):
    if architecture == "tiny-vit" and torch.__version__ < "2.9":
        # The exporter of torch 2.8 resizes the positions of a ViT in another way.
        with pytest.raises(UserError, match="That is more than 1e-4: nothing was written"):
            run(architecture, "onnx", ".onnx", normalize=normalize)
        return
    facts = run(architecture, "onnx", ".onnx", normalize=normalize)
    assert facts.get("normalized_inside", False) == normalize
    draws = torch.Generator().manual_seed(0)
    for shape in ((1, 3, 64, 64), (5, 3, 40, 120), (2, 3, 224, 64)):  # also those not tried there
        pixels = torch.randint(0, 256, shape, generator=draws)
        images = pixels / 255 if normalize else normalized(facts, pixels)
        space = {"onnxruntime": onnxruntime, "images": images.numpy()}
        exec(facts["lines"], space)
        names = [x.name for x in space["session"].get_outputs()]
        wanted = expected(checkpoint, architecture, pixels)
        assert names == [f"level{i}" for i in (1, 2, 3, 4)][-len(wanted) :]
        assert ", ".join(names) in facts["lines"]
        same([torch.from_numpy(x) for x in space["maps"]], wanted)


@pytest.mark.parametrize(("error", "fits"), [(5e-5, True), (2e-4, False), (torch.nan, False)])
def test_an_onnx_file_that_computes_something_else_is_not_written(
    run, checkpoint, monkeypatch, tmp_path, error, fits
):
    encoder = encoders.load_encoder(checkpoint("tiny"))

    class Session:  # which is wrong in one number, of the last batch only
        def __init__(self, content, **_):
            assert content == b"onnx"

        def run(self, _, feed):
            maps = [x.numpy() for x in encoder.levels(torch.from_numpy(feed["images"]))]
            if len(feed["images"]) == 3:
                maps[1][2, 0, 0, 0] += error * np.abs(maps[1]).max()
            return maps

    file = SimpleNamespace(SerializeToString=lambda: b"onnx")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: SimpleNamespace(model_proto=file))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    if fits:
        run("tiny", "onnx", ".onnx")
        assert (tmp_path / "a b.onnx").read_bytes() == b"onnx"
    else:
        with pytest.raises(UserError, match="more than 1e-4"):
            run("tiny", "onnx", ".onnx")
        assert list(tmp_path.iterdir()) == []


def test_a_network_of_one_size_does_not_go_to_onnx(run, monkeypatch, tmp_path):
    levels = encoders.Encoder.levels

    def fixed(self, images):
        assert images.shape[-1] == 224, "only 224"
        return levels(self, images)

    monkeypatch.setattr(encoders.Encoder, "levels", fixed)
    with pytest.raises(UserError, match="tiny does not go to ONNX: only 224"):
        run("tiny", "onnx", ".onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_the_exporter_cannot_express_is_said(run, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match="tiny does not go to ONNX: no such operator"):
        run("tiny", "onnx", ".onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnx"):
        run("tiny", "onnx", ".onnx")
    assert list(tmp_path.iterdir()) == []


# ---- what is written beside it -------------------------------------------------------------------
def test_the_side_car_says_what_the_file_is(run, checkpoint):
    facts = run("resnet18", "detectron2", ".pkl")
    assert facts["architecture"] == "resnet18"
    assert (facts["method"], facts["step"]) == ("croc", 12)
    assert facts["checkpoint"] == checkpoint("resnet18")
    assert (facts["format"], facts["color_order"], facts["white"]) == ("detectron2", "BGR", 255)
    assert facts["mean"] == [76.5, 102, 127.5]
    assert facts["std"] == [63.75, 51, 76.5]


def test_the_side_car_says_which_of_the_tiny_networks_it_is(run):
    facts = run("tiny-vit", "timm", ".pth")
    assert (facts["architecture"], facts["white"]) == ("tiny-vit", 1)
    assert (facts["mean"], facts["std"]) == (list(MEAN), list(STD))


def test_an_export_into_the_run_folder_leaves_the_checkpoint_as_it_is(tmp_path):
    path = save(tmp_path / "encoder.safetensors", "tiny")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    export.export(Config(str(tmp_path), to="timm", out=tmp_path / "encoder.pth"))
    assert {x: (tmp_path / x).read_bytes() for x in before} == before
    with pytest.raises(UserError, match="exists, add --overwrite"):
        export.export(Config(str(path), to="timm", out=path))


def test_an_encoder_without_a_checkpoint_is_exported_too(tmp_path):
    export.export(Config("random:tiny-vit", to="torchvision", out=tmp_path / "a.pth"))
    facts = json.loads((tmp_path / "a.pth.json").read_text())
    assert (facts["method"], facts["checkpoint"]) == ("random", "random:tiny-vit")


# ---- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("architecture", "to", "suffix", "changes", "message"),
    [
        ("tiny", "torchvision", ".pth", {}, "tiny: it takes .*resnet50, .* and plain ViTs"),
        ("tiny", "mmsegmentation", ".pth", {}, "tiny: it takes .*resnet50, .* and plain ViTs"),
        (
            "tiny-vit",
            "detectron2",
            ".pkl",
            {},
            "of tiny-vit: .*wide_resnet50_2.$",
        ),
        ("tiny-vit", "mmdetection", ".pth", {}, "of tiny-vit: .*resnext50_32x4d.$"),
        ("tiny", "detectron2", ".pth", {}, "--out is .* ends in .pkl for detectron2"),
        ("tiny", "timm", ".onnx", {}, "--out is .* ends in .safetensors or .pth for timm"),
        ("tiny", "torchvision", "", {}, "--out is .* ends in .pth for torchvision"),
        ("tiny", "timm", ".pth", {"color_order": "bgr"}, "--color-order is bgr: .*timm take RGB"),
        ("tiny", "onnx", ".onnx", {"color_order": "bgr"}, "--color-order is bgr: .*onnx take RGB"),
        ("tiny", "timm", ".pth", {"normalize": False}, "--no-normalize is given: .*timm holds"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    run, tmp_path, architecture, to, suffix, changes, message
):
    with pytest.raises(UserError, match=message) as error:
        run(architecture, to, suffix, **changes)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def stub(architecture, network):
    return SimpleNamespace(architecture=architecture, network=network.eval())


def vit(**options):
    sizes = {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 0}
    return timm.models.VisionTransformer(**{**sizes, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"init_values": 0.1},  # LayerScale: weights that have no place
        {"reg_tokens": 2},
        {"qkv_bias": False},
        {"no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"qk_norm": True},
        {"img_size": (32, 64)},
        {"act_layer": "quick_gelu"},  # all weights fit, and it would compute something else
        {"norm_layer": nn.LayerNorm},
        {"global_pool": "avg", "fc_norm": False},
    ],
)
def test_a_vit_with_other_parts_is_refused(options):
    export.check_fit(stub("vit", vit()), "mmsegmentation")
    with pytest.raises(UserError, match=r"vit (is not as|gives other features in) torchvision"):
        export.check_fit(stub("vit", vit(**options)), "torchvision")


def test_a_resnet_that_computes_something_else_is_refused():
    options = {"num_classes": 0, "zero_init_last": False}
    plain = stub("resnet18.a1_in1k", timm.create_model("resnet18", **options))
    for to in ("torchvision", "detectron2", "mmdetection", "mmsegmentation"):
        export.check_fit(plain, to)
    for change in ({"output_stride": 8}, {"act_layer": "gelu"}):
        network = timm.create_model("resnet18", **options, **change)
        with pytest.raises(UserError, match="gives other features in detectron2, by"):
            export.check_fit(stub("resnet18", network), "detectron2")
    with pytest.raises(UserError, match=r"is not as detectron2 has it: .*layer1"):
        export.check_fit(stub("resnet34", plain.network), "detectron2")
    with pytest.raises(UserError, match="mmdetection has no equal of wide_resnet50_2"):
        export.check_fit(stub("wide_resnet50_2", plain.network), "mmdetection")


def test_a_checkpoint_of_unknown_or_other_colors_is_refused(tmp_path):
    path = save(tmp_path / "encoder.safetensors", "tiny")
    side_car, out = path.with_suffix(".json"), tmp_path / "a.pth"
    facts = json.loads(side_car.read_text())

    def refused(message):
        with pytest.raises(UserError, match=message):
            export.export(Config(str(path), to="timm", out=out))
        assert not out.exists()

    side_car.write_text(json.dumps(facts | {"color_order": "BGR"}))
    refused("color_order BGR: RGB is needed")
    facts = {key: facts[key] for key in ("architecture", "mean")}
    side_car.write_text(json.dumps(facts))
    refused("encoder.json has no 'color_order'")
    side_car.unlink()
    refused("encoder.json does not exist")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path = save(tmp_path / "encoder.safetensors", "tiny")
    weights = safetensors.torch.load_file(path)
    weights["layer3.0.bn1.running_var"][3] = torch.inf
    safetensors.torch.save_file(weights, path)
    (out := tmp_path / "a.onnx").write_text("precious")
    with pytest.raises(UserError, match="infinite or NaN"):
        export.export(Config(str(path), to="onnx", out=out, overwrite=True))
    assert out.read_text() == "precious"


@pytest.mark.parametrize("std", [1e-320, 0.25])
def test_features_that_are_not_finite_are_refused(tmp_path, std):
    """Of finite numbers: a deviation that float32 does not hold, and weights that are too large."""
    path = save(tmp_path / "encoder.safetensors", "tiny")
    side_car = json.loads(path.with_suffix(".json").read_text())
    weights = safetensors.torch.load_file(path)
    if std > 0.1:
        weights = {k: x * 1e38 if x.is_floating_point() else x for k, x in weights.items()}
    safetensors.torch.save_file(weights, path)
    path.with_suffix(".json").write_text(json.dumps({**side_car, "std": [std] * 3}))
    with pytest.raises(UserError, match="gives features that are not finite"):
        export.export(Config(str(path), to="timm", out=tmp_path / "a.pth"))
    assert not (tmp_path / "a.pth").exists()


def test_a_file_is_replaced_only_on_demand(checkpoint, tmp_path):
    config = Config(checkpoint("tiny"), to="timm", out=tmp_path / "a.pth")
    for name in ("a.pth", "a.pth.json"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(UserError, match="exists, add --overwrite"):
            export.export(config)
        assert [(x.name, x.read_text()) for x in tmp_path.iterdir()] == [(name, "precious")]
        (tmp_path / name).unlink()
    (tmp_path / "a.pth").write_text("old")
    export.export(replace(config, overwrite=True))
    assert torch.load(tmp_path / "a.pth", weights_only=True).keys()
    with pytest.raises(UserError, match="is not a folder, give another"):
        export.export(replace(config, out=tmp_path / "none" / "a.pth"))
    assert not (tmp_path / "none").exists()
    (tmp_path / "b.pth").mkdir()
    with pytest.raises(UserError, match=r"b.pth is a folder, give another name"):
        export.export(replace(config, out=tmp_path / "b.pth", overwrite=True))


def test_the_file_is_written_once_and_last(checkpoint, tmp_path, monkeypatch):
    written, write = [], harness.write
    monkeypatch.setattr(
        harness, "write", lambda path, x: (written.append(path.name), write(path, x))
    )
    export.export(Config(checkpoint("tiny"), to="timm", out=tmp_path / "a.pth"))
    assert written == ["a.pth.json", "a.pth"]  # where it is, all is


def test_a_network_of_torchvisions_is_not_converted(monkeypatch, tmp_path):
    get_model = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **_: get_model(name))
    with pytest.raises(UserError, match="no network of timm: export timm:resnet18"):
        export.export(Config("torchvision:resnet18", to="timm", out=tmp_path / "a.pth"))


# ---- the command ---------------------------------------------------------------------------------
def test_the_command_exports_and_says_how_to_load_it(checkpoint, tmp_path):
    out, file = tmp_path / "vit.pth", Path(export.__file__)
    command = [sys.executable, file, checkpoint("tiny-vit"), "--to", "mmsegmentation"]
    done = subprocess.run(
        [*map(str, command), "--out", out], capture_output=True, text=True, timeout=240, check=True
    )
    assert done.stderr == ""
    lines = json.loads((tmp_path / "vit.pth.json").read_text())["load"]
    assert done.stdout.splitlines()[: len(lines)] == lines
    assert "'color_order': 'RGB'" in done.stdout


def test_a_refusal_is_one_line_and_the_exit_code_2(checkpoint, tmp_path, capsys):
    config = Config(checkpoint("tiny"), to="torchvision", out=tmp_path / "a.pth")
    assert harness.main(export.export, config) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# Each wrong option and the beginning of its sentence, without any file.
WRONG = [
    (["nowhere", "--to", "timm", "--out", "a.pth"], "nowhere does not exist: name a run folder"),
    (["random:tiny", "--to", "timm", "--out", "a.pkl"], "--out is a.pkl: give a file that ends"),
    (["random:tiny", "--to", "timm", "--out", "b/a.pth"], "--out is b/a.pth: b is not a folder"),
    (
        ["random:tiny", "--to", "timm", "--out", "a.pth", "--color-order", "bgr"],
        "--color-order is bgr: networks of timm take RGB",
    ),
    (
        ["random:tiny", "--to", "timm", "--out", "a.pth", "--no-normalize"],
        "--no-normalize is given: a file for timm holds only weights",
    ),
]
