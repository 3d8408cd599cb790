"""Cuts a caption into the pieces that the caption model knows: words with the space before them.

Only the encoder cuts; the decoder joins pieces whatever the cut was, so nothing here has to agree
between two machines but `capitalise`, which is why only ASCII letters change their case.
"""

from __future__ import annotations

import re

_LETTER = "[A-Za-z\u0080-\U0010ffff]"
_PIECE = re.compile(f" ?{_LETTER}+(?:['-]{_LETTER}+)*| ?[0-9]+| ?[^ ]| ")


def cut(text: str) -> list[str]:
    """Cut `text` into pieces that join to it again: words, numbers, single signs.

    A piece takes the one space before it along.
    """
    return _PIECE.findall(text)


def is_upper(character: str) -> bool:
    """Whether `character` is one of A to Z."""
    return "A" <= character <= "Z"


def first_lower(text: str) -> str:
    """`text` with its first letter, behind at most one space, in lower case (ASCII only)."""
    start = int(text[:1] == " ")
    letter = text[start : start + 1]
    return text[:start] + letter.lower() + text[start + 1 :] if is_upper(letter) else text


def first_upper(text: str) -> str:
    """`text` with its first letter, behind at most one space, in upper case (ASCII only)."""
    start = int(text[:1] == " ")
    letter = text[start : start + 1]
    return text[:start] + letter.upper() + text[start + 1 :] if "a" <= letter <= "z" else text
