"""Arguments that a user gives to a class or function of some library as `key=value`: checked and typed by its signature."""

import ast
import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Union

from library.core.options import Given, OptionError, convert, pairs
from library.core.spelling import unknown

WORDS = {"true": True, "false": False, "none": None}
PLAIN = (bool, int, float, str, dict, type(None))
LISTS = (list, collections.abc.Sequence, collections.abc.Iterable)


def arguments_for(made: Callable[..., Any], texts: Iterable[str], flag: str, elsewhere: Mapping[str, str]) -> dict[str, Any]:
    """The `key=value` texts as keyword arguments of `made`, each of the type that its annotation or default tells.

    `elsewhere` holds the arguments that are given otherwise, and how. Raises `OptionError` with every unknown name, wrong type and
    missing argument at once.
    """
    parameters = parameters_of_call(made)
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    kinds, problems, arguments = _kinds(made, named), [], {}
    given = pairs(texts, flag)
    for item in given:
        if item.name in elsewhere:
            problems.append(f"{item.where}: is set by {elsewhere[item.name]}")
        elif item.name not in named and not takes_any:
            known = [name for name in named if name not in elsewhere]
            problems.append(f"{item.where}: {unknown(item.name, known, f'argument of {made.__name__}')}")
        else:
            _read_into(arguments, item, kinds.get(item.name, Any), named.get(item.name), problems)
    names = {item.name for item in given}
    missing = [name for name, parameter in named.items() if parameter.default is parameter.empty and name not in (*elsewhere, *names)]
    problems += [f"{flag}: {made.__name__} needs {name}=..." for name in missing]
    if problems:
        raise OptionError(problems)
    return arguments


def parameters_of_call(made: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function, or of a class's constructor without `self`."""
    is_class = isinstance(made, type)
    parameters = inspect.signature(made.__init__ if is_class else made).parameters
    return {name: parameter for name, parameter in parameters.items() if not (is_class and name == "self")}


# One argument


def _read_into(arguments: dict[str, Any], item: Given, kind: Any, parameter: inspect.Parameter | None, problems: list[str]) -> None:
    try:
        arguments[item.name] = _literal(item.value) if kind is Any else convert(item.value, kind, item.where)
    except OptionError as error:
        default = parameter.default if parameter else None
        example = f"; for example {item.name}={','.join(map(str, default))}" if isinstance(default, tuple) else ""
        problems += [problem + example for problem in error.problems]


def _literal(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# What a signature tells of its types


def _kinds(made: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(made.__init__ if isinstance(made, type) else made)
    except (NameError, TypeError):  # annotations that name what only a type checker imports: defaults must do
        hints = {}
    kinds = {}
    for name, parameter in parameters.items():
        kind = _plain(hints[name]) if name in hints else Any
        kinds[name] = _kind_of(parameter.default) if kind is Any else kind
    return kinds


def _plain(kind: Any) -> Any:
    """An annotation with only what a text can say: numbers, texts, lists of them. `Any` where nothing remains."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        kept = [plain for plain in map(_plain, members) if plain is not Any]
        return Union[tuple(kept)] if any(plain is not type(None) for plain in kept) else Any  # noqa: UP007 (made from a list)
    if origin is tuple and members:
        return tuple[tuple(member if member is Ellipsis else _plain(member) for member in members)]
    if origin in LISTS and members:
        return tuple[_plain(members[0]), ...]
    return kind if origin is Literal or kind in PLAIN else Any


def _kind_of(default: Any) -> Any:
    """The kind of value that a default stands for; a whole number may stand for any number."""
    if isinstance(default, bool | str):
        return type(default)
    if isinstance(default, int):
        return int | float
    if isinstance(default, float):
        return float
    if isinstance(default, tuple) and default:
        return tuple[tuple(map(_kind_of, default))]
    return Any
