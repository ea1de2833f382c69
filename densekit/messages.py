"""Messages of the checks: which argument of a call does not fit, and what to do about it.

These functions are helpers for `densekit.typing` and for the modules that refuse arguments.
"""

import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

import torch
from jaxtyping import TypeCheckError, jaxtyped
from torch import Tensor
from densekit.hints import array_hint, fits, is_array, is_record, records_of, with_fields

__all__: list[str] = []


class _Part(NamedTuple):
    """An argument of a call, or a field of an argument that is a record."""

    label: str
    value: Any
    hint: Any
    of_record: bool


CALLED = {  # what advice calls a record of densekit; any other value is `x`
    "Bank": "bank",
    "Matches": "matches",
    "Negatives": "negatives",
    "Neighbors": "neighbors",
    "Overlap": "overlap",
    "PairedBoxes": "pairs",
    "PairedFeatures": "pairs",
    "PairedPoints": "pairs",
    "PairedViews": "pairs",
    "Scenes": "scenes",
    "View": "view",
    "ViewPairs": "pairs",
}
_SIZE_ADVICE = "Give `(h, w)`, such as `x.shape[-2:]`."


def explain(function, signature, error, args, kwargs) -> str | None:
    """Describe the first argument that does not fit in a sentence; None if all arguments fit."""
    where = f"{function.__module__}.{function.__qualname__}"
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as reason:
        return f"{where}: {_explain_call(reason, signature, args, kwargs)}."
    if not isinstance(error, TypeCheckError):
        return None

    bound.apply_defaults()
    sizes: dict[str, Any] = {}
    before: list[_Part] = []
    with jaxtyped("context"):
        for part in _parts(bound):
            if not fits(part.value, with_fields(part.hint)):
                return f"{where}: {_explain_misfit(part, before, sizes, signature)}"
            sizes |= _sizes(part.value, part.hint)
            before.append(part)
    return None


def _explain_misfit(
    part: _Part, before: list[_Part], sizes: dict[str, Any], signature: inspect.Signature
) -> str:
    """Say what is wrong where an argument does not fit those before it, whose sizes are known."""
    maps = _map_for_rows(part, before)
    if maps is not None:
        return about_map(maps.label, maps.value)

    culprit = _lacks_axes(part, before)
    if culprit is None:
        culprit = part
    else:
        sizes = {"batch": _leading_axes(part.value, part.hint)}
    known = sizes if array_hint(culprit.hint) is not None else {}
    return (
        f"argument '{culprit.label}' should be {_describe_hint(culprit.hint)}"
        f"{_describe_sizes(known)}, but {_describe(culprit.value)} was given."
        f"{_advice(culprit.value, culprit.hint, known, signature)}"
    )


def _explain_call(
    reason: TypeError, signature: inspect.Signature, args: tuple, kwargs: dict
) -> str:
    """Say why arguments cannot be matched with the parameters."""
    problem = str(reason).replace("required keyword-only", "required")  # as Python 3.13 calls it
    unknown = [name for name in kwargs if name not in signature.parameters]
    if unknown and "unexpected keyword" not in problem:  # a wrong name is also a missing one
        return f"got an unexpected keyword argument '{unknown[0]}', and is {problem}"

    parameters = signature.parameters.values()
    names = [x.name for x in parameters if x.kind is inspect.Parameter.KEYWORD_ONLY]
    if "missing" in problem:
        for value, parameter in zip(args, parameters, strict=False):
            fields = _fields_for(value, parameter.annotation)
            if is_record(parameter.annotation) and len(fields) > 1:
                return f"{problem}; give `{', '.join(fields)}` for the {type(value).__name__}"
        names = [name for name in names if f"'{name}'" in problem]
    elif "too many positional" not in problem:
        names = []
    by_name = f"; give {', '.join(f'`{name}=`' for name in names)} by name" if names else ""
    return f"{problem}{by_name}"


def explain_devices(function, signature, error, args, kwargs) -> str | None:
    """Name two arguments on different devices, if an error is about that; otherwise None."""
    if not re.search("(same|expected|different) device", str(error)):
        return None

    bound = signature.bind(*args, **kwargs)
    placed = [
        (part.label, part.value.device)
        for part in _parts(bound)
        if isinstance(part.value, Tensor) and part.value.ndim
    ]
    for label, device in placed:
        first, its_device = placed[0]
        if device != its_device:
            return (
                f"{function.__module__}.{function.__qualname__}: argument '{first}' is on "
                f"{its_device} and '{label}' is on {device}; move them to one device."
            )
    return None


def _parts(bound: inspect.BoundArguments) -> Iterator[_Part]:
    """Yield each annotated argument; of a record, each field."""
    for name, value in bound.arguments.items():
        hint = bound.signature.parameters[name].annotation
        if is_record(hint) and isinstance(value, hint):
            for field, field_hint in typing.get_type_hints(hint).items():
                yield _Part(f"{name}.{field}", getattr(value, field), field_hint, of_record=True)
        elif hint is not inspect.Parameter.empty:
            yield _Part(name, value, hint, of_record=False)


def _lacks_axes(part: _Part, before: list[_Part]) -> _Part | None:
    """Return an earlier argument of another kind that has fewer batch axes than this one.

    Such as tokens (b, n, d) before views (b,), where maps (b, d, h, w) are wanted: taken for one
    map they fit, and only the views, which are right, do not fit any more. It is to blame only if
    it can be rows, or one map or image before a record of several, such as several views.
    """
    axes = _leading_axes(part.value, part.hint)
    if axes is None:
        return None
    for earlier in before:
        its_axes = _leading_axes(earlier.value, earlier.hint)
        if its_axes is None or len(its_axes) >= len(axes):
            continue
        if array_hint(earlier.hint).dim_str == array_hint(part.hint).dim_str:
            return None
        can_be_rows = tuple(earlier.value.shape[:-2]) == axes
        one_for_several = part.of_record and not its_axes and len(axes) == 1
        if can_be_rows or one_for_several:
            return earlier
    return None


def looks_like_map(x: Tensor) -> bool:
    """Return whether what should be rows (..., d) seems to be maps (..., d, h, w).

    Rows (b, n, d) have too few axes. Rows of several heads or views (b, heads, n, d) would need as
    many rows as channels, and more heads than those; up to 3 heads or views are never refused.
    """
    if x.ndim < 4 or x.shape[-2] != x.shape[-1]:
        return False
    return bool(x.shape[-3] > max(x.shape[-1], 3))


def about_map(name: str, x: Tensor) -> str:
    """Say that an argument should be rows, not maps."""
    return (
        f"argument '{name}' should have its channels last, but its shape {tuple(x.shape)} looks "
        "like that of maps (..., d, h, w); use `map_to_rows(x)`."
    )


def _map_for_rows(part: _Part, before: list[_Part]) -> _Part | None:
    """Return an earlier argument that is a map where rows are wanted; this one may then be right.

    Such as a map (b, d, h, w) before a bank of d channels: the map's width was taken for d.
    """
    if not isinstance(part.value, (Tensor, *records_of(part.hint))):
        return None
    rows = getattr(part.value, "features", part.value)  # those of a record of negatives
    width = rows.shape[-1:] if isinstance(rows, Tensor) and _wants_rows(part.hint) else ()
    for earlier in before:
        x = earlier.value
        if not (isinstance(x, Tensor) and _wants_rows(earlier.hint)):
            continue
        has_its_width = x.ndim >= 4 and x.shape[-3:-2] == width and x.shape[-1:] != width
        if looks_like_map(x) or has_its_width:
            return earlier
    return None


def _wants_rows(hint: Any) -> bool:
    """Return whether a hint is one of rows, with channels d as the last axis."""
    hint = array_hint(hint)
    return hint is not None and hint.dim_str.split()[-1:] == ["d"]


def _leading_axes(value: Any, hint: Any) -> tuple[int, ...] | None:
    """Return the sizes that a tensor has in place of `*batch`, where its hint begins so."""
    hint = array_hint(hint)
    if not (isinstance(value, Tensor) and hint and hint.dim_str.startswith("*batch")):
        return None
    fixed = len(hint.dim_str.split()) - 1
    return tuple(value.shape[: value.ndim - fixed]) if value.ndim >= fixed else None


def _sizes(value: Any, hint: Any) -> dict[str, Any]:
    """Return the named axes of a value that fits its hint, and their sizes."""
    if isinstance(hint, types.UnionType):
        for member in typing.get_args(hint):
            if fits(value, with_fields(member)):
                return _sizes(value, member)
        return {}
    if is_record(hint):
        sizes = {}
        for field, field_hint in typing.get_type_hints(hint).items():
            sizes |= _sizes(getattr(value, field), field_hint)
        return sizes
    if not is_array(hint):
        return {}

    axes = hint.dim_str.split()
    shape = list(value.shape)
    for position, axis in enumerate(axes):
        if axis.startswith(("*", "...")):  # this axis stands for all that remain
            several = slice(position, position + len(shape) - (len(axes) - 1))
            shape[several] = [tuple(shape[several])]
    named = zip([axis.lstrip("*") for axis in axes], shape, strict=True)
    return {axis: size for axis, size in named if re.fullmatch(r"[a-zA-Z]\w*", axis)}


def _describe_sizes(sizes: dict[str, Any]) -> str:
    if not sizes:
        return ""
    texts = []
    for axis, size in sizes.items():
        number = f"({', '.join(map(str, size))})" if isinstance(size, tuple) else size
        texts.append(f"{axis}={number}")
    return f" with {', '.join(texts)}"


def _describe_hint(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_describe_hint, typing.get_args(hint)))
    if hint is types.NoneType:
        return "None"
    if is_array(hint):
        return f'{hint.dtype.__name__}[{hint.array_type.__name__}, "{hint.dim_str}"]'
    name = hint.__name__ if inspect.isclass(hint) else str(hint)
    return re.sub(r"typing\.|collections\.abc\.|torch\.(?=Tensor)|\bjax(?=[A-Z])", "", name)


def _describe(value: Any) -> str:
    """Describe what was given in a few words, however much it contains."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if _is_numpy(value):
        return f"a numpy array of shape {value.shape} and dtype {value.dtype}"
    if isinstance(value, list | tuple) and not (len(value) <= 4 and _are_numbers(value)):
        short = value if is_record(type(value)) and len(value) <= 3 else value[:2]
        items = [f"a {type(x).__name__}" if isinstance(x, tuple) else _describe(x) for x in short]
        if len(short) < len(value):
            items.append(f"... {len(value)} in all")
        return f"a {kind} of ({', '.join(items)})"
    text = " ".join(repr(value).split())
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} of type {kind}"


def _is_numpy(value: Any) -> bool:
    """Return whether a value is a numpy array, without an import of numpy."""
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


def _are_numbers(value: Any) -> bool:
    return all(isinstance(item, int | float) for item in value)


# ---- advice: what to do, where a mistake is a common one ----------------------------------------


def _advice(value: Any, hint: Any, sizes: dict[str, Any], signature: inspect.Signature) -> str:
    """Say how to make a value fit, if it is a common mistake; otherwise say nothing."""
    advice = _advice_on_records(value, hint)
    if not advice and isinstance(value, Tensor):
        advice = (
            _advice_on_kind(value, hint)
            or _advice_on_dtype(value, hint, signature)
            or _advice_on_axes(value, hint, sizes)
        )
    elif not advice:
        advice = _advice_on_fields(value, hint) or _advice_on_type(value, hint, sizes)
    return f" {advice}" if advice else ""


def _advice_on_records(value: Any, hint: Any) -> str:
    """Say how to get a record of densekit; this module is below it, and knows only its name."""
    wanted = _describe_hint(hint)
    if "Negatives" in wanted and type(value).__name__ == "Bank":
        return "Use `bank_negatives(bank)`."
    if wanted != "View":
        return ""
    if isinstance(value, Tensor) and value.shape[-1:] == (4,):
        return (
            "`View(x, flip)` makes views of boxes; `view[0]` is a field of a view: for the first "
            "of several views use `index_views(view, 0)`."
        )
    if _is_list(value) and all(isinstance(item, hint) for item in value):
        return "Stack them first: `stack_views(x)`."
    return ""


def _advice_on_kind(x: Tensor, hint: Any) -> str:
    """Say what to give instead of a tensor."""
    array = array_hint(hint)
    wanted = _describe_hint(hint)
    if array is None and not x.ndim and wanted.startswith(("int", "float")):
        return f"Use `{wanted.split()[0]}(x)`."
    if "tuple[int, int]" in wanted and (array is None or x.shape[-1:] != (2,)):
        return _SIZE_ADVICE
    if wanted == "Sequence[Tensor]":
        return "Give a pair, such as `(x1, x2)`."
    return ""


def _advice_on_dtype(x: Tensor, hint: Any, signature: inspect.Signature) -> str:
    wanted = _describe_hint(hint)
    if x.dtype == torch.bool and "Bool[" not in wanted and "valid" in signature.parameters:
        return "If it says which entries to use, pass it as `valid=`."
    if "Float[" in wanted and not x.is_floating_point():
        if "c h w" in wanted:
            return "Convert it first: `x.float()`, and `/ 255` for an image."
        return "Convert it first: `x.float()`."
    if "Bool[" in wanted and x.dtype != torch.bool:
        return "Convert it first: `x.bool()`."
    if "Int" in wanted and "Float[" not in wanted and x.is_floating_point():
        return "Convert it first: `x.long()`."
    return ""


def _advice_on_axes(x: Tensor, hint: Any, sizes: dict[str, Any]) -> str:
    hint = array_hint(hint)
    if hint is None:
        return ""
    if not hint.dim_str:
        squeeze = ": `x.squeeze()`" if x.numel() == 1 else ""
        return f"Give a tensor of no axes{squeeze}."
    if not hint.dim_str.startswith("*batch"):
        return ""
    axes = hint.dim_str.split()[1:]
    batch = sizes.get("batch", ())
    expected = len(axes) + len(batch)
    if axes[-1:] == ["d"] and x.ndim > 2 and x.shape[-3] == sizes.get("d", x.shape[-1]):
        return "For a map (..., d, h, w) use `map_to_rows(x)`, whose channels come last."
    if axes[-2:] == ["n", "4"] and x.shape[-1:] == (5,):
        return (
            "Boxes are (*batch, n, 4), those of each image together; without the index of its "
            "image a row is `x[..., 1:]`."
        )
    if x.ndim == expected or ("batch" not in sizes and x.ndim > expected):
        return ""
    advice = f"It has {x.ndim} {'axis' if x.ndim == 1 else 'axes'} instead of {expected}."
    wants_maps = axes[-3:-2] == ["d"] and axes[-2].startswith("h")
    if wants_maps and x.ndim == expected - 1 and tuple(x.shape[:-2]) == batch:
        return f"{advice} Maps are wanted: for rows (..., n, d) use `rows_to_map(x, size)`."
    if axes == ["n", "2"] and x.ndim == expected + 1 and tuple(x.shape[:-3]) == batch:
        return f"{advice} Flatten the grid: `x.flatten(-3, -2)`."
    return advice


def _advice_on_fields(value: Any, hint: Any) -> str:
    """Say which fields of a record are what is wanted."""
    fields = _fields_for(value, hint)
    if not fields:
        return ""
    return f"Use {'one of ' if len(fields) > 1 else ''}`{', '.join(fields)}`."


def _fields_for(value: Any, hint: Any) -> list[str]:
    """Return the fields of a record that fit where the record itself was given."""
    if not is_record(type(value)) or not (is_record(hint) or array_hint(hint)):
        return []
    if isinstance(value, records_of(hint)):
        return []
    with jaxtyped("context"):
        fitting = [name for name in value._fields if fits(getattr(value, name), with_fields(hint))]
    of_two_views = [name for name in fitting if name.endswith(("1", "2"))]
    named = of_two_views or fitting  # where the image has such a field too, a view's is meant
    called = CALLED.get(type(value).__name__, "x")
    return [f"{called}.{name}" for name in named]


def _advice_on_type(value: Any, hint: Any, sizes: dict[str, Any]) -> str:
    wanted = _describe_hint(hint)
    array = array_hint(hint)
    if _is_numpy(value):
        return "Use `torch.from_numpy(x)`."
    if _is_numpy_number(value):
        return f"Use `{'float' if 'float' in wanted else 'int'}(x)`."
    if _is_pil(value):
        return "Convert it to a tensor first, such as with torchvision's `to_tensor`."
    if isinstance(value, bool) and array is not None and array.dim_str.startswith("*batch"):
        batch = sizes.get("batch", ())
        return f"Use `torch.full({batch}, {value})`." if batch else f"Use `torch.tensor({value})`."
    if isinstance(value, int) and "tuple[int, int]" in wanted:
        return f"Give `(h, w)`, such as `({value}, {value})`."
    return _advice_on_items(value, hint) if _is_list(value) else ""


def _advice_on_items(value: list | tuple, hint: Any) -> str:
    """Say how to make a list or a tuple fit."""
    wanted = _describe_hint(hint)
    array = array_hint(hint)
    if is_record(hint) and not any(isinstance(item, hint) for item in value):
        missing = len(hint._fields) - len(value)
        if 0 <= missing <= len(hint._field_defaults):
            return f"Use `{wanted}(*x)`."
    if "tuple[" in wanted and any(map(_is_numpy_number, value)):
        return "Use `tuple(map(int, x))`."
    if "tuple[int, int]" in wanted and len(value) > 2 and _are_numbers(value):
        return _SIZE_ADVICE
    if isinstance(value, list) and "tuple[" in wanted:
        return "Use a tuple: `tuple(x)`."
    if any(map(_is_pil, value)):
        return "Convert each to a tensor first, such as with torchvision's `to_tensor`."
    if all(map(_is_numpy, value)) and (array is not None or "Sequence[" in wanted):
        tensors = "[torch.from_numpy(a) for a in x]"
        return f"Use `{tensors}`." if "Sequence[" in wanted else f"Use `torch.stack({tensors})`."
    if array is not None and all(isinstance(item, Tensor) for item in value):
        if len({item.shape for item in value}) > 1:
            return "Pad them to one shape, and stack them."
        return "Stack them first: `torch.stack(x)`."
    if array is not None and isinstance(value, list) and _are_nested_numbers(value):
        return "Use `torch.tensor(x)`."
    return ""


def _is_list(value: Any) -> TypeGuard[list | tuple]:
    """Return whether a value is a list or a tuple with items, and no record."""
    return isinstance(value, list | tuple) and len(value) > 0 and not is_record(type(value))


def _is_pil(value: Any) -> bool:
    return type(value).__module__.startswith("PIL.")


def _is_numpy_number(value: Any) -> bool:
    return type(value).__module__ == "numpy" and not _is_numpy(value)


def _are_nested_numbers(value: Any) -> bool:
    """Return whether `torch.tensor` takes these lists, but for their lengths."""
    if isinstance(value, list | tuple):
        return all(map(_are_nested_numbers, value))
    return isinstance(value, int | float)
