"""Tables as texts: the same document as Markdown and as LaTeX."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from semore_bench.names import printable


@dataclass(frozen=True)
class Document:
    """Tables under a caption. `sections`: title and columns of each, header -> cells, the first two to the left.
    `notes`: what a reader must know."""

    caption: str
    sections: list[tuple[str, dict[str, list[str]]]]
    notes: list[str]


def as_markdown(document: Document) -> str:
    """Sections under headings, notes as a list."""
    return _written(
        document,
        caption=lambda text: f"# {_markdown(text)}\n",
        title=lambda text: f"\n## {_markdown(text)}\n",
        begin=lambda header: _bar(map(_markdown, header)) + "|" + "---|" * 2 + "--:|" * (len(header) - 2) + "\n",
        row=lambda cells: _bar(map(_markdown, cells)),
        end="",
        note=lambda text: f"- {_markdown(text)}\n",
    )


def as_latex(document: Document) -> str:
    """For the booktabs package; what is no table is a comment."""
    return _written(
        document,
        caption=lambda text: f"% {text}; needs \\usepackage{{booktabs}}\n",
        title=lambda text: f"\n% {text}\n",
        begin=lambda header: (
            f"\\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}\n\\toprule\n" + _ampersands(header) + "\\midrule\n"
        ),
        row=_ampersands,
        end="\\bottomrule\n\\end{tabular}\n",
        note=lambda text: f"% {text}\n",
    )


def _written(
    document: Document,
    caption: Callable[[str], str],
    title: Callable[[str], str],
    begin: Callable[[list[str]], str],
    row: Callable[[list[str]], str],
    end: str,
    note: Callable[[str], str],
) -> str:
    text = caption(printable(document.caption))
    for heading, columns in document.sections:
        text += title(printable(heading)) + begin(list(columns))
        text += "".join(row([printable(cell) for cell in cells]) for cells in zip(*columns.values(), strict=True)) + end
    return text + title("Notes") + "".join(note(printable(line)) for line in document.notes)


def rounded(value: float, digits: int) -> str:
    """A number with so many digits after the point; a dash where there is none."""
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def with_interval(row: Any, name: str, digits: int) -> str:
    """`name` of a row, with the ends `name_low` and `name_high` of its interval if there is one."""
    point, low, high = (getattr(row, name + end) for end in ("", "_low", "_high"))
    return rounded(point, digits) + ("" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


def _bar(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is: no tags, no links, no column ends, no emphasis."""
    return re.sub(r"([\\`*<>|]|(?<=\])\()", r"\\\1", text)


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "∞": r"$\infty$",
}
_LATEX |= {character: "\\" + character for character in "&%$#_{}"}


def _ampersands(cells: list[str]) -> str:
    escaped = ["".join(_LATEX.get(character, character) for character in cell) for cell in cells]
    if escaped[0].startswith(("[", "*")):
        escaped[0] = "{}" + escaped[0]  # the end of the row before would take it for its argument
    return " & ".join(escaped) + r" \\" + "\n"
