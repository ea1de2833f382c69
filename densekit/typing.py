"""Functions with checked shapes: the `typed` decorator and the aliases that signatures share."""

import functools
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import torch
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from beartype.vale import Is
from jaxtyping import (
    AbstractArray,
    Bool,
    Float,
    Int,
    Integer,
    Shaped,
    TypeCheckError,
    jaxtyped,
)
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Integer", "Shaped", "Size", "Tensor", "typed"]

Size = tuple[int, int]
"""A size in pixels or cells, height first: `(h, w)`."""

_ENABLED = os.environ.get("DENSEKIT_TYPECHECK", "1") != "0"
_CONF = BeartypeConf(is_pep484_tower=True)  # an int is accepted where a float is expected
_Function = TypeVar("_Function", bound=Callable[..., Any])


def typed(function: _Function) -> _Function:
    """Check a function's arguments and result against its jaxtyping annotations.

    All public functions of densekit use it; on your own functions it raises the same errors. Within
    one call an axis name stands for one size, over all arguments and over the fields of arguments
    that are annotated as a `NamedTuple`. The annotations use [jaxtyping's axis
    language](https://docs.kidger.site/jaxtyping/api/array/). Functions are checked in eager mode
    only. Under `torch.compile` and `torch.export` the undecorated function is traced. If the
    environment variable `DENSEKIT_TYPECHECK=0` is set before the import, the decorator returns the
    function itself.

    Args:
        function: A function whose parameters and result are annotated.

    Returns:
        The checked function.

    Raises:
        TypeError: (when called) The type, dtype, rank or axis sizes of an argument or of the result
            do not match its annotation. The message names the function, the argument, what was
            expected with the axis sizes known so far, and what was given.

    Examples:
        >>> @typed
        ... def inner(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        ...     return (x * y).sum(-1)
        >>> inner(torch.ones(2, 3), torch.full((2, 3), 0.5))
        tensor([1.5000, 1.5000])
    """
    if not _ENABLED:
        return function
    signature = inspect.signature(function)
    copy = _with_checked_fields(function, signature)
    checked = jaxtyped(copy, typechecker=beartype(conf=_CONF))

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return _plainly(checked)(*args, **kwargs)
        except TypeError as error:
            message = _explain(function, signature, error, args, kwargs)
            if message is None:  # the arguments fit: the error is in the result or the function
                raise
            raise TypeError(message) from None

    return typing.cast("_Function", wrapper)


def _plainly(checked: Callable) -> Callable:
    """Keep the compiler out of the checks, where a graph that broke has come back to Python.

    Importing the compiler takes long, so it is asked only if someone else has imported it.
    """
    return _disabled(checked) if "torch._dynamo" in sys.modules else checked


@functools.cache
def _disabled(checked: Callable) -> Callable:
    return torch.compiler.disable(checked)


# ---- records: jaxtyping does not look at the fields of a NamedTuple, so the hint does ---------


def _with_checked_fields(function: Callable, signature: inspect.Signature) -> Callable:
    """Copy the function, with a signature in which the fields of records are checked.

    jaxtyping reads the signature of the function that it calls, and the signature of the user's
    function must not change.
    """
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    functools.update_wrapper(copy, function)
    copy.__kwdefaults__ = function.__kwdefaults__

    parameters = [
        parameter.replace(annotation=_with_fields(parameter.annotation))
        for parameter in signature.parameters.values()
    ]
    result = _with_fields(signature.return_annotation)
    copy.__signature__ = signature.replace(parameters=parameters, return_annotation=result)
    return copy


@functools.cache
def _with_fields(hint: Any) -> Any:
    """Return the hint itself, or for a NamedTuple of tensors a hint that checks every field.

    beartype looks at one item of a sequence, at random; this hint looks at all.
    """
    if isinstance(hint, types.UnionType):
        return typing.Union[tuple(map(_with_fields, typing.get_args(hint)))]  # noqa: UP007
    if typing.get_origin(hint) is Sequence:
        item = _with_fields(typing.get_args(hint)[0])
        return Annotated[Sequence, Is[lambda items: all(_fits(x, item) for x in items)]]
    if not _is_record(hint):
        return hint
    fields = [_with_fields(field) for field in typing.get_type_hints(hint).values()]
    return Annotated[hint, Is[lambda record: all(map(_fits, record, fields))]]


def _is_record(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def _is_array(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, AbstractArray)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value fits; if so, jaxtyping binds its axes in the current context."""
    if _is_array(hint):
        return isinstance(value, hint)  # a plain array has a faster check
    return is_bearable(value, hint, conf=_CONF)


# ---- messages ---------------------------------------------------------------------------------


def _explain(function, signature, error, args, kwargs) -> str | None:
    """Describe the first argument that does not fit in a sentence; None if all arguments fit."""
    where = f"{function.__module__}.{function.__qualname__}"
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as reason:
        return f"{where}: {reason}."
    if not isinstance(error, TypeCheckError):
        return None

    bound.apply_defaults()
    sizes: dict[str, Any] = {}
    with jaxtyped("context"):
        for label, value, hint in _parts(bound):
            if not _fits(value, _with_fields(hint)):
                return (
                    f"{where}: argument '{label}' should be {_describe_hint(hint)}"
                    f"{_describe_sizes(sizes)}, but {_describe(value)} was given."
                    f"{_advice(value, hint)}"
                )
            sizes |= _sizes(value, hint)
    return None


def _parts(bound: inspect.BoundArguments) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value and hint of each annotated argument; of a record, those of each field."""
    for name, value in bound.arguments.items():
        hint = bound.signature.parameters[name].annotation
        if _is_record(hint) and isinstance(value, hint):
            for field, field_hint in typing.get_type_hints(hint).items():
                yield f"{name}.{field}", getattr(value, field), field_hint
        elif hint is not inspect.Parameter.empty:
            yield name, value, hint


def _sizes(value: Any, hint: Any) -> dict[str, Any]:
    """Return the named axes of a value that fits its hint, and their sizes."""
    if isinstance(hint, types.UnionType):
        for member in typing.get_args(hint):
            if _fits(value, _with_fields(member)):
                return _sizes(value, member)
        return {}
    if _is_record(hint):
        sizes = {}
        for field, field_hint in typing.get_type_hints(hint).items():
            sizes |= _sizes(getattr(value, field), field_hint)
        return sizes
    if not _is_array(hint):
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
    if _is_array(hint):
        return f'{hint.dtype.__name__}[{hint.array_type.__name__}, "{hint.dim_str}"]'
    name = hint.__name__ if type(hint) is type else str(hint)
    return re.sub(r"typing\.|collections\.abc\.|torch\.(?=Tensor)|\bjax(?=[A-Z])", "", name)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of ({', '.join(map(_describe, value))})"
    return f"{value!r} of type {type(value).__name__}"


def _advice(value: Any, hint: Any) -> str:
    integers = isinstance(value, Tensor) and not value.is_floating_point()
    if integers and "Float[" in _describe_hint(hint):
        return " Convert it first: `x.float()`, and `/ 255` for an image."
    return ""
