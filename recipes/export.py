"""Write a checkpoint's encoder for another framework: under its names, in its color order.

    python recipes/export.py runs/dupr-coco --to detectron2 --out dupr.pkl
    python recipes/export.py runs/croc-coco/encoder.safetensors --to onnx --out croc.onnx

It prints the lines that load the file there, and keeps them in FILE.json.
More: docs/recipes/export.md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro


# ==== configuration ===============================================================================
@dataclass(frozen=True)
class Config:
    checkpoint: tyro.conf.Positional[str]  # A run folder, encoder.safetensors, or timm:NAME.
    # Library whose networks take the weights, or onnx.
    to: Literal["torchvision", "timm", "detectron2", "mmdetection", "mmsegmentation", "onnx"]
    out: Path  # File to write; FILE.json beside it says how to load it.
    color_order: Literal["rgb", "bgr"] | None = None  # Default bgr for detectron2, rgb otherwise.
    normalize: bool = True  # An ONNX file normalizes its images, and takes them in [0, 1].
    overwrite: bool = False  # Replaces FILE.


def read_options() -> Config:
    """Read the command line."""
    return tyro.cli(Config, description=__doc__)


if __name__ == "__main__":
    # The options are read before torch is imported, so that --help answers at once. This file then
    # runs a second time, as a module, and that time also the part below. The script itself ends at
    # sys.exit.
    config = read_options()
    import harness

    recipe = harness.module_of(__file__)
    sys.exit(harness.main(recipe.export, config))

import io
import json
import pickle
import re
import warnings

import harness
import numpy as np
import safetensors.torch
import timm
import torch
import torchvision
from downstream.bands import FILE_ORDER, named
from downstream.encoders import TINY, Encoder, load_encoder
from harness import UserError
from torch import Tensor, nn

SUFFIXES = {
    "torchvision": (".pth",),
    "timm": (".safetensors", ".pth"),
    "detectron2": (".pkl",),
    "mmdetection": (".pth",),
    "mmsegmentation": (".pth",),
    "onnx": (".onnx",),
}
# These read images in [0, 255], in either color order; the others read RGB images in [0, 1].
READ_BYTES = ("detectron2", "mmdetection", "mmsegmentation")


def check_options(config: Config) -> None:
    """Raise a UserError of one sentence for a wrong option, before anything is loaded."""
    out = config.out
    to = config.to
    suffixes = " or ".join(SUFFIXES[to])

    harness.check(
        out.suffix in SUFFIXES[to], f"--out is {out}: give a file that ends in {suffixes} for {to}."
    )
    harness.check(
        out.parent.is_dir(), f"--out is {out}: {out.parent} is not a folder, give another."
    )
    for file in (out, side_car_of(out)):
        harness.check(
            config.overwrite or not file.exists(),
            f"--out is {out}: {file} exists, add --overwrite or give another name.",
        )
        harness.check(not file.is_dir(), f"--out is {out}: {file} is a folder, give another name.")
        harness.check_output("--out", file)

    harness.check(
        config.color_order != "bgr" or to in READ_BYTES,
        f"--color-order is bgr: networks of {to} take RGB images, give rgb.",
    )
    harness.check(
        config.normalize or to == "onnx",
        f"--no-normalize is given: a file for {to} holds only weights, give it for onnx alone.",
    )


def side_car_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


# ==== names =======================================================================================
# Each table renames weights from timm's names, which torchvision's ResNets share. A row is a
# pattern and its replacement; the rows are applied one after another.
TORCHVISION_VIT = {
    r"^cls_token": "class_token",
    r"^pos_embed": "encoder.pos_embedding",
    r"^patch_embed\.proj": "conv_proj",
    r"^norm\.": "encoder.ln.",
    r"^blocks\.(\d+)": r"encoder.layers.encoder_layer_\1",
    r"\.norm(\d)": r".ln_\1",
    r"\.attn\.qkv\.": ".self_attention.in_proj_",
    r"\.attn\.proj": ".self_attention.out_proj",
    r"\.mlp\.fc1": ".mlp.0",
    r"\.mlp\.fc2": ".mlp.3",
}
MMSEGMENTATION_VIT = {
    r"^patch_embed\.proj": "patch_embed.projection",
    r"^norm\.": "ln1.",
    r"^blocks": "layers",
    r"\.norm(\d)": r".ln\1",
    r"\.attn\.qkv\.": ".attn.attn.in_proj_",
    r"\.attn\.proj": ".attn.attn.out_proj",
    r"\.mlp\.fc1": ".ffn.layers.0.0",
    r"\.mlp\.fc2": ".ffn.layers.1",
}
DETECTRON2 = {
    r"^(?!layer)": "stem.",
    r"^layer1": "res2",
    r"^layer2": "res3",
    r"^layer3": "res4",
    r"^layer4": "res5",
    r"bn(\d)": r"conv\1.norm",
    r"downsample\.0": "shortcut",
    r"downsample\.1": "shortcut.norm",
}


def rename(weights: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """The same tensors by their new names."""
    for pattern, replacement in table.items():
        weights = {re.sub(pattern, replacement, name): x for name, x in weights.items()}
    return weights


# ==== sizes =======================================================================================
class ResNetSizes(NamedTuple):
    depth: int
    groups: int  # of the 3 x 3 convolution of a block
    width: int  # channels of a group in the first level


def resnet_sizes(encoder: Encoder) -> ResNetSizes:
    conv = encoder.network.layer1[0].conv2
    depth = int(re.findall(r"\d+", encoder.architecture)[0])  # 50 of wide_resnet50_2
    return ResNetSizes(depth, conv.groups, conv.out_channels // conv.groups)


def vit_sizes(network: Any) -> dict[str, Any] | None:
    """The sizes of a ViT, by torchvision's names for them; None for another network."""
    try:
        patches = network.patch_embed
        block = network.blocks[0]
        return {
            "image_size": patches.img_size[0],
            "patch_size": patches.patch_size[0],
            "num_layers": len(network.blocks),
            "num_heads": block.attn.num_heads,
            "hidden_dim": network.embed_dim,
            "mlp_dim": block.mlp.fc1.out_features,
        }
    except (AttributeError, TypeError):  # XCiT has the side of a patch as a number
        return None


def torchvision_name(encoder: Encoder) -> str:
    """resnet50 of timm's resnet50.a1_in1k."""
    return encoder.architecture.split(".")[0]


# ==== does it fit? ================================================================================
def check_fit(encoder: Encoder, to: str) -> None:
    """Refuse a network that the framework would compute differently.

    torchvision's own network stands for all four frameworks, since they share its arithmetic.
    """
    takes_vits = to in ("torchvision", "mmsegmentation")
    sizes = vit_sizes(encoder.network) if takes_vits else None
    if sizes:
        side = sizes["image_size"]
        table = TORCHVISION_VIT
    else:
        side = 64
        table = {}
        check_resnet_name(encoder, to, takes_vits=takes_vits)

    images = torch.randn(1, 3, side, side, generator=harness.generator(0))
    try:
        with torch.device("meta"):  # no time for weights that are replaced
            other = build_torchvision(encoder, sizes)
        other.load_state_dict(rename(encoder.network.state_dict(), table), assign=True)
        with torch.no_grad():
            gap = difference(other.eval()(images), encoder.network(images))
    except (RuntimeError, AssertionError) as error:
        detail = str(error).splitlines()[-1].strip(" \t.")[:200]
        raise UserError(f"{encoder.architecture} is not as {to} has it: {detail}.") from error

    if not gap < 1e-5:
        raise UserError(f"{encoder.architecture} gives other features in {to}, by {gap:.1e}.")


def check_resnet_name(encoder: Encoder, to: str, *, takes_vits: bool) -> None:
    """Refuse what is no ResNet of torchvision; OpenMMLab has no wide ones."""
    beginnings = ("resnet", "resnext", "wide_resnet")
    if to in ("mmdetection", "mmsegmentation"):
        beginnings = ("resnet", "resnext")
    known = torchvision.models.list_models(torchvision.models)
    names = [name for name in known if name.startswith(beginnings)]
    if torchvision_name(encoder) not in names:
        takes = ", ".join(names)
        if takes_vits:
            takes += " and plain ViTs"
        raise UserError(f"{to} has no equal of {encoder.architecture}: it takes {takes}.")


def build_torchvision(encoder: Encoder, sizes: dict[str, Any] | None) -> nn.Module:
    """The network of torchvision, without its head: a ViT of these sizes, or a ResNet."""
    network: Any
    if sizes:
        network = torchvision.models.VisionTransformer(**sizes)
        network.heads = nn.Identity()
    else:
        network = torchvision.models.get_model(torchvision_name(encoder))
        network.fc = nn.Identity()
    return network


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


# ==== frameworks ==================================================================================
# Each function gives the content of the file, and the lines that load it in the framework.
class Job(NamedTuple):
    path: str  # of the file to write
    encoder: Encoder
    weights: dict[str, Tensor]
    order: str  # RGB or BGR: of the images that the network takes
    mean: list[float]  # in that order, of values in [0, 1], or in [0, 255] where that is usual
    std: list[float]


def to_torchvision(job: Job) -> tuple[Any, str]:
    sizes = vit_sizes(job.encoder.network)
    if sizes:
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        call = f"torchvision.models.VisionTransformer({given})"
        head = "heads"
        weights = rename(job.weights, TORCHVISION_VIT)
    else:
        call = f"torchvision.models.{torchvision_name(job.encoder)}()"
        head = "fc"
        weights = job.weights

    lines = f"""network = {call}
weights = torch.load({job.path!r}, weights_only=True)
network.load_state_dict(weights, strict=False)  # all but {head}"""
    return weights, lines


def to_timm(job: Job) -> tuple[Any, str]:
    architecture = job.encoder.architecture
    name, options = TINY.get(architecture, (architecture, {}))
    channels = len(job.encoder.mean)
    if channels != 3:
        options = {**options, "in_chans": channels}
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    call = f"timm.create_model({name!r}{given}"
    overlay = {"file": job.path, "custom_load": False}
    with harness.seeded(0):  # the names of its weights count, not their values
        whole = timm.create_model(name, num_classes=0, **options)
    if whole.state_dict().keys() == job.weights.keys():
        load = f"network = {call}, num_classes=0, checkpoint_path={job.path!r})"
    else:  # ConvNeXt without classes has a normalization in its head, which no map needs
        load = f"""network = {call}, num_classes=0)
timm.models.load_checkpoint(network, {job.path!r}, strict=False)  # all but the head"""

    lines = f"""{load}
# or, with a head:
network = {call}, num_classes=10, pretrained=True, pretrained_cfg_overlay={overlay})"""
    return job.weights, lines


def to_detectron2(job: Job) -> tuple[Any, str]:
    depth, groups, width = resnet_sizes(job.encoder)
    sizes = f"DEPTH: {depth}, NUM_GROUPS: {groups}, WIDTH_PER_GROUP: {width}"
    out_channels = 256 if depth > 34 else 64
    path = json.dumps(job.path)
    lines = f"""MODEL:
  WEIGHTS: {path}
  PIXEL_MEAN: {job.mean}
  PIXEL_STD: {job.std}
  RESNETS: {{{sizes}, RES2_OUT_CHANNELS: {out_channels}, STRIDE_IN_1X1: False}}
INPUT: {{FORMAT: {job.order}}}"""

    arrays = {}
    for name, value in rename(job.weights, DETECTRON2).items():
        if "num_batches" not in name:  # its frozen norms have no such number
            arrays[name] = value.numpy()
    return {"model": arrays, "__author__": "densekit", "matching_heuristics": True}, lines


def to_openmmlab(job: Job) -> tuple[Any, str]:
    sizes = vit_sizes(job.encoder.network)
    if sizes:
        weights = rename(job.weights, MMSEGMENTATION_VIT)
        backbone = openmmlab_vit(sizes)
    else:
        weights = job.weights
        backbone = openmmlab_resnet(job.encoder)

    backbone["init_cfg"] = {"type": "Pretrained", "checkpoint": job.path}
    reads_rgb = job.order == "RGB"  # OpenMMLab reads BGR, and turns it round for these
    images = {"mean": job.mean, "std": job.std, "bgr_to_rgb": reads_rgb}
    lines = f"model = dict(\n    data_preprocessor={images},\n    backbone={backbone},\n)"
    return {"state_dict": weights, "meta": {"author": "densekit"}}, lines


def openmmlab_vit(sizes: dict[str, Any]) -> dict[str, Any]:
    width = sizes["hidden_dim"]
    if sizes["mlp_dim"] % width:
        raise UserError("A ViT of mmsegmentation has an MLP of a whole number of widths.")
    return {
        "patch_size": sizes["patch_size"],
        "num_layers": sizes["num_layers"],
        "num_heads": sizes["num_heads"],
        "type": "VisionTransformer",
        "img_size": sizes["image_size"],
        "embed_dims": width,
        "mlp_ratio": sizes["mlp_dim"] // width,
        "final_norm": True,
        "norm_cfg": {"type": "LN", "eps": 1e-6},
    }


def openmmlab_resnet(encoder: Encoder) -> dict[str, Any]:
    depth, groups, width = resnet_sizes(encoder)
    if groups == 1:
        return {"type": "ResNet", "depth": depth, "style": "pytorch"}
    more = {"groups": groups, "base_width": width}
    return {"type": "ResNeXt", "depth": depth, "style": "pytorch", **more}


class Levels(nn.Sequential):
    """What an ONNX file holds: images in, the maps of all levels out."""

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        return tuple(self[0].levels(input))


def to_onnx(job: Job) -> tuple[Any, str]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  which the exporter needs
    except ImportError as error:
        raise UserError(f"{error}: pip install onnx onnxscript onnxruntime.") from error

    check_onnx_size(job)
    stride = job.encoder.stride
    channels = len(job.encoder.mean)
    sizes = [(2, 4 * stride, 6 * stride), (1, 6 * stride, 4 * stride), (3, 224, 224)]
    shapes = [(count, channels, height, width) for count, height, width in sizes]
    draws = harness.generator(0)
    batches = [torch.rand(shape, generator=draws) for shape in shapes]
    if job.encoder.bands is not None:  # values as large as those of its images
        column = (channels, 1, 1)
        mean = torch.tensor(job.encoder.mean).view(column)
        std = torch.tensor(job.encoder.std).view(column)
        batches = [mean + std * 3 * (images - 0.5) for images in batches]
    model = Levels(job.encoder).eval()

    try:
        expected = [model(images) for images in batches]
        levels = len(expected[0])
        names = [f"level{number}" for number in range(5 - levels, 5)]  # the last one is level4
        content = export_program(model, batches[0], names)
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found = [session.run(None, {"images": images.numpy()}) for images in batches]
    except Exception as error:  # whatever it is that the exporter cannot express
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{job.encoder.architecture} does not go to ONNX: {problem}") from error

    gap = largest_difference(found, expected)
    harness.tell(f"onnxruntime and torch differ by {gap:.1e} of the largest value at most")
    if not gap < 1e-4:
        raise UserError(
            "That is more than 1e-4: nothing was written. The exporter of torch "
            f"{torch.__version__} computes something else; a newer torch may help."
        )

    outputs = ", ".join(names)
    lines = f"""session = onnxruntime.InferenceSession({job.path!r})
maps = session.run(None, {{"images": images}})  # sides: multiples of {stride}; {outputs}"""
    return content, lines


LARGEST_ONNX = 2**31 - 2**24  # bytes of weights: a file holds 2 GiB, and some of them are the graph


def check_onnx_size(job: Job) -> None:
    """Refuse a network that no ONNX file holds, before it is exported."""
    size = sum(x.numel() * x.element_size() for x in job.encoder.network.state_dict().values())
    harness.check(
        size <= LARGEST_ONNX,
        f"{job.encoder.architecture} has weights of {size / 2**30:.1f} GiB, and an ONNX file holds "
        "less than 2: give a smaller network, or another format with --to.",
    )


def export_program(model: nn.Module, images: Tensor, names: list[str]) -> bytes:
    """The ONNX file of a model, for images of any number, height and width."""
    free = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings(action="ignore"):  # of the exporter about its own parts
        program: Any = torch.onnx.export(
            model,
            (images,),
            input_names=["images"],
            output_names=names,
            dynamo=True,
            dynamic_shapes=({0: free, 2: free, 3: free},),
            verbose=False,
        )
    return program.model_proto.SerializeToString()


def largest_difference(found: list, expected: list) -> Tensor:
    """The largest difference of any level of any batch; NaN where there is one."""
    gaps = []
    for found_levels, expected_levels in zip(found, expected, strict=True):
        for array, level in zip(found_levels, expected_levels, strict=True):
            gaps.append(difference(torch.tensor(array), level))
    return torch.tensor(gaps).max()


FRAMEWORKS = {
    "torchvision": to_torchvision,
    "timm": to_timm,
    "detectron2": to_detectron2,
    "mmdetection": to_openmmlab,
    "mmsegmentation": to_openmmlab,
    "onnx": to_onnx,
}


# ==== files =======================================================================================
class Pickler(pickle.Pickler):
    """Writes arrays so that any numpy reads them; versions before 1.26 do not know numpy 2's."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented


def file_bytes(content: Any, suffix: str) -> bytes:
    """The bytes of a file with this suffix."""
    if suffix == ".onnx":
        return content
    if suffix == ".safetensors":
        return safetensors.torch.save(content, {"format": "pt"})
    buffer = io.BytesIO()
    if suffix == ".pkl":
        Pickler(buffer, protocol=4).dump(content)
    else:
        torch.save(content, buffer)
    return buffer.getvalue()


# ==== the command =================================================================================
def load(config: Config) -> Encoder:
    """The encoder, if it can go there."""
    name = config.checkpoint
    encoder = load_encoder(name)
    if config.to != "onnx" and not encoder.by_timm:
        raise UserError(f"{name} is no network of timm: export timm:{encoder.architecture}.")
    harness.check(
        encoder.bands is None or config.to in ("timm", "onnx"),
        f"--to is {config.to}: give timm or onnx, since {name} takes images of "
        f"{named(len(encoder.mean))} as stored, and {config.to} reads RGB.",
    )
    if config.to not in ("timm", "onnx"):
        check_fit(encoder, config.to)
    return encoder


def make_job(encoder: Encoder, config: Config) -> Job:
    """The weights and the normalization in the color order that the framework reads."""
    white = white_of(config.to)
    mean = [rounded(white * x) for x in encoder.mean]
    std = [rounded(white * x) for x in encoder.std]
    weights = {name: value.clone() for name, value in encoder.network.state_dict().items()}

    if encoder.bands is not None:
        return Job(str(config.out), encoder, weights, FILE_ORDER, mean, std)
    order = config.color_order or ("bgr" if config.to == "detectron2" else "rgb")
    if order == "bgr":
        first = next(name for name, value in weights.items() if value.ndim == 4)
        weights[first] = weights[first].flip(1)  # the input channels of the first convolution
        mean.reverse()
        std.reverse()
    return Job(str(config.out), encoder, weights, order.upper(), mean, std)


def rounded(x: float) -> float:
    """Rounded to six decimals; below 0.01 to six significant digits, which say more."""
    return round(x, 6) if abs(x) >= 0.01 else float(f"{x:.6g}")


def white_of(to: str) -> int:
    """The value of white in the images that a framework reads."""
    return 255 if to in READ_BYTES else 1


def export(config: Config) -> None:
    check_options(config)
    encoder = load(config)
    job = make_job(encoder, config)
    if not config.normalize:  # the side-car has the mean and std, and the file leaves them out
        encoder.mean = (0.0,) * len(job.mean)
        encoder.std = (1.0,) * len(job.std)
    content, lines = FRAMEWORKS[config.to](job)

    images = {
        "color_order": job.order,
        "white": white_of(config.to),
        "mean": job.mean,
        "std": job.std,
    }
    if config.to == "onnx" and config.normalize:
        images["normalized_inside"] = True
    facts = {
        **encoder.facts,
        "architecture": encoder.architecture,
        "checkpoint": encoder.name,
        "format": config.to,
        **images,
        "load": lines.splitlines(),
    }

    side_car = json.dumps(facts, indent=2) + "\n"
    file = file_bytes(content, config.out.suffix)
    harness.write(side_car_of(config.out), side_car.encode())
    harness.write(config.out, file)  # the last one: where it is, all is
    harness.tell(*lines.splitlines(), f"# images: {images}")
