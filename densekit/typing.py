"""Shape-checked functions: the `typed` decorator and the aliases that signatures share."""

import contextlib
import functools
import inspect
import io
import os
import re
import types
import typing
from collections.abc import Callable, Sequence
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
    print_bindings,
)
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Integer", "Shaped", "Size", "Tensor", "typed", "widen"]

Size = tuple[int, int]
"""A size in pixels or cells, height first: `(h, w)`."""

_ENABLED = os.environ.get("DENSEKIT_TYPECHECK", "1") != "0"
_CONF = BeartypeConf(is_pep484_tower=True)  # an int is accepted where a float is expected
_Function = TypeVar("_Function", bound=Callable[..., Any])


def typed(function: _Function) -> _Function:
    """Check a function's arguments and result against its jaxtyping annotations.

    Every public function of densekit wears it; use it on your own functions to get the same
    errors. Axis names are bound across all arguments of one call, with the fields of an argument
    annotated as a `NamedTuple`. The check runs in eager mode only: under `torch.compile` and
    `torch.export` the bare function is traced, and with the environment variable
    `DENSEKIT_TYPECHECK=0` set before the import the decorator returns the function itself.

    Args:
        function: A function whose parameters and result are annotated.

    Returns:
        The checked function.

    Raises:
        TypeError: (when called) An argument or the result has another type, dtype, rank or axis
            size than its annotation; names the function, the argument, what was expected with
            the sizes bound so far, and what came.

    Examples:
        >>> @typed
        ... def inner(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        ...     return (x * y).sum(-1)
        >>> inner(torch.ones(2, 3), torch.ones(2, 3))
        tensor([3., 3.])

    References:
        jaxtyping's axis language: <https://docs.kidger.site/jaxtyping/api/array/>.
    """
    if not _ENABLED:
        return function
    signature = inspect.signature(function)
    # jaxtyped reads the signature: show it one in which NamedTuples are checked field by field.
    function.__signature__ = signature.replace(  # pyright: ignore[reportFunctionMemberAccess]
        parameters=[
            p.replace(annotation=_with_fields(p.annotation)) for p in signature.parameters.values()
        ],
        return_annotation=_with_fields(signature.return_annotation),
    )
    checked = jaxtyped(function, typechecker=beartype(conf=_CONF))
    del function.__signature__  # pyright: ignore[reportFunctionMemberAccess]

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return checked(*args, **kwargs)
        except TypeError as error:
            message = _explain(function, signature, error, args, kwargs)
            if message is None:  # the arguments fit: it is the result, or an error from inside
                raise
            raise TypeError(message) from None

    return typing.cast("_Function", wrapper)


def widen(x: Tensor) -> Tensor:
    """The tensor in at least float32: sums and exponentials of half precision overflow.

    Args:
        x: Any floating dtype; bfloat16 and float16 are converted.

    Returns:
        The tensor itself, or its copy in float32.

    Examples:
        >>> widen(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32

    References:
        House convention: half precision is widened where it would lose.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(x in (1, y) for x, y in pairs)


def _fit_valid(function: str, valid: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """A mask in the shape of what it masks, or one sentence on why it cannot be."""
    if valid is not None and not _broadcasts(valid.shape, shape):
        raise TypeError(
            f"densekit.{function}: argument 'valid' should broadcast to batch={tuple(shape)}, but "
            f"a tensor of shape {tuple(valid.shape)} came."
        )
    return None if valid is None else valid.expand(shape)


def _is_record(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields")


@functools.cache
def _with_fields(hint: Any) -> Any:
    """The hint itself, or for a NamedTuple of tensors the hint with a check of every field."""
    if isinstance(hint, types.UnionType):
        return typing.Union[tuple(map(_with_fields, typing.get_args(hint)))]  # noqa: UP007
    if not _is_record(hint):
        return hint
    fields = [_with_fields(field) for field in typing.get_type_hints(hint).values()]
    return Annotated[hint, Is[lambda record: all(map(_fits, record, fields))]]


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return isinstance(value, hint)  # the quick way for a plain array
    return is_bearable(value, hint, conf=_CONF)


def _explain(function, signature, error, args, kwargs) -> str | None:
    """One sentence on the first argument that does not fit; None when all fit."""
    where = f"{function.__module__}.{function.__qualname__}"
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as reason:
        return f"{where}: {reason}."
    if not isinstance(error, TypeCheckError):
        return None
    bound.apply_defaults()
    with jaxtyped("context"):
        for name, value in bound.arguments.items():
            hint = signature.parameters[name].annotation
            parts = [(name, value, hint)]
            if _is_record(hint) and isinstance(value, hint):
                fields = typing.get_type_hints(hint).items()
                parts = [(f"{name}.{f}", getattr(value, f), h) for f, h in fields]
            for label, part, hint in parts:
                if hint is not inspect.Parameter.empty and not _fits(part, _with_fields(hint)):
                    return (
                        f"{where}: argument '{label}' should be {_describe_hint(hint)}"
                        f"{_bound_sizes()}, but {_describe(part)} came.{_advice(part, hint)}"
                    )
    return None


def _describe_hint(hint: Any) -> str:
    if members := typing.get_args(hint) if isinstance(hint, types.UnionType) else ():
        return " or ".join(_describe_hint(member) for member in members)
    if hint is types.NoneType:
        return "None"
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return f'{hint.dtype.__name__}[{hint.array_type.__name__}, "{hint.dim_str}"]'
    name = hint.__name__ if type(hint) is type else str(hint)
    return re.sub(r"typing\.|\bjax(?=[A-Z])", "", name)


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


def _bound_sizes() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_bindings()
    lines = printed.getvalue().replace("torch.Size([", "(").replace("])", ")").splitlines()
    sizes = [line for line in lines if "=" in line]  # one axis to a line, as `axis=size`
    return f" with {', '.join(sizes)}" if sizes else ""
