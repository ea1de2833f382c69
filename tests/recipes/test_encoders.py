"""Every kind of name of an encoder, and what is wrong with a name that is none."""

import json
import math
import os
from pathlib import Path

import harness
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from downstream import encoders
from downstream.encoders import load_encoder
from harness import UserError
from packaging.version import Version

MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)


@pytest.fixture
def checkpoint(tmp_path):
    """A run folder's encoder of this architecture, and the network that it holds."""

    def save(architecture, called=None, mean=MEAN):
        torch.manual_seed(1)
        network = encoders.build(architecture).eval()
        for value in network.parameters():
            value.data += torch.randn_like(value) / 20
        path, facts = tmp_path / "encoder.safetensors", {"method": "croc", "std": STD}
        called = called or architecture
        harness.save_encoder(path, network, architecture=called, mean=mean, **facts)
        return path, network

    return save


def last_map(network, images):
    """What timm itself makes of images in [0, 1]."""
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    features = network.forward_features(images)
    if features.ndim == 3:  # tokens, the class token first
        cells = [side // network.patch_embed.patch_size[0] for side in images.shape[2:]]
        features = features[:, 1:].mT.unflatten(2, cells)
    return features


# ---- ResNets -------------------------------------------------------------------------------------
RESNETS = [
    "resnet18", "resnet50.a1_in1k", "resnext50_32x4d", "wide_resnet50_2", "seresnet50",
    "resnest26d", "skresnet18", "res2net50_26w_4s", "ecaresnet50d_pruned",
]  # fmt: skip
OTHERS = [
    "resnetv2_50", "cspresnet50", "tresnet_m", "nf_resnet50", "gcresnet33ts", "legacy_seresnet18",
    "inception_resnet_v2", "vit_small_resnet26d_224", "resnet5", "resnet50.wrong", "tiny", "",
]  # fmt: skip


@pytest.mark.parametrize("name", RESNETS)
def test_what_passes_for_a_resnet_has_the_stages_that_the_recipes_use(name):
    if name == "ecaresnet50d_pruned" and Version(timm.__version__) < Version("1.0.23"):
        pytest.skip("this timm names another width than the network has")
    assert encoders.is_resnet(name)
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0, global_pool="")
        images = torch.zeros(2, 3, 64, 64)
        c2, *_, c4, c5 = network.forward_intermediates(
            images, indices=[1, 2, 3, 4], intermediates_only=True
        )
        assert network(images).shape == c5.shape == network.layer4(c4).shape
    assert c5.shape == (2, network.num_features, 2, 2)
    assert c2.shape[2:] == (16, 16)


@pytest.mark.parametrize("name", OTHERS)
def test_a_name_does_not_make_a_resnet(name):
    assert not encoders.is_resnet(name)


# ---- networks with levels ------------------------------------------------------------------------
def build_or_skip(name, **options):
    """The network, without values; an old timm gives the maps of fewer networks."""
    network = encoders.build(name, **options).to("meta")
    if not hasattr(network, "forward_intermediates"):
        assert Version(timm.__version__) < Version("1.0.24")
        pytest.skip("this timm gives no maps of the network")
    return network


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("convnext_atto", "head"),
        ("efficientnet_b0", "conv_head"),
        ("vgg11", "pre_logits"),
        ("rexnet_100", None),
    ],
)
def test_a_network_has_no_weight_that_its_maps_do_not_need(name, head):
    network = build_or_skip(name)
    assert len(encoders.map_sides(name)) == 4
    maps = encoders.level_maps(network, torch.zeros(2, 3, 64, 64, device="meta"))
    assert [x.shape[-1] for x in maps] == [16, 8, 4, 2]
    trained = [x for x in network.parameters() if x.requires_grad]
    gradients = torch.autograd.grad(sum(x.sum() for x in maps), trained, allow_unused=True)
    assert all(x is not None for x in gradients)
    if head:
        assert not list(getattr(network, head).parameters())


def test_a_network_trains_no_weight_that_its_last_map_does_not_need():
    network = build_or_skip("hrnet_w18_small", levels=1)
    last = encoders.last_map(network, torch.zeros(2, 3, 64, 64, device="meta"))
    trained = [x for x in network.parameters() if x.requires_grad]
    gradients = torch.autograd.grad(last.sum(), trained, allow_unused=True)
    assert all(x is not None for x in gradients)
    whole = encoders.build("hrnet_w18_small")
    assert network.state_dict().keys() == whole.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "side", "sides"),
    [
        ("vit_tiny_patch16_224", None, [14] * 4),
        ("tiny", 64, [16, 8, 8, 8]),
        ("tiny-vit", 64, [8] * 3),
        ("levit_128s", None, [14, 7, 4]),
        ("swin_tiny_patch4_window7_224", None, [56, 28, 14, 7]),
        ("swin_tiny_patch4_window7_224", 64, []),  # it takes images of one size
        ("vit_tiny_patch16_224", 60, []),
        ("no_such_network", None, []),
        ("", None, []),
    ],
)
def test_the_maps_of_a_network_are_told(name, side, sides):
    assert encoders.map_sides(name, side) == sides


# ---- checkpoints ---------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "called"),
    [
        ("tiny", "tiny"),
        ("tiny-vit", "tiny"),
        ("resnet18", "resnet18"),
        ("convnext_atto", "convnext_atto"),
    ],
)
def test_a_checkpoint_computes_what_its_network_does(checkpoint, architecture, called):
    path, network = checkpoint(architecture, called)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    wanted = last_map(network, images)
    for name in (path, path.parent):  # the file, or its folder
        encoder = load_encoder(str(name))
        assert (encoder.architecture, encoder.name) == (architecture, str(path))
        assert encoder.facts["method"] == "croc"
        assert (tuple(encoder.mean), tuple(encoder.std)) == (MEAN, STD)
        torch.testing.assert_close(encoder(images), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(encoder(images), encoder.levels(images)[-1])
        assert not encoder.training
        assert not any(x.requires_grad for x in encoder.parameters())


def test_a_missing_file_is_named(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"none does not exist: name a run folder .* random:NAME"):
        load_encoder("none")
    with pytest.raises(UserError, match=r"encoder.safetensors does not exist"):
        load_encoder(str(tmp_path))
    path, _ = checkpoint("tiny")
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"encoder.json does not exist"):
        load_encoder(str(path))


FACTS = {"architecture": "tiny", "mean": [0, 0, 0], "std": [1, 1, 1], "color_order": "RGB"}


@pytest.mark.parametrize(
    ("side_car", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", r"encoder.json is \[\]: fields by their names are needed"),
        *(
            (json.dumps({k: FACTS[k] for k in FACTS if k != x}), f"json has no '{x}'")
            for x in FACTS
        ),
        *(
            (json.dumps(FACTS | changes), message)
            for changes, message in [
                ({"architecture": "resnet"}, "no model resnet in timm: try"),
                ({"architecture": 7}, "has the architecture 7: a text is needed"),
                ({"architecture": "resnet18"}, "does not fit resnet18: .*conv1"),
                ({"architecture": "tiny-vit"}, "does not fit tiny-vit: .*cls_token"),
                ({"mean": None}, "has the mean None: a list is needed"),
                ({"channels": None}, "has the channels None: a whole number, 1 or more, is needed"),
                ({"mean": "123"}, "has the mean '123': a list is needed"),
                ({"mean": ["a", 0, 0]}, r"has mean \['a', 0, 0\] .*finite numbers are needed"),
                ({"std": [1, True, 1]}, r"std \[1, True, 1\]: finite numbers are needed"),
                ({"mean": [0, 0]}, r"has mean \[0, 0\]: three numbers are needed"),
                ({"std": [1, 1]}, r"has std \[1, 1\]: three numbers above 0 are needed"),
                ({"std": [1, 0, 1]}, r"has std \[1, 0, 1\]: three numbers above 0 are needed"),
                ({"mean": [0, math.nan, 0]}, r"has mean \[0, nan, 0\] .*finite numbers are needed"),
                ({"mean": [0, 0, math.inf]}, r"has mean \[0, 0, inf\] .*finite numbers are needed"),
                ({"std": [1, math.inf, 1]}, r"std \[1, inf, 1\]: finite numbers are needed"),
                ({"color_order": "BGR"}, "has color_order BGR: RGB is needed"),
            ]
        ),
    ],
)
def test_a_side_car_that_does_not_fit_is_refused(checkpoint, side_car, message):
    path, _ = checkpoint("tiny")
    path.with_suffix(".json").write_text(side_car)
    with pytest.raises(UserError, match=message) as error:
        load_encoder(str(path))
    assert "\n" not in str(error.value)


def test_broken_weights_are_refused(checkpoint):
    path, _ = checkpoint("tiny")
    content = path.read_bytes()
    for broken in (b"", b"no weights", content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"encoder.json cannot be read"):
            load_encoder(str(path))
    path.write_bytes(content)
    weights = safetensors.torch.load_file(path)
    for name in ("conv1.0.weight", "layer4.0.bn2.running_var"):
        rest = {key: value for key, value in weights.items() if key != name}
        safetensors.torch.save_file(rest, path)
        with pytest.raises(UserError, match=f"does not fit tiny: .*{name}"):
            load_encoder(str(path))


# ---- levels and strides --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("architecture", "strides", "channels"),
    [
        ("tiny", (4, 8, 8, 8), (16, 32, 64, 64)),
        ("resnet18", (4, 8, 16, 32), (64, 128, 256, 512)),
        ("tiny-vit", (8, 8, 8), (96, 96, 96)),  # three blocks
        ("vit_tiny_patch16_224", (16, 16, 16, 16), (192, 192, 192, 192)),
    ],
)
def test_the_levels_have_their_strides_and_channels(architecture, strides, channels):
    encoder = load_encoder(f"random:{architecture}")
    maps = encoder.levels(torch.rand(2, 3, 64, 96))
    assert [x.shape for x in maps] == [
        (2, d, 64 // stride, 96 // stride) for d, stride in zip(channels, strides, strict=True)
    ]
    assert encoder.stride == strides[-1]


@torch.no_grad()
def test_the_levels_of_a_vit_are_its_last_blocks():
    encoder = load_encoder("random:tiny-vit")
    images, network = torch.rand(1, 3, 64, 64), encoder.network
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (encoder.mean, encoder.std))
    x = network._pos_embed(network.patch_embed((images - mean) / std))
    for block, found in zip(network.blocks, encoder.levels(images), strict=True):
        x = block(x)
        torch.testing.assert_close(found, network.norm(x)[:, 1:].mT.unflatten(2, (8, 8)))


# ---- random, timm, torchvision -------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ["tiny", "tiny-vit"])
def test_a_random_encoder_belongs_to_its_seed(architecture):
    state = torch.get_rng_state()
    first, again = (load_encoder(f"random:{architecture}") for _ in range(2))
    other = load_encoder(f"random:{architecture}", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(first(images), again(images))
    assert not torch.allclose(first(images), other(images))
    assert first.facts["method"] == "random"


def test_timms_weights_come_with_their_own_normalization(monkeypatch):
    create, asked = timm.create_model, []

    def offline(name, pretrained, **options):
        asked.append((name, pretrained))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    encoder = load_encoder("timm:vit_tiny_patch16_224")
    assert asked == [("vit_tiny_patch16_224", True)]
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.5,) * 3)
    assert encoder.facts["method"] == "timm:vit_tiny_patch16_224"
    images = torch.rand(1, 3, 32, 32)
    features = encoder.network.forward_features(images * 2 - 1)[:, 1:]
    torch.testing.assert_close(encoder(images), features.mT.unflatten(2, (2, 2)))


@pytest.mark.parametrize(
    ("name", "levels", "sides", "stride"),
    # Without padding a map has fewer cells than the stride says.
    [("resnet18", 4, (56, 28, 14, 7), 32), ("squeezenet1_1", 1, (13,), 16)],
)
def test_torchvisions_networks_have_levels_or_one_map(monkeypatch, name, levels, sides, stride):
    get_model, asked = torchvision.models.get_model, []

    def offline(name, weights):
        asked.append((name, weights))
        return get_model(name)

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    encoder = load_encoder(f"torchvision:{name}")
    assert asked == [(name, "DEFAULT")]
    assert not encoder.by_timm
    maps = encoder.levels(torch.rand(1, 3, 224, 224))
    assert len(maps) == levels
    assert [x.shape[-1] for x in maps] == list(sides)
    assert encoder.stride == stride
    if name == "resnet18":
        conv1, *others = encoder.levels(torch.rand(1, 3, 64, 64), stem=True)
        assert conv1.shape == (1, 64, 32, 32)
        assert len(others) == 4


HIERARCHY = [4, 8, 16, 32]


@pytest.mark.parametrize(
    ("name", "strides", "own", "maps", "sentence"),
    [
        ("swin_tiny_patch4_window7_224", HIERARCHY, 224, 4, "takes images of 224 224"),
        ("eva02_tiny_patch14_224", [14] * 4, 224, 4, ""),
        ("hiera_tiny_224", HIERARCHY, 224, 4, "takes images of 224 224"),
        pytest.param(
            *("beit_base_patch16_224", [16] * 4, 224, 4, "takes images of 224 224"),
            marks=pytest.mark.slow,
        ),
        pytest.param("inception_v3", HIERARCHY, 299, 5, "", marks=pytest.mark.slow),
        pytest.param(
            *("swinv2_tiny_window8_256", HIERARCHY, 256, 4, "takes images of 256 256"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_networks_for_one_size_are_asked_at_their_own(name, strides, own, maps, sentence):
    encoder = load_encoder(f"random:{name}")
    assert encoder.strides == strides
    assert encoder.own_size == (own, own)
    assert encoder.takes((own, own)) == ""
    assert encoder.takes((448, 448)) == sentence
    assert encoder.takes((strides[-1] + 1, 448)) == f"takes multiples of {strides[-1]}"
    assert len(encoder.levels(torch.rand(1, 3, own, own), stem=True)) == maps


def test_a_network_without_maps_is_one_sentence(monkeypatch):
    tokens = torch.zeros(1, 5)
    monkeypatch.setattr(encoders.Encoder, "levels", lambda *_, **__: [tokens])
    with pytest.raises(UserError, match=r"^random:tiny gives no feature maps of all its levels\.$"):
        load_encoder("random:tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:vit_tiny_patch16_224.zzz", "timm's .* cannot be made: "),
        ("random:resnet1", "no model resnet1 in timm: try .*resnet"),
        ("timm:qqq", "no model qqq in timm: try resnet50"),
        ("torchvision:resnet1", "no classifier resnet1 in torchvision"),
        ("torchvision:fcn_resnet50", "no classifier fcn_resnet50 in torchvision"),
        ("resnet18", r"resnet18 does not exist: name .* timm:NAME"),
    ],
)
def test_a_name_that_is_none_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        load_encoder(name)


class Code:
    """What runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("before", [None, "0"])
def test_code_in_a_download_does_not_run(monkeypatch, tmp_path, before):
    torch.save({"a": Code(tmp_path / "ran")}, tmp_path / "weights.pth")

    def download(*_, **__):
        torch.load(tmp_path / "weights.pth", weights_only=False)

    monkeypatch.setattr(timm, "create_model", download)
    monkeypatch.setattr(torchvision.models, "get_model", download)
    if before is not None:
        monkeypatch.setenv(encoders.TENSORS_ALONE, before)
    for name in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(
            UserError, match=r"^[^\n]*resnet18 (has no weights|are no tensors alone)"
        ):
            load_encoder(name)
    assert not (tmp_path / "ran").exists()
    assert os.environ.get(encoders.TENSORS_ALONE) == before
    download()
    assert (tmp_path / "ran").exists()


def test_weights_that_do_not_arrive_are_refused(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(UserError, match=r"resnet18 has no weights to load here: no route\."):
        load_encoder("timm:resnet18")
    with pytest.raises(UserError, match="weights of torchvision:resnet18 did not arrive: no route"):
        load_encoder("torchvision:resnet18")


def test_a_network_of_torchvision_without_a_map_is_refused(monkeypatch):
    get_model = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: get_model(name))
    with pytest.raises(UserError, match="shufflenet_v2_x0_5 has no feature map: take timm's"):
        load_encoder("torchvision:shufflenet_v2_x0_5")
