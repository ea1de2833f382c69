"""A checkpoint's encoder for another framework: its names, its color order, its normalization.

    python recipes/export.py runs/dupr-coco --to detectron2 --out dupr.pkl
    python recipes/export.py runs/croc-coco/encoder.safetensors --to onnx --out croc.onnx

Prints the lines that load it there, which FILE.json keeps. More: docs/recipes/export.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro


@dataclass(frozen=True)
class Config:
    checkpoint: tyro.conf.Positional[str]  # A run folder, encoder.safetensors, or timm:NAME.
    to: Literal["torchvision", "timm", "detectron2", "mmdetection", "mmsegmentation", "onnx"]
    out: Path  # The file to write; beside it FILE.json says how to load it.
    color_order: Literal["rgb", "bgr"] | None = None  # It takes; else bgr for detectron2 alone.
    normalize: bool = True  # For onnx: inside the file, which takes images in [0, 1].
    overwrite: bool = False  # Replace FILE.


if __name__ == "__main__":  # the arguments before torch: --help answers at once
    CONFIG = tyro.cli(Config, description=__doc__)

import io
import json
import os
import pickle
import re
import warnings
from contextlib import suppress
from itertools import chain

import harness
import numpy as np
import safetensors.torch
import torch
import torchvision
from downstream.encoders import TINY, Encoder, load_encoder
from harness import UserError
from torch import Tensor, nn

# ---- names: from timm's, whose ResNets have torchvision's ----------------------------------------
SUFFIXES = {"timm": (".safetensors", ".pth"), "detectron2": (".pkl",), "onnx": (".onnx",)}
TORCHVISION_VIT = {  # pattern: replacement, one after another
    r"^cls_token": "class_token", r"^pos_embed": "encoder.pos_embedding",
    r"^patch_embed\.proj": "conv_proj", r"^norm\.": "encoder.ln.",
    r"^blocks\.(\d+)": r"encoder.layers.encoder_layer_\1", r"\.norm(\d)": r".ln_\1",
    r"\.attn\.qkv\.": ".self_attention.in_proj_", r"\.attn\.proj": ".self_attention.out_proj",
    r"\.mlp\.fc1": ".mlp.0", r"\.mlp\.fc2": ".mlp.3",
}  # fmt: skip
MMSEGMENTATION_VIT = {
    r"^patch_embed\.proj": "patch_embed.projection", r"^norm\.": "ln1.", r"^blocks": "layers",
    r"\.norm(\d)": r".ln\1", r"\.attn\.qkv\.": ".attn.attn.in_proj_",
    r"\.attn\.proj": ".attn.attn.out_proj", r"\.mlp\.fc1": ".ffn.layers.0.0",
    r"\.mlp\.fc2": ".ffn.layers.1",
}  # fmt: skip
DETECTRON2 = {
    r"^(?!layer)": "stem.", r"^layer1": "res2", r"^layer2": "res3", r"^layer3": "res4",
    r"^layer4": "res5", r"bn(\d)": r"conv\1.norm", r"downsample\.0": "shortcut",
    r"downsample\.1": "shortcut.norm",
}  # fmt: skip


def rename(weights: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """The same tensors by their new names."""
    for pattern, new in table.items():
        weights = {re.sub(pattern, new, name): value for name, value in weights.items()}
    return weights


# ---- does it fit? --------------------------------------------------------------------------------
def plain_vit(network: Any) -> dict[str, Any]:
    """The sizes of a ViT, as torchvision calls them; nothing for another network."""
    with suppress(AttributeError):
        patches, block = network.patch_embed, network.blocks[0]
        return {
            "image_size": patches.img_size[0], "patch_size": patches.patch_size[0],
            "num_layers": len(network.blocks), "num_heads": block.attn.num_heads,
            "hidden_dim": network.embed_dim, "mlp_dim": block.mlp.fc1.out_features,
        }  # fmt: skip
    return {}


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, in units of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def check_fit(encoder: Encoder, to: str) -> None:
    """Refuse what torchvision's own network, which all four frameworks share, does not compute."""
    network, models = encoder.network, torchvision.models
    wide = "" if to.startswith("mm") else "wide_"  # OpenMMLab has none
    names = [x for x in models.list_models(models) if x.removeprefix(wide).startswith("resne")]
    vits = to in ("torchvision", "mmsegmentation")
    name, sizes = encoder.architecture.split(".")[0], plain_vit(network) if vits else {}
    if not sizes and name not in names:
        takes = ", ".join(names) + " and plain ViTs" * vits
        raise UserError(f"{to} has no equal of {encoder.architecture}: it takes {takes}.")
    side, table = (sizes["image_size"], TORCHVISION_VIT) if sizes else (64, {})
    images = torch.randn(1, 3, side, side, generator=harness.generator(0))
    try:
        with torch.device("meta"):  # no time for weights that are replaced
            other: Any = models.VisionTransformer(**sizes) if sizes else models.get_model(name)
        setattr(other, "heads" if sizes else "fc", nn.Identity())
        other.load_state_dict(rename(network.state_dict(), table), assign=True)
        gap = difference(other.eval()(images), network(images))
    except (RuntimeError, AssertionError) as error:
        detail = str(error).splitlines()[-1].strip(" \t.")[:200]
        raise UserError(f"{encoder.architecture} is not as {to} has it: {detail}.") from error
    if not gap < 1e-5:
        raise UserError(f"{encoder.architecture} gives other features in {to}, by {gap:.1e}.")


# ---- frameworks: the content of the file, and the lines that load it there -----------------------
class Job(NamedTuple):
    path: str
    encoder: Encoder
    weights: dict[str, Tensor]
    order: str  # RGB or BGR: of the images that the network takes
    mean: list[float]  # in that order, of values in [0, 1], or in [0, 255] where that is usual
    std: list[float]


def resnet_sizes(encoder: Encoder) -> tuple[int, int, int]:
    """The depth, the groups of a block and the width of a group."""
    conv = encoder.network.layer1[0].conv2
    depth = int(re.findall(r"\d+", encoder.architecture)[0])
    return depth, conv.groups, conv.out_channels // conv.groups


def to_torchvision(job: Job) -> tuple[Any, str]:
    name, sizes = job.encoder.architecture.split(".")[0], plain_vit(job.encoder.network)
    sizes_given = ", ".join(f"{key}={value}" for key, value in sizes.items())
    lines = f"""network = torchvision.models.{"VisionTransformer" if sizes else name}({sizes_given})
weights = torch.load({job.path!r}, weights_only=True)
network.load_state_dict(weights, strict=False)  # all but {"heads" if sizes else "fc"}"""
    return rename(job.weights, TORCHVISION_VIT if sizes else {}), lines


def to_timm(job: Job) -> tuple[Any, str]:
    name, options = TINY.get(job.encoder.architecture, (job.encoder.architecture, {}))
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    call, cfg = f"timm.create_model({name!r}{given}", {"file": job.path, "custom_load": False}
    lines = f"""network = {call}, num_classes=0, checkpoint_path={job.path!r})  # or, with a head:
network = {call}, num_classes=10, pretrained=True, pretrained_cfg_overlay={cfg})"""
    return job.weights, lines


def to_detectron2(job: Job) -> tuple[Any, str]:
    (depth, groups, width), path = resnet_sizes(job.encoder), json.dumps(job.path)
    sizes = f"DEPTH: {depth}, NUM_GROUPS: {groups}, WIDTH_PER_GROUP: {width}"
    lines = f"""MODEL:
  WEIGHTS: {path}
  PIXEL_MEAN: {job.mean}
  PIXEL_STD: {job.std}
  RESNETS: {{{sizes}, RES2_OUT_CHANNELS: {256 if depth > 34 else 64}, STRIDE_IN_1X1: False}}
INPUT: {{FORMAT: {job.order}}}"""
    weights = rename(job.weights, DETECTRON2)
    arrays = {k: v.numpy() for k, v in weights.items() if "num_batches" not in k}  # as in theirs
    return {"model": arrays, "__author__": "densekit", "matching_heuristics": True}, lines


def to_openmmlab(job: Job) -> tuple[Any, str]:
    if sizes := plain_vit(job.encoder.network):
        weights, width = rename(job.weights, MMSEGMENTATION_VIT), sizes["hidden_dim"]
        backbone = {key: sizes[key] for key in ("patch_size", "num_layers", "num_heads")}
        backbone |= {"type": "VisionTransformer", "img_size": sizes["image_size"]}
        backbone |= {"embed_dims": width, "mlp_ratio": sizes["mlp_dim"] // width}
        backbone |= {"final_norm": True, "norm_cfg": {"type": "LN", "eps": 1e-6}}
        if sizes["mlp_dim"] % width:
            raise UserError("A ViT of mmsegmentation has an MLP of a whole number of widths.")
    else:
        weights, (depth, groups, width) = job.weights, resnet_sizes(job.encoder)
        backbone = {"type": "ResNet", "depth": depth, "style": "pytorch"}
        backbone |= {"type": "ResNeXt", "groups": groups, "base_width": width} if groups > 1 else {}
    backbone |= {"init_cfg": {"type": "Pretrained", "checkpoint": job.path}}
    images = {"mean": job.mean, "std": job.std, "bgr_to_rgb": job.order == "RGB"}  # it reads BGR
    lines = f"model = dict(\n    data_preprocessor={images},\n    backbone={backbone},\n)"
    return {"state_dict": weights, "meta": {"author": "densekit"}}, lines


class Levels(nn.Sequential):  # what an ONNX file holds: images in, the maps of all levels out
    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        return tuple(self[0].levels(input))


def to_onnx(job: Job) -> tuple[Any, str]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  which the exporter needs
    except ImportError as error:
        raise UserError(f"{error}: pip install onnx onnxscript onnxruntime.") from error
    s, draws, model = job.encoder.stride, harness.generator(0), Levels(job.encoder).eval()
    shapes = (2, 3, 4 * s, 6 * s), (1, 3, 6 * s, 4 * s), (3, 3, 224, 224)
    batches = [torch.rand(shape, generator=draws) for shape in shapes]
    try:
        expected = [model(x) for x in batches]
        outputs = [f"level{i}" for i in range(5 - len(expected[0]), 5)]
        with warnings.catch_warnings(action="ignore"):  # of the exporter about its own parts
            program: Any = torch.onnx.export(
                model, (batches[0],), input_names=["images"], output_names=outputs, dynamo=True,
                dynamic_shapes=(dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),), verbose=False,
            )  # fmt: skip
        content = program.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found = [session.run(None, {"images": x.numpy()}) for x in batches]
    except Exception as error:  # whatever it is that the exporter cannot express
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{job.encoder.architecture} does not go to ONNX: {problem}") from error
    pairs = zip(chain(*found), chain(*expected), strict=True)
    gap = torch.tensor([difference(torch.tensor(a), b) for a, b in pairs]).max()
    print(f"onnxruntime and torch differ by {gap:.1e} of the largest value at most")
    if not gap < 1e-4:
        raise UserError("That is more than 1e-4: nothing was written.")
    lines = f"""session = onnxruntime.InferenceSession({job.path!r})
maps = session.run(None, {{"images": images}})  # sides: multiples of {s}; {", ".join(outputs)}"""
    return content, lines


FRAMEWORKS = {
    "torchvision": to_torchvision, "timm": to_timm, "detectron2": to_detectron2,
    "mmdetection": to_openmmlab, "mmsegmentation": to_openmmlab, "onnx": to_onnx,
}  # fmt: skip


# ---- the command ---------------------------------------------------------------------------------
class Pickler(pickle.Pickler):
    """Writes arrays so that any numpy reads them; versions before 1.26 do not know numpy 2's."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented


def load(config: Config) -> Encoder:
    """The encoder, if it can go there."""
    name, to, encoder = config.checkpoint, config.to, load_encoder(config.checkpoint)
    if not all(x.isfinite().all() for x in encoder.state_dict().values()):
        raise UserError(f"{name} has infinite or NaN weights: its training has diverged.")
    if to != "onnx" and not encoder.by_timm:
        raise UserError(f"{name} is no network of timm: export timm:{encoder.architecture}.")
    if to not in ("timm", "onnx"):
        check_fit(encoder, to)
    return encoder


def export(config: Config) -> None:
    out, to, ends = config.out, config.to, SUFFIXES.get(config.to, (".pth",))
    side_car = out.with_name(f"{out.name}.json")
    if out.suffix not in ends:
        raise UserError(f"--out {out} should end in {' or '.join(ends)} for {to}.")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out.parent} is not a folder to write to: name another with --out.")
    if (out.exists() or side_car.exists()) and not config.overwrite:
        raise UserError(f"{out} or its .json exists: add --overwrite, or name another with --out.")
    top = 255 if to in ("detectron2", "mmdetection", "mmsegmentation") else 1  # value of white
    if config.color_order == "bgr" and top == 1:
        raise UserError(f"Networks of {to} take RGB images: --color-order bgr is refused.")
    if not config.normalize and to != "onnx":
        raise UserError(f"--no-normalize is for onnx: a file for {to} only holds weights.")
    encoder = load(config)
    order = (config.color_order or ("bgr" if to == "detectron2" else "rgb")).upper()
    mean, std = ([round(top * x, 6) for x in y] for y in (encoder.mean, encoder.std))
    weights = {k: v.clone() for k, v in encoder.network.state_dict().items()}
    if order == "BGR":
        first = next(k for k, v in weights.items() if v.ndim == 4)
        mean, std, weights[first] = mean[::-1], std[::-1], weights[first].flip(1)
    if not config.normalize:
        encoder.mean, encoder.std = (0.0,) * 3, (1.0,) * 3
    content, lines = FRAMEWORKS[to](Job(str(out), encoder, weights, order, mean, std))
    buffer = io.BytesIO(content if to == "onnx" else b"")
    if out.suffix == ".pkl":
        Pickler(buffer, protocol=4).dump(content)
    elif out.suffix == ".pth":
        torch.save(content, buffer)
    elif out.suffix == ".safetensors":
        buffer.write(safetensors.torch.save(content, {"format": "pt"}))
    images = {"color_order": order, "white": top, "mean": mean, "std": std}
    images |= {"normalized_inside": True} if to == "onnx" and config.normalize else {}
    facts = {"architecture": encoder.architecture, "checkpoint": encoder.name, "format": to}
    facts = {**encoder.facts, **facts, **images, "load": lines.splitlines()}
    harness.write(side_car, (json.dumps(facts, indent=2) + "\n").encode())
    harness.write(out, buffer.getvalue())
    print(f"{lines}\n# images: {images}")


if __name__ == "__main__":
    harness.main(export, CONFIG)  # pyright: ignore[reportPossiblyUnboundVariable]
