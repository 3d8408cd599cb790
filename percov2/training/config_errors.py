"""One line for what is wrong with a configuration, with the nearest known name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable

_KEY = re.compile(r"Parser key \"([^\"]+)\"")
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_NOT_ACCEPTED = re.compile(r"Option '([^']+)' is not accepted")
_NOT_IN_GROUP = re.compile(r"Group '([^']+)' does not accept option '([^']+)'")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: --([^\s=]+)")
_UNION = re.compile(r"Errors:\n\s*- (.*?)\n\s*- Expected a", re.DOTALL)
_EXPECTED = re.compile(r"^( *)(?:- )?Expected an? (?!<class 'NoneType'>)([^\n]+)", re.MULTILINE)
_GIVEN = re.compile(r"Given value: (?!NestedArg)([^\n]+)")


def explain(message: str, known: Iterable[str]) -> str:
    """Condense jsonargparse's report to a line that names the field and the remedy.

    Args:
        message: of the parser, several lines long where classes are nested.
        known: full names of the parser's own options.

    Returns:
        One line; the message itself, joined to a line, where its form is not known.
    """
    names = list(known)
    if found := _UNRECOGNIZED.search(message):
        return _unknown(found[1], names)
    if found := _NOT_IN_GROUP.search(message):
        group, option = found.groups()
        inside = [name.removeprefix(group + ".") for name in names if name.startswith(group + ".")]
        return _unknown(option, inside, f"{group} ")
    field = ".".join(_KEY.findall(message))
    classes = _CLASS.findall(message)
    if (found := _NOT_ACCEPTED.search(message)) and classes:
        return _unknown(found[1], _parameters(classes[-1]), f"{field} ({classes[-1]}) ")
    if field and (expected := _EXPECTED.findall(message)):
        # The innermost field is what is wrong; of a union, each type says what it expected.
        depth = max(len(indent) for indent, _ in expected)
        types = " or a ".join(text for indent, text in expected if len(indent) == depth)
        given = _GIVEN.search(message)
        got = f". Got value: {given[1]}" if given and "Got value" not in types else ""
        return f"{field}: expected a {types}{got}"
    if found := _UNION.search(message):
        # An error of the class itself, which jsonargparse takes for a type that does not fit.
        return " ".join(_CLASS.sub("", found[1]).lstrip(": \n").split())
    return " ".join(message.split())


def _unknown(option: str, known: list[str], where: str = "") -> str:
    near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)
    hint = f", the nearest known name is {near[0]!r}" if near else ""
    return f"{where}has no option {option!r}{hint}" if where else f"no option --{option}{hint}"


def _parameters(class_path: str) -> list[str]:
    module, name = class_path.rsplit(".", 1)
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
