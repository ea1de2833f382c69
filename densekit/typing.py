"""Functions with checked shapes: the `typed` decorator and the aliases that signatures share."""

import functools
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, Integer, Shaped, config, jaxtyped
from torch import Tensor
from densekit.hints import CONF, fits, form_decides, form_of, with_fields
from densekit.messages import explain, explain_devices

__all__ = ["Bool", "Float", "Int", "Integer", "Scalar", "Shaped", "Size", "Tensor", "typed"]

Size = tuple[int, int]
"""A size in pixels or cells, height first: `(h, w)`."""

Scalar = float | Float[Tensor, ""]
"""A number, or a tensor of no axes, such as a temperature that is learned. Only the value of a
number is checked: to read that of a tensor would make a GPU wait, and would break a graph."""

_ENABLED = os.environ.get("DENSEKIT_TYPECHECK", "1") != "0"
_MOST_FORMS = 256  # of the calls of a function, that are remembered
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

    A check takes about 20 microseconds for each tensor, and most calls of a training repeat an
    earlier one. So the form of a call that passed is remembered: the types of its arguments and of
    its result, and the shapes and dtypes of the tensors. A call of the same form passes again, and
    that takes a few microseconds. Where more than the form decides, such as for arguments that are
    annotated as `list[int]` or with a validator of values, every call is checked.

    Args:
        function: A function whose parameters and result are annotated.

    Returns:
        The checked function.

    Raises:
        TypeError: (when called) The type, dtype, rank or axis sizes of an argument or of the result
            do not match its annotation. The message names the function, the argument, what was
            expected with the axis sizes known so far, and what was given.
        RuntimeError: (when called) The arguments are on different devices.

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
    checked = jaxtyped(copy, typechecker=beartype(conf=CONF))
    hints = {name: x.annotation for name, x in signature.parameters.items()}
    # A call is remembered if it gives none of these: a default is not checked.
    undecided = {name for name, hint in hints.items() if not form_decides(hint)}
    decided = [name not in undecided for name in hints]
    most_args = len(hints) if all(decided) else decided.index(False)  # by their places
    kinds = {signature.parameters[name].kind for name in undecided}
    hidden = inspect.Parameter.VAR_KEYWORD in kinds  # its arguments have other names
    may_remember = form_decides(signature.return_annotation) and not hidden
    passed: dict[Hashable, Hashable] = {}  # the form of a call, and that of its newest result

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        remembers = may_remember and len(args) <= most_args and undecided.isdisjoint(kwargs)
        form = _plainly(form_of)((args, *kwargs.items())) if remembers else None
        form_of_result = passed.get(form)
        try:
            if form_of_result is None:
                result = _plainly(checked)(*args, **kwargs)
            else:
                result = function(*args, **kwargs)
        except TypeError as error:
            message = explain(function, signature, error, args, kwargs)
            if message is None:  # the arguments fit: the error is in the result or the function
                raise
            raise TypeError(message) from None
        except RuntimeError as error:
            message = explain_devices(function, signature, error, args, kwargs)
            if message is None:
                raise
            raise RuntimeError(message) from error

        if form is not None:
            new = _plainly(form_of)(result)
            if form_of_result is not None and new != form_of_result:
                _plainly(_check_result)(copy, args, kwargs, result)
            if new != form_of_result and not config.jaxtyping_disable:
                _remember(passed, form, new)
        return result

    return typing.cast("_Function", wrapper)


def _remember(passed: dict[Hashable, Hashable], form: Hashable, form_of_result: Hashable) -> None:
    """Note that a call passed. Calls that never repeat, such as of images, do not pile up."""
    if len(passed) >= _MOST_FORMS:
        passed.clear()
    passed[form] = form_of_result


def _check_result(copy: Callable, args: tuple, kwargs: dict, result: Any) -> None:
    """Check a result again, of arguments that are known to fit; the function is not called."""
    signature = inspect.signature(copy)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    with jaxtyped("context"):
        hints = (signature.parameters[name].annotation for name in bound.arguments)
        known = all(map(_fits, bound.arguments.values(), hints))
        if known and _fits(result, signature.return_annotation):
            return

    @functools.wraps(copy)
    def given(*args, **kwargs):
        return result

    jaxtyped(given, typechecker=beartype(conf=CONF))(*args, **kwargs)  # says what is wrong


def _fits(value: Any, hint: Any) -> bool:
    return hint is inspect.Parameter.empty or fits(value, hint)


def _plainly(checked: Callable) -> Callable:
    """Keep the compiler out of the checks, where a graph that broke has come back to Python.

    Importing the compiler takes long, so it is asked only if someone else has imported it.
    """
    return _disabled(checked) if "torch._dynamo" in sys.modules else checked


@functools.cache
def _disabled(checked: Callable) -> Callable:
    return torch.compiler.disable(checked)


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
        parameter.replace(annotation=with_fields(parameter.annotation))
        for parameter in signature.parameters.values()
    ]
    result = with_fields(signature.return_annotation)
    copy.__signature__ = signature.replace(parameters=parameters, return_annotation=result)
    return copy
