"""What annotations say: tensors with shapes, and records, whose fields jaxtyping does not look at.

These functions are helpers for the checks of `densekit.typing` and their messages.
"""

import functools
import inspect
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from beartype import BeartypeConf
from beartype.door import is_bearable
from beartype.vale import Is
from jaxtyping import AbstractArray

__all__: list[str] = []

CONF = BeartypeConf(is_pep484_tower=True)  # an int is accepted where a float is expected


@functools.cache
def with_fields(hint: Any) -> Any:
    """Return the hint itself, or for a NamedTuple of tensors a hint that checks every field.

    beartype looks at one item of a sequence, at random; this hint looks at all.
    """
    if isinstance(hint, types.UnionType):
        return typing.Union[tuple(map(with_fields, typing.get_args(hint)))]  # noqa: UP007
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
