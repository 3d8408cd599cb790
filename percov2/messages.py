"""One-line messages for people."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its type's name if there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks; its type's name if there is none."""
    return " ".join(str(error).split()) or type(error).__name__
