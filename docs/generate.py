"""What MkDocs calls while it builds the site: the pages that are made from the code.

The reference of the command line comes from the parsers, that of Python from the modules on disk
(mkdocstrings reads their docstrings), the model cards from the presets. None of these pages is a
file in the repository, so none can be out of date.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "percov2"

MIRRORED = {"launchers.md": "launchers/README.md", "changelog.md": "CHANGELOG.md"}
"""Pages that are files elsewhere in the repository."""

TOOLS = (
    "percov2.fit",
    "percov2.demo",
    "percov2.data.cache",
    "percov2.data.coco",
    "percov2.evaluation.report",
    "percov2.training.convert",
    "percov2.training.memory",
)
"""Programs beside `percov2`, run with ``python -m``."""

DATA_PATH_MARK = "<!-- the data path -->"
_COLUMNS = "92"
_LONG = 100

REFERENCE = {
    "codec": ("Codec and files", "The codec, its streams, pictures and model directories."),
    "analysis": ("Analysis", "From pictures to latents, tokens and captions."),
    "entropy": ("Entropy", "From tokens and captions to bytes and back, exactly."),
    "synthesis": ("Synthesis", "From tokens and text to latents."),
    "data": ("Data", "Streams of training samples."),
    "training": ("Training", "The stages, and what they are trained with."),
    "evaluation": ("Evaluation", "Metrics, protocols, competitors and reports."),
}
"""By page: title, and what it holds. `codec` has the modules that lie in no subpackage."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    pages = {name: (ROOT / source).read_text("utf-8") for name, source in MIRRORED.items()}
    pages |= {"cli.md": command_line_page(), "model-cards.md": model_cards_page()}
    pages |= reference_pages()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapt what is written for readers of the repository."""
    return adapt(markdown)


def adapt(markdown: str) -> str:
    """Links to and in mirrored files, the picture of the data path, and nested lists.

    GitHub nests a list that is indented by two or three columns, Python-Markdown wants four.
    """
    for name, source in MIRRORED.items():
        markdown = markdown.replace(f"](../{source})", f"]({name})")
    markdown = re.sub(
        r"\]\(\.\./percov2/presets/[\w-]+/README\.md\)", "](model-cards.md)", markdown
    )
    markdown = markdown.replace("](../docs/", "](")
    if DATA_PATH_MARK in markdown:
        markdown = markdown.replace(DATA_PATH_MARK, data_path())
    return _outside_fences(markdown, lambda line: re.sub(r"^ {2,3}(-|\d+\.) ", r"    \1 ", line))


def _outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    """The text with a change made to every line that is not in a fenced block."""
    lines, fenced = [], False
    for line in markdown.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        lines.append(line if fenced else change(line))
    return "\n".join(lines) + "\n"


def data_path() -> str:
    """The picture in docs/architecture.md, as a fenced block."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    found = re.search(r"^## The data path\n+(```\n.*?^```)$", text, re.MULTILINE | re.DOTALL)
    assert found, "docs/architecture.md has no picture under `## The data path`"
    return found[1]


def model_cards_page() -> str:
    """The cards of all presets on one page, their headings one level down."""
    cards = ["# Model cards\n\nThe models that ship in the package.\n"]
    for path in sorted((PACKAGE / "presets").glob("*/README.md")):
        text = re.sub(r"\A---\n.*?\n---\n+", "", path.read_text("utf-8"), flags=re.DOTALL)
        cards.append(_outside_fences(text, lambda line: re.sub(r"^#+ ", r"#\g<0>", line)))
    return "\n".join(cards)


def reference_pages() -> dict[str, str]:
    """A page for each subpackage, and an overview."""
    modules: dict[str, list[str]] = {page: [] for page in REFERENCE}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not parts[-1].startswith("__"):
            modules[parts[1] if len(parts) > 2 else "codec"].append(".".join(parts))
    pages = {
        f"reference/{page}.md": f"# {REFERENCE[page][0]}\n\n{REFERENCE[page][1]}\n\n"
        + "".join(f"::: {name}\n\n" for name in names)
        for page, names in modules.items()
    }
    rows = (
        f"| [{title}]({page}.md) | {what} | {len(modules[page])} |"
        for page, (title, what) in REFERENCE.items()
    )
    overview = (
        "# Python\n\n"
        "Most programs need `percov2.load`, the [`Codec`][percov2.codec.Codec] that it returns, "
        "[`percov2.info`][percov2.inspection.info] and "
        "[`BitstreamError`][percov2.bitstream.BitstreamError].\n\n"
        "::: percov2\n    options:\n      members: [load]\n\n"
        "| page | holds | modules |\n|---|---|---|\n"
    )
    return {**pages, "reference/index.md": overview + "\n".join(rows) + "\n"}


def command_line_page() -> str:
    """Every command and option, from the parsers themselves."""
    from percov2.cli import _parser

    with patch.dict(os.environ, COLUMNS=_COLUMNS):
        parser = _parser()
        sections = [f"# Command line\n\n{parser.description}\n\n{_usage(parser)}"]
        sections += [_command(name, *found) for name, found in _commands(parser).items()]
        sections.append(
            "## Other programs\n\nThe training and what belongs to it, from a clone of the "
            "repository or with the extras `train` and `evaluation`.\n"
        )
        sections += [f"### python -m {name}\n\n{_folded(_help_of(name))}" for name in TOOLS]
    return "\n".join(sections)


def _commands(parser: argparse.ArgumentParser) -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """By name: the line that the list of commands has, and the parser."""
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    assert len(found) == 1
    lines = {action.dest: action.help or "" for action in found[0]._choices_actions}
    return {name: (lines[name], command) for name, command in found[0].choices.items()}


def _command(name: str, line: str, parser: argparse.ArgumentParser) -> str:
    text = f"## percov2 {name}\n\n{line[0].upper()}{line[1:]}.\n\n"
    if " " in str(parser.description):
        text += f"{parser.description}\n\n"
    text += f"{_usage(parser)}\n"
    for action in parser._actions:
        if action.help and action.help != argparse.SUPPRESS and action.dest != "help":
            text += f"`{_invocation(action)}`\n:   {action.help % vars(action)}\n\n"
    return text


def _invocation(action: argparse.Action) -> str:
    """How an option or an argument is written."""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
    value = str(action.metavar or choices or action.dest.upper())
    if action.nargs == "+":
        value += " ..."
    if not action.option_strings:
        return value
    names = ", ".join(action.option_strings)
    return names if action.nargs == 0 else f"{names} {value}"


def _usage(parser: argparse.ArgumentParser) -> str:
    return _block(parser.format_usage())


def _block(text: str) -> str:
    return f"```text\n{text.strip()}\n```\n"


def _folded(text: str) -> str:
    """A block; a long one opens on a click."""
    block, lines = _block(text), text.count("\n")
    if lines <= _LONG:
        return block
    return f'??? "{lines} lines"\n\n{textwrap.indent(block, "    ")}'


def _help_of(module: str) -> str:
    """What ``python -m MODULE --help`` prints."""
    printed = io.StringIO()
    code: object = None
    with patch.object(sys, "argv", [f"python -m {module}", "--help"]), redirect_stdout(printed):
        try:
            importlib.import_module(module).main()
        except SystemExit as end:
            code = end.code
    if code != 0:
        raise RuntimeError(f"python -m {module} --help ended with {code}")
    return printed.getvalue()
