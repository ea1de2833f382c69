"""The encoder that a command names: one of ours, or one of timm's, torchvision's or other people's.

    runs/croc-coco                        a run, which may go on: its newest encoder.safetensors
    runs/croc-coco/checkpoints/NAME       the encoder of one of its checkpoints
    timm:vit_small_patch16_224            weights that timm downloads
    torchvision:resnet50                  weights that torchvision downloads
    timm:vit_small_patch16_224.dino:FILE  a file of others, and the network of timm that it is of
    FILE                                  the same in a training recipe, whose --arch is the network
    lite0                                 EfficientNet-lite0's, of a package of PyPI
    random:resnet18                       no training; also random:tiny and random:tiny-vit

This module is no command: `from downstream.encoders import load_encoder`.
"""

import copy
import functools
import json
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import harness
import timm
import torch
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import group_parameters
from torch import Tensor, nn
import densekit as dk
from downstream import weights as weight_files
from downstream.bands import FILE_ORDER, Bands, bands_of, named
from downstream.fields import FieldError, get, items, table, text, to_float, whole

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
TENSORS_ALONE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # what torch asks the environment for
RESNET_LEVELS = ["layer1", "layer2", "layer3", "layer4"]  # in torchvision


# ---- the encoder ---------------------------------------------------------------------------------
class Encoder(nn.Module):
    """A frozen network with its normalization.

    It takes RGB images in [0, 1] whose sides are multiples of `stride`, or those of `own_size`;
    or bands, as their `bands` say.

    Attributes:
        name: The name that the command gave.
        architecture: The name of the network in timm or torchvision, or one of TINY.
        mean, std: Of the normalization of the input, in the order of the channels, RGB or `bands`.
        bands: How image files become its images; None: they are pictures.
        stride: The side of a cell of the last map, in pixels.
        strides: The same of each map of `levels`.
        own_size: The sides of the images that the network was made for.
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
        self.bands = bands_of(facts)
        self.by_timm = hasattr(network, "forward_intermediates")
        self.eval().requires_grad_(requires_grad=False)

        self.own_size = own_size(network)
        self.strides = self.find_strides()
        self.stride = self.strides[-1]

    def find_strides(self) -> list[int]:
        """The side of a cell of each map in pixels, from images of two sizes.

        A network without padding has fewer cells than its stride says, so one size is not enough.
        """
        channels = len(self.mean)
        height, width = self.own_size
        try:
            maps = self.levels(torch.zeros(1, channels, height, width, device=device_of(self)))
        except Exception as error:  # a network of timm that has no maps raises nearly anything
            reason = harness.first_line(error)
            raise harness.UserError(f"{self.name} gives no feature maps: {reason}.") from error
        shapes_right = all(x.ndim == 4 and min(x.shape) > 0 for x in maps)
        harness.check(shapes_right, f"{self.name} gives no feature maps of all its levels.")
        harness.check(
            all(bool(x.isfinite().all()) for x in maps),
            f"{self.name} gives features that are not finite: its weights or its normalization are "
            "broken.",
        )
        columns = [x.shape[-1] for x in maps]

        if is_vit(self.network):
            return [max(1, width // x) for x in columns]
        try:
            sides = (min(height, 96), width + 256)
            wide = torch.zeros(1, channels, *sides, device=device_of(self))
            wider = self.levels(wide)
            more = [x.shape[-1] for x in wider]
        except Exception:  # a network that takes images of one size
            return [max(1, width // x) for x in columns]
        return [max(1, 256 // max(1, b - a)) for a, b in zip(columns, more, strict=True)]

    def takes(self, size: tuple[int, int]) -> str:
        """Why the network takes no images of this size; empty where it does."""
        if tuple(size) == tuple(self.own_size):
            return ""
        if any(side % self.stride for side in size):
            return f"takes multiples of {self.stride}"
        try:
            probe = torch.zeros(1, len(self.mean), *size, device=device_of(self))
            maps = self.levels(probe)
        except Exception:  # a window or a table of positions that does not fit
            height, width = self.own_size
            return f"takes images of {height} {width}"
        return "" if min(maps[-1].shape) > 0 else "has no cell in a map of such images"

    def levels(self, images: Tensor, *, stem: bool = False) -> list[Tensor]:
        """The maps (b, d, h, w) of the last four levels: C2 to C5, or the last blocks of a ViT.

        With `stem` there is one more, if the network has it, in front of them: conv1 of a ResNet.
        """
        # `new_tensor` would copy them from the CPU, and the host would wait for the device.
        mean = torch.stack([images.new_full((1, 1), x) for x in self.mean])
        std = torch.stack([images.new_full((1, 1), x) for x in self.std])
        normalized = (images - mean) / std

        if self.by_timm:
            has_stem = stem and not is_vit(self.network)
            return level_maps(self.network, normalized, levels=5 if has_stem else 4)
        if hasattr(self.network, "feature_info"):  # of timm, without a method for its maps
            names = [x["module"] for x in self.network.feature_info][-5 if stem else -4 :]
        elif hasattr(self.network, "layer4"):
            names = ["relu", *RESNET_LEVELS] if stem else RESNET_LEVELS
        else:
            names = ["features"]
        return list(dk.layer_features(self.network, normalized, names).values())

    def forward(self, images: Tensor) -> Tensor:
        """The last map, (b, d, h, w)."""
        return self.levels(images)[-1]


def own_size(network: Any) -> tuple[int, int]:
    """The sides of the images that a network was made for."""
    known = getattr(network, "pretrained_cfg", None)
    if not known:
        return 224, 224
    height, width = known["input_size"][1:]
    patch = getattr(network, "patch_embed", None)
    height, width = getattr(patch, "img_size", None) or (height, width)  # of a network made smaller
    return height, width


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
def map_sides(architecture: str, side: int | None = None) -> list[int]:
    """The sides of the last four maps of square images; none, where there are no such maps.

    Args:
        architecture: A name of timm, or one of TINY.
        side: Of the images; by default the one that the network was made for.
    """
    network = probe(architecture)
    if network is None:
        return []
    side = side or network.pretrained_cfg["input_size"][-1]
    try:
        maps = level_maps(network, torch.zeros(2, 3, side, side, device="meta"))
    except Exception:  # a network that has no maps, or takes images of other sizes
        return []
    # Small images may leave nothing of a map.
    sides = [x.shape[-1] for x in maps if x.ndim == 4]
    return sides if min(sides, default=0) > 0 else []


@functools.cache
def probe(architecture: str) -> Any:
    """A network of timm on the device meta, which has shapes alone; None where there is none."""
    try:
        with harness.seeded(0):  # so that the caller's random numbers stay as they are
            return build(architecture).to("meta")
    except harness.UserError:
        return None


def check_maps(config: Any, option: str, side: int, *, levels: int = 1) -> None:
    """A UserError, unless the network of a training recipe has maps of square views.

    Args:
        config: With --arch and --weights.
        option: The option of the views' side.
        side: Of the views.
        levels: The number of maps that the recipe needs.
    """
    architecture = architecture_of(config)
    kind = "feature maps" if levels == 1 else f"{levels} levels of feature maps"
    harness.check(
        len(map_sides(architecture)) >= levels,
        f"{option_of(config)}: give a network of timm with {kind}, such as resnet50 or "
        "convnext_tiny, or tiny.",
    )
    check_side(option, side, probe(architecture), architecture)
    harness.check(
        len(map_sides(architecture, side)) >= levels,
        f"{option} is {side}: {architecture} takes no images of this size, but those of "
        f"{probe(architecture).pretrained_cfg['input_size'][-1]} pixels.",
    )
    check_cells(option, side, architecture)


def check_side(option: str, side: int, network: Any, architecture: str) -> None:
    """A UserError, unless whole patches of a ViT fit into a square view."""
    size = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if not is_vit(network) or size is None:
        return
    patch = size if isinstance(size, int) else size[0]
    check_multiple(option, side, patch, f"the side of a patch of {architecture}")


def check_cells(option: str, side: int, architecture: str) -> None:
    """A UserError, unless whole cells of the last map fit into a square view.

    Else they lie beside the places that a coordinate map gives them. A network without padding has
    such maps at its own size alone.
    """
    network = probe(architecture)
    if side != network.pretrained_cfg["input_size"][-1]:
        stride = network.feature_info[-1]["reduction"]
        check_multiple(option, side, stride, f"the side of a cell of {architecture}")


def check_multiple(option: str, side: int, unit: int, meaning: str) -> None:
    """A UserError, unless a side in pixels is a multiple of a unit, such as that of a patch."""
    below = side // unit * unit
    nearest = f"{below} or {below + unit}" if below else f"{unit}"
    harness.check(
        side % unit == 0,
        f"{option} is {side}: give a multiple of {unit}, {meaning}, such as {nearest}.",
    )


def level_maps(network: Any, images: Tensor, levels: int = 4) -> list[Tensor]:
    """The maps (b, d, h, w) of the last levels of a network of timm, the coarsest one last."""
    count = min(levels, len(network.feature_info))
    options = {"indices": count, "intermediates_only": True}
    try:
        maps = network.forward_intermediates(images, norm=True, **options)
    except AssertionError:  # Hiera and a few others have no norm for the maps of all levels
        maps = network.forward_intermediates(images, norm=False, **options)
    return list(maps)


def last_map(network: Any, images: Tensor) -> Tensor:
    """The coarsest map (b, d, h, w) of a network of timm."""
    (coarsest,) = level_maps(network, images, levels=1)
    return coarsest


@torch.enable_grad()
def unused_weights(network: Any, levels: int, channels: int = 3) -> set[str]:
    """The names of the weights that the maps of the last levels do not need."""
    probe = copy.deepcopy(network).to("meta").requires_grad_()
    height, width = network.pretrained_cfg["input_size"][1:]
    maps = level_maps(probe, torch.zeros(2, channels, height, width, device="meta"), levels)
    names, weights = zip(*probe.named_parameters(), strict=True)
    total = sum(x.sum() for x in maps)
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    return {name for name, x in zip(names, gradients, strict=True) if x is None}


def drop_head(network: Any, channels: int = 3) -> None:
    """Remove the parts that no map of the last four levels needs.

    Without its classes ConvNeXt keeps `head.norm`, and EfficientNet its last convolution. Their
    weights would get no gradient, and DistributedDataParallel would wait for them for ever.
    """
    unused = unused_weights(network, levels=4, channels=channels)
    for part, module in network.named_children():
        own = {f"{part}.{name}" for name, _ in module.named_parameters()}
        if own and own <= unused:
            setattr(network, part, nn.Identity())


# ---- frozen layers -------------------------------------------------------------------------------
def is_vit(network: Any) -> bool:
    """Whether a network of timm has tokens: it then has blocks, and the maps come after a norm."""
    return hasattr(network, "num_prefix_tokens")


def layer_of_parameters(network: Any, *, by_stage: bool) -> dict[str, int]:
    """The number of the block, or of the stage, that each parameter is in; the stem is 0."""
    return group_parameters(network, network.group_matcher(coarse=by_stage), reverse=True)


class FixedNorm(nn.Module):
    """What makes a batch normalization keep its statistics: it is always in evaluation mode."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


def freeze(network: Any, count: int) -> None:
    """Keep the stem and the first `count` stages of a network of timm, or blocks of a ViT.

    They are not trained, and their batch normalizations keep the statistics that they have.
    """
    if count == 0:
        return
    layers = layer_of_parameters(network, by_stage=not is_vit(network))
    frozen = {name for name, layer in layers.items() if layer <= count}
    for name in frozen:
        network.get_parameter(name).requires_grad_(requires_grad=False)
    for name, module in network.named_modules():
        own = {f"{name}.{weight}" for weight, _ in module.named_parameters(recurse=False)}
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and own <= frozen:
            module.__class__ = type(type(module).__name__, (FixedNorm, type(module)), {})
            module.eval()


def check_start(config: Any) -> None:
    """A UserError for a wrong --weights or --freeze of a training recipe."""
    harness.check(
        config.weights is None or config.weights.strip() != "",
        "--weights is empty: give lite0, timm:NAME, torchvision:NAME, a file or a run folder.",
    )
    count = config.freeze
    harness.check(count >= 0, f"--freeze is {count}: give 0 (nothing) or more.")
    if count == 0:
        return
    network = probe(architecture_of(config))
    if network is None:
        return  # what the recipe says of the network is more to the point
    harness.check(
        hasattr(network, "group_matcher"),
        f"--freeze is {count}: give 0, since timm does not tell the stages of this network.",
    )
    parts = max(layer_of_parameters(network, by_stage=not is_vit(network)).values())
    harness.check(
        count < parts,
        f"--freeze is {count}: give at most {parts - 1}, since the network has {parts} "
        f"{'blocks' if is_vit(network) else 'stages'}.",
    )


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
def build(
    architecture: str,
    *,
    pretrained: bool = False,
    levels: int = 4,
    channels: int = 3,
    **more: Any,
) -> Any:
    """A network of timm without its head, with the options that our recipes give it, and `more`.

    `level_maps` gives its feature maps. Its own `forward` may need the head, so do not call it.
    What the maps of the last `levels` do not need is not trained. Its images have `channels`.
    """
    name, options = TINY.get(architecture, (str(architecture), {}))
    options = {**options, **more}
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:3]) or "resnet50"
        raise harness.UserError(f"There is no model {name} in timm: try {near}.")

    home = timm.models.model_entrypoint(name).__module__
    if home in ("timm.models.vision_transformer", "timm.models.deit", "timm.models.eva"):
        options = {**options, "dynamic_img_size": True}
    if channels != 3:
        options = {**options, "in_chans": channels}
    try:
        with tensors_alone():
            network = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        if hasattr(network, "forward_intermediates"):
            drop_head(network, channels)
            # A few networks, such as HRNet, have weights that only other maps need.
            for unused in unused_weights(network, levels, channels):
                network.get_parameter(unused).requires_grad_(requires_grad=False)
    except Exception as error:  # a wrong tag, a download or a file raise errors of many kinds
        reason = harness.first_line(error)
        problem = "has no weights to load here" if pretrained else "cannot be made"
        raise harness.UserError(f"timm's {name} {problem}: {reason}.") from error
    return network


class Start(NamedTuple):
    """What a network starts from."""

    name: str  # as the command names it
    architecture: str  # a name of timm, or one of TINY
    weights: dict[str, Tensor] | None  # by the names of the network; None is random
    facts: dict[str, Any]  # mean, std, input_size, and the source and license of the weights

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each color that the weights are used to, of images in [0, 1]."""
        return tuple(self.facts["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each color that the weights are used to."""
        return tuple(self.facts["std"])

    @property
    def channels(self) -> int:
        """The number of channels of the images."""
        return len(self.facts["mean"])

    def side_car(self) -> dict[str, Any]:
        """What the side-car of an encoder tells that starts from here: see `save_encoder`."""
        facts = {"architecture": self.architecture, "mean": self.mean, "std": self.std}
        if self.weights is None:
            return facts
        return {
            **facts,
            "input_size": self.facts.get("input_size"),
            "start": self.name,
            "start_source": self.facts.get("source", self.name),
            "start_license": self.facts.get("license", NO_LICENSE),
        }


NO_LICENSE = "not told"
TORCHVISION_LICENSE = "see https://github.com/pytorch/vision#pre-trained-model-license"
IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}


def option_of(config: Any) -> str:
    """The beginning of a sentence about the network of a training recipe, such as `--arch is x`."""
    if config.weights is None:
        return f"--arch is {config.arch}"
    return f"--weights is {config.weights}"


def architecture_of(config: Any) -> str:
    """The network of a training recipe: that of its --weights, or else its --arch.

    Nothing is downloaded, and no tensor is read.
    """
    if config.weights is None:
        return config.arch
    kind, _, rest = config.weights.partition(":")
    if kind in ("timm", "random"):
        return rest.partition(":")[0]
    if kind == "torchvision":
        return timm_of_torchvision(rest)
    if config.weights == "lite0":
        return weight_files.LITE0_ARCHITECTURE
    path = Path(config.weights)
    return config.arch if is_of_others(path) else read_checkpoint(path).architecture


def read_start(config: Any) -> Start:
    """What the network of a training recipe starts from: its --weights, or its --arch at random."""
    if config.weights is None:
        return Start("random", config.arch, None, IMAGENET)
    start = find_start(config.weights, config.arch)
    check_pictures(start)
    return start


def check_pictures(start: Any) -> None:
    """A UserError where a start, or an encoder, is for other images than a recipe reads."""
    told = bands_of(start.facts)
    if told is not None:
        raise harness.UserError(
            f"{start.name} takes images of {named(told.channels)} as stored, and this recipe reads "
            "RGB pictures: give it to adapt.py, evaluate.py or export.py."
        )


def find_start(name: str, arch: str | None = None) -> Start:
    """The weights that `name` names.

    Args:
        name: As the docstring of this module lists.
        arch: The network of a file that does not tell it.
    """
    kind, _, rest = name.partition(":")
    if kind == "random":
        return Start(name, rest, None, {**IMAGENET, "method": "random"})
    if kind == "timm":
        architecture, _, file = rest.partition(":")
        if file:
            return read_file(name, Path(file), architecture)
        with harness.seeded(0):
            network = build(architecture, pretrained=True)
        return Start(name, architecture, network.state_dict(), facts_of_timm(name, network))
    if kind == "torchvision":
        return start_of_torchvision(name)
    if name == "lite0":
        architecture = weight_files.LITE0_ARCHITECTURE
        return fit(name, architecture, weight_files.read_lite0(), weight_files.LITE0_FACTS)
    path = Path(name)
    if arch is not None and is_of_others(path):
        return read_file(name, path, arch)
    return read_checkpoint(path)


def build_start(start: Start, *, levels: int = 4, **more: Any) -> Any:
    """A network of timm that starts from given weights; see `build` for the other arguments."""
    network = build(start.architecture, levels=levels, channels=start.channels, **more)
    if start.weights is not None:
        network.load_state_dict(start.weights)
    return network


def load_encoder(name: str, *, arch: str | None = None, seed: int = 0) -> Encoder:
    """The encoder that `name` names, in evaluation mode, on the CPU; see `find_start`."""
    kind, _, architecture = name.partition(":")
    if kind == "torchvision":
        network = build_torchvision(architecture)
        check_weights(name, network.state_dict())
        return Encoder(name, architecture, network, facts_of_torchvision(name))
    if kind == "timm" and ":" not in architecture:
        network = build(architecture, pretrained=True)
        check_weights(name, network.state_dict())
        return Encoder(name, architecture, network, facts_of_timm(name, network))
    return encoder_of(find_start(name, arch), seed=seed)


def encoder_of(start: Start, *, seed: int = 0) -> Encoder:
    """The network of timm that starts from given weights, with its normalization."""
    with harness.seeded(seed):
        network = build_start(start)
    return Encoder(start.name, start.architecture, network, start.facts)


def facts_of_timm(name: str, network: Any) -> dict[str, Any]:
    """What timm knows of the weights of a network: see `Start`."""
    config = network.pretrained_cfg
    hub = config.get("hf_hub_id")
    source = config.get("origin_url") or (f"https://huggingface.co/{hub}" if hub else name)
    return {
        "mean": config["mean"],
        "std": config["std"],
        "input_size": config["input_size"],
        "source": source,
        "license": config.get("license") or NO_LICENSE,
        "method": name,
    }


def is_of_others(path: Path) -> bool:
    """Whether it is a file of weights, without the side-car that ours have."""
    return path.is_file() and not path.with_suffix(".json").is_file()


def read_file(name: str, path: Path, architecture: str) -> Start:
    """The weights in a file of others, for a network of timm.

    The mean and the standard deviation are those of the weights that timm knows by this name, where
    it has a tag, such as `.dino`; else they are ImageNet's, which nearly all of such files use.
    """
    if not path.is_file():
        raise harness.UserError(f"{path} does not exist: {name} should be timm:NAME:FILE.")
    with harness.seeded(0):
        network = build(architecture)
    facts = facts_of_timm(name, network)
    if "." not in architecture:
        facts |= {**IMAGENET, "license": NO_LICENSE}
    facts["source"] = str(path)
    return fit(str(path), architecture, weight_files.read_tensors(path), facts, name=name)


def fit(
    source: str,
    architecture: str,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    *,
    name: str | None = None,
) -> Start:
    """The weights of a network among tensors of any names; what is left over is told.

    Args:
        source: Where they are from, for messages.
        architecture: Of timm.
        tensors: By the names of the file.
        facts: Of the weights.
        name: What the command calls them; by default the source.
    """
    with harness.seeded(0):
        network = build(architecture, channels=len(facts["mean"]))
    try:
        fitted = weight_files.fit(tensors, network)
    except harness.UserError as error:
        raise harness.UserError(f"{source} does not fit {architecture}: {error}.") from error
    check_weights(source, fitted.tensors)
    if fitted.unmatched:
        unused = weight_files.summary(fitted.unmatched)
        facts = {**facts, "unused": unused}
        if harness.is_main_process():
            harness.say(f"{source}: {len(fitted.unmatched)} tensors are not used: {unused}.")
    return Start(name or source, architecture, fitted.tensors, {"method": name or source, **facts})


def change_channels(start: Start, bands: Bands, how: str | None, *, seed: int = 0) -> Start:
    """A start for images of bands, whose mean and standard deviation count from now on.

    Args:
        start: Of any images.
        bands: The images.
        how: --channel-init, which has to be given where the number of channels changes.
        seed: Of what is drawn.
    """
    facts = {**start.facts, **bands.side_car()}
    old = start.channels
    if start.weights is None or old == bands.channels:
        return start._replace(facts=facts)
    count = named(bands.channels)
    if how is None:
        raise harness.UserError(
            f"The images have {count}, and {start.name} takes {old}: give --channel-init mean, "
            "zero or random, what the new channels start from."
        )
    with harness.seeded(0):
        network = build(start.architecture, channels=bands.channels)
    try:
        weights = weight_files.change_channels(
            start.weights, network.state_dict(), old, bands.channels, how, seed=seed
        )
    except harness.UserError as error:
        raise harness.UserError(f"{start.architecture} takes no {count}: {error}.") from error
    return start._replace(weights=weights, facts={**facts, "channel_init": how})


def for_pictures(
    start: Start,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    how: str | None,
    *,
    seed: int = 0,
) -> Start:
    """A start for RGB pictures, with another mean and standard deviation where they are given."""
    for option, values in (("--mean", mean), ("--std", std)):
        harness.check(
            values is None or len(values) == 3,
            f"{option} is {harness.as_typed(values)}: give three numbers, since the images are "
            "RGB pictures.",
        )
    told = bands_of(start.facts)
    if told is not None:
        pictures = Bands(3, (0.0, 255.0), False, IMAGENET["mean"], IMAGENET["std"])
        start = change_channels(start, pictures, how, seed=seed)
        start = start._replace(facts={**start.facts, "color_order": "RGB"})
    facts = dict(start.facts)
    if mean is not None:
        facts["mean"] = mean
    if std is not None:
        facts["std"] = std
    return start._replace(facts=facts)


def check_weights(source: str, weights: dict[str, Tensor]) -> None:
    """A UserError, unless all weights are finite: others would be scored, trained and exported."""
    for name, x in weights.items():
        harness.check(
            bool(x.isfinite().all()),
            f"{source} has infinite or NaN weights, such as {name}: its training has diverged.",
        )


# ---- torchvision ---------------------------------------------------------------------------------
# Its networks that timm has in other names.
VIT_OF_TORCHVISION = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
}
SAME_IN_TIMM = ("resnet", "resnext", "wide_resnet", "densenet", "vgg")


def timm_of_torchvision(architecture: str) -> str:
    """The name of the same network in timm, whose maps the training recipes need."""
    if architecture in VIT_OF_TORCHVISION:
        return VIT_OF_TORCHVISION[architecture]
    known = torchvision.models.list_models(torchvision.models)
    harness.check(architecture in known, f"There is no classifier {architecture} in torchvision.")
    harness.check(
        architecture.startswith(SAME_IN_TIMM) and timm.is_model(architecture),
        f"--weights is torchvision:{architecture}: give a ResNet, DenseNet, VGG or ViT of "
        "torchvision, or timm's network of this kind.",
    )
    return architecture


def start_of_torchvision(name: str) -> Start:
    """torchvision's weights, for timm's network."""
    _, _, their_name = name.partition(":")
    architecture = timm_of_torchvision(their_name)
    tensors = download_torchvision(their_name).state_dict()
    return fit(name, architecture, tensors, facts_of_torchvision(name))


def facts_of_torchvision(name: str) -> dict[str, Any]:
    """What torchvision knows of its newest weights of a network: see `Start`."""
    _, _, architecture = name.partition(":")
    weights = torchvision.models.get_model_weights(architecture)["DEFAULT"]
    preprocessing = weights.transforms()
    (side,) = preprocessing.crop_size
    return {
        "mean": tuple(preprocessing.mean),
        "std": tuple(preprocessing.std),
        "input_size": (3, side, side),
        "source": weights.url,
        "license": weights.meta.get("license", TORCHVISION_LICENSE),
        "method": name,
    }


def build_torchvision(architecture: str) -> Any:
    """A classifier of torchvision with its newest weights, which has maps."""
    network = download_torchvision(architecture)
    if not hasattr(network, "layer4") and not hasattr(network, "features"):
        raise harness.UserError(
            f"torchvision:{architecture} has no feature map: take timm's model of that kind."
        )
    return network


def download_torchvision(architecture: str) -> Any:
    """A classifier of torchvision with its newest weights."""
    if architecture not in torchvision.models.list_models(torchvision.models):
        raise harness.UserError(f"There is no classifier {architecture} in torchvision.")
    name = f"torchvision:{architecture}"
    try:
        with tensors_alone():
            return torchvision.models.get_model(architecture, weights="DEFAULT")
    except OSError as error:
        raise harness.UserError(f"The weights of {name} did not arrive: {error}.") from error
    except pickle.UnpicklingError as error:
        reason = harness.first_line(error)
        raise harness.UserError(
            f"The weights of {name} are no tensors alone ({reason})."
        ) from error


@contextmanager
def tensors_alone() -> Iterator[None]:
    """Inside, `torch.load` reads tensors alone, whoever calls it.

    timm and torchvision load what they have downloaded, and some versions would run code in it.
    """
    before = os.environ.get(TENSORS_ALONE)
    os.environ[TENSORS_ALONE] = "1"
    try:
        yield
    finally:
        del os.environ[TENSORS_ALONE]
        if before is not None:
            os.environ[TENSORS_ALONE] = before


# ---- our own files -------------------------------------------------------------------------------
def read_checkpoint(path: Path) -> Start:
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
                "timm:NAME, torchvision:NAME, random:NAME; for a file of others timm:NAME:FILE."
            )
    try:
        facts = table(json.loads(side_car.read_bytes()))
        tensors, own_facts = weight_files.read_safetensors(path)
        own_step = own_facts.get("step")
        if own_step is not None and facts.get("step", own_step) != own_step:
            facts = own_facts  # a run is just replacing both files
        architecture = text(get(facts, "architecture"), "architecture")
        color_order = get(facts, "color_order")
        mean = [to_float(x) for x in items(get(facts, "mean"), "mean")]
        std = [to_float(x) for x in items(get(facts, "std"), "std")]
        count = whole(facts.get("channels", 3), "channels", 1)
    except FieldError as error:
        raise harness.UserError(f"{side_car} {error}.") from error
    except Exception as error:  # broken bytes raise nearly anything
        reason = f"{type(error).__name__}: {error}"
        raise harness.UserError(f"{path} and {side_car.name} cannot be read ({reason}).") from error

    if len(mean) != count:
        needed = f"{numbers_of(count)} are needed"
        raise harness.UserError(f"{side_car} has mean {facts['mean']}: {needed}.")
    if not all(math.isfinite(x) for x in (*mean, *std)):
        problem = f"mean {facts['mean']} and std {facts['std']}: finite numbers are needed"
        raise harness.UserError(f"{side_car} has {problem}.")
    if len(std) != count or not min(std) > 0:
        problem = f"std {facts['std']}: {numbers_of(count)} above 0 are needed"
        raise harness.UserError(f"{side_car} has {problem}.")
    if color_order not in ("RGB", FILE_ORDER):
        raise harness.UserError(f"{side_car} has color_order {color_order}: RGB is needed.")
    if color_order == FILE_ORDER:
        check_range(side_car, facts)

    if architecture == "tiny" and "patch_embed.proj.weight" in tensors:
        architecture = "tiny-vit"  # CrOC's demo calls its ViT tiny, too
    return fit(str(path), architecture, tensors, {**facts, "mean": mean, "std": std})


def numbers_of(count: int) -> str:
    return "three numbers" if count == 3 else f"{count} numbers"


def check_range(side_car: Path, facts: dict[str, Any]) -> None:
    """A UserError where the side-car of an encoder of bands tells no range of values."""
    limits: Any = facts.get("value_range")
    is_pair = isinstance(limits, list) and len(limits) == 2
    are_numbers = is_pair and all(isinstance(x, (int, float)) for x in limits)
    if not are_numbers or not -math.inf < limits[0] < limits[1] < math.inf:
        raise harness.UserError(
            f"{side_car} has value_range {limits}: two numbers are needed, the lower first."
        )
    if not isinstance(facts.get("clip"), bool):
        raise harness.UserError(
            f"{side_car} has clip {facts.get('clip')}: true or false is needed."
        )
