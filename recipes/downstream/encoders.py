"""The frozen encoder that a command names: one of ours, or any of timm's or torchvision's.

    runs/croc-coco/encoder.safetensors    what a recipe saved, with its side-car .json
    timm:vit_small_patch16_224            weights that timm downloads; torchvision:resnet50 likewise
    random:resnet18                       no training; also random:tiny and random:tiny-vit

No command of its own: `from downstream.encoders import load_encoder`.
"""

import json
from pathlib import Path
from typing import Any

import harness
import safetensors.torch
import timm
import torch
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
import densekit as dk

SMALL = {"layers": (1,) * 4, "channels": (16, 32, 64, 64), "stem_type": "deep", "stem_width": 8}
TINY = {  # the demos' architectures: names of timm, and options
    "tiny": ("resnet18", {**SMALL, "output_stride": 8}),
    "tiny-vit": (
        "vit_tiny_patch16_224",
        {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3},
    ),
}


class Encoder(nn.Module):
    """A frozen network and what it expects, called with RGB images in [0, 1], of whole cells.

    Attributes:
        name: What the command called it.
        architecture: Its name in timm or torchvision, or one of TINY.
        mean, std: Of the input's normalization, RGB.
        stride: Pixels of a cell of the last map.
        facts: The side-car of a checkpoint, or where the weights come from.
    """

    def __init__(self, name: str, architecture: str, network: Any, facts: dict):
        super().__init__()
        self.name, self.architecture, self.network, self.facts = name, architecture, network, facts
        self.mean = facts.get("mean", IMAGENET_DEFAULT_MEAN)
        self.std = facts.get("std", IMAGENET_DEFAULT_STD)
        self.by_timm = hasattr(network, "forward_intermediates")
        self.eval().requires_grad_(requires_grad=False)
        self.stride = 224 // self(torch.zeros(1, 3, 224, 224)).shape[-1]

    def levels(self, images: Tensor) -> list[Tensor]:
        """The maps (b, d, h, w) of the last four levels: C2 to C5, or the last blocks of a ViT."""
        mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (self.mean, self.std))
        images = (images - mean) / std
        if self.by_timm:
            count = min(4, len(self.network.feature_info))
            maps = self.network.forward_intermediates(
                images, indices=count, norm=True, intermediates_only=True
            )
            return list(maps)
        names = [f"layer{i}" for i in (1, 2, 3, 4)]
        if not hasattr(self.network, "layer4"):
            names = ["features"]
        return list(dk.layer_features(self.network, images, names).values())

    def forward(self, images: Tensor) -> Tensor:
        """The last map, (b, d, h, w)."""
        return self.levels(images)[-1]


def build(architecture: str, *, pretrained: bool = False) -> Any:
    """A network of timm without its head, with the options that our recipes give it."""
    name, options = TINY.get(architecture, (str(architecture), {}))
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:3]) or "resnet50"
        raise harness.UserError(f"There is no model {name} in timm: try {near}.")
    home = timm.models.model_entrypoint(name).__module__
    if home in ("timm.models.vision_transformer", "timm.models.deit"):
        options = {**options, "dynamic_img_size": True}
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:  # of a tag, a download, a file: many kinds
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = "has no weights to load here" if pretrained else "cannot be made"
        raise harness.UserError(f"timm's {name} {what}: {line}.") from error


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
    if kind == "torchvision":
        if architecture not in torchvision.models.list_models(torchvision.models):
            raise harness.UserError(f"There is no classifier {architecture} in torchvision.")
        try:
            network = torchvision.models.get_model(architecture, weights="DEFAULT")
        except OSError as error:
            raise harness.UserError(f"The weights of {name} did not arrive: {error}.") from error
        if not (hasattr(network, "layer4") or hasattr(network, "features")):
            raise harness.UserError(f"{name} has no feature map: take timm's model of that kind.")
        return Encoder(name, architecture, network, {"method": name})
    return read_checkpoint(Path(name))


def read_checkpoint(path: Path) -> Encoder:
    """What `harness.save_encoder` wrote: encoder.safetensors, with encoder.json beside it."""
    path = path / "encoder.safetensors" if path.is_dir() else path
    side_car = path.with_suffix(".json")
    for file in (path, side_car):
        if not file.is_file():
            raise harness.UserError(
                f"{file} does not exist: name a run folder or its encoder.safetensors, or one of "
                "timm:NAME, torchvision:NAME, random:NAME."
            )
    try:
        facts, weights = json.loads(side_car.read_text()), safetensors.torch.load_file(path)
        architecture, order = facts["architecture"], facts["color_order"]
        numbers = [[float(x) for x in facts[key]] for key in ("mean", "std")]
    except Exception as error:  # broken bytes raise nearly anything
        reason = f"{type(error).__name__}: {error}"
        raise harness.UserError(f"{path} and {side_car.name} cannot be read ({reason}).") from error
    if [*map(len, numbers)] != [3, 3] or not min(numbers[1]) > 0 or order != "RGB":
        raise harness.UserError(
            f"{side_car} has mean {facts['mean']}, std {facts['std']} and color_order {order}: "
            "three numbers each, the second above 0, and RGB are needed."
        )
    if architecture == "tiny" and "patch_embed.proj.weight" in weights:
        architecture = "tiny-vit"
    network = build(architecture)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:200]
        raise harness.UserError(f"{path} does not fit {architecture}: {line}.") from error
    return Encoder(str(path), architecture, network, facts)
