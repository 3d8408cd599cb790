"""One-line messages for people."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """``1 step``, ``4 steps``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its type's name if there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks; its type's name if there is none."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """The text with what would move a terminal's cursor, or worse, spelled out."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode()
        for one in text
    )
