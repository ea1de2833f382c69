"""What annotations say: tensors with shapes, and records, whose fields jaxtyping does not look at.

These functions are helpers for the checks of `densekit.typing` and their messages.
"""

import functools
import inspect
import types
import typing
from abc import ABCMeta
from collections.abc import Callable, Hashable, Sequence
from typing import Annotated, Any, Literal, Union

import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from beartype.vale import Is
from jaxtyping import AbstractArray
from torch import Tensor

__all__: list[str] = []

CONF = BeartypeConf(is_pep484_tower=True)  # an int is accepted where a float is expected


@functools.cache
def with_fields(hint: Any) -> Any:
    """Return the hint itself, or for a NamedTuple of tensors a hint that checks every field.

    beartype looks at one item of a sequence, at random; this hint looks at all.
    """
    if isinstance(hint, types.UnionType):
        return Union[tuple(map(with_fields, typing.get_args(hint)))]  # noqa: UP007
    if typing.get_origin(hint) is Sequence:
        item = with_fields(typing.get_args(hint)[0])
        return Annotated[
            Sequence,
            Is[lambda items: not is_record(type(items)) and all(fits(x, item) for x in items)],
        ]
    if not is_record(hint):
        return hint
    fields = [with_fields(field) for field in typing.get_type_hints(hint).values()]
    return Annotated[hint, Is[lambda record: all(map(fits, record, fields))]]


def is_record(hint: Any) -> bool:
    """Return whether a hint is a NamedTuple."""
    return inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def is_array(hint: Any) -> bool:
    """Return whether a hint is one of jaxtyping's tensors with a shape."""
    return inspect.isclass(hint) and issubclass(hint, AbstractArray)


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value fits; if so, jaxtyping binds its axes in the current context."""
    if is_array(hint):
        return isinstance(value, hint)  # a plain array has a faster check
    return is_bearable(value, hint, conf=CONF)


def records_of(hint: Any) -> tuple:
    """Return the records among the members of a hint."""
    return tuple(filter(is_record, _members(hint)))


def array_hint(hint: Any) -> Any:
    """Return the hint of a tensor, or that member of a union; None if there is none."""
    return next(filter(is_array, _members(hint)), None)


def _members(hint: Any) -> tuple:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


# ---- forms: what decides whether a value fits ---------------------------------------------------

_NUMBERS = frozenset({float, int, bool, types.NoneType})  # their values are never asked for


def form_of(value: Any) -> Hashable:
    """Return the form of a value: its type, and of a tensor its shape and dtype; None if it has no.

    Two values of one form fit the same hints, if their form decides about these hints. A text is
    its own form, and a tuple or list has the forms of its items. No value of a tensor is read.
    """
    if torch.jit.is_tracing():  # where a size is no number
        return None
    try:
        form = _form(value)
        hash(form)  # a size that is a symbol has no hash
    except TypeError:
        return None
    return form


def _form(value: Any) -> Hashable:
    kind = type(value)
    if kind is Tensor:  # the most frequent ones are the first
        return value.shape, value.dtype
    if kind in _NUMBERS:
        return kind
    if kind is str:
        return value
    if isinstance(value, Tensor):
        return kind, value.shape, value.dtype
    if isinstance(value, tuple | list):
        return kind, *map(_form, value)
    if isinstance(value, Sequence):
        raise TypeError(f"the items of a {kind.__name__} are not looked at")
    return kind


def form_decides(hint: Any) -> bool:
    """Return whether a value's form alone decides if it fits a hint; False where it is not known.

    A `list[int]` is not among these hints: beartype looks at one item of it, at random.
    """
    if hint in (Any, None, inspect.Parameter.empty, Tensor):
        return True
    if is_array(hint):
        return hint.array_type is Tensor and not set("{?") & set(hint.dim_str)
    if is_record(hint):
        return all(map(form_decides, typing.get_type_hints(hint).values()))

    origin = typing.get_origin(hint)
    members = typing.get_args(hint)
    if origin is Literal:
        return all(member is None or type(member) is str for member in members)
    if origin is Callable:
        return True
    if origin in (Union, types.UnionType, Sequence, tuple):
        return all(map(form_decides, members))  # the dots of tuple[int, ...] are no hint
    return inspect.isclass(hint) and _asks_for_the_type_alone(hint)


def _asks_for_the_type_alone(cls: type) -> bool:
    """Return whether `isinstance` of a class looks at nothing but the type of a value."""
    if cls.__module__.partition(".")[0] == "torch":  # such as a Generator or a ProcessGroup
        return not issubclass(cls, Tensor)  # a Parameter is told by an attribute
    return type(cls).__instancecheck__ in (type.__instancecheck__, ABCMeta.__instancecheck__)
