"""How figures look: a colour, a marker and a hatch for every agent, legends that fit, files that repeat."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from semore_bench.names import shorten
from wrappers.errors import UserError

# Okabe and Ito's palette, which can be told apart with every kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#71717a",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.dpi": 200,
    "font.size": 9,
    "grid.color": "#e4e4e7",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "semore-bench",
    "text.parse_math": False,  # a name with two dollar signs is a name
    "text.usetex": False,
    "xtick.color": "#3f3f46",
    "ytick.color": "#3f3f46",
}

LONGEST_LABEL = 60
"""characters of a name in a figure"""


@dataclass(frozen=True)
class Look:
    """How an agent is drawn: by colour, and by marker or hatch where there is no colour, as in print."""

    colour: str
    marker: str
    hatch: str
    hollow: bool = False  # the marker

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments of its bold line."""
        edge = {"markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.6}
        if self.hollow:
            edge |= {"markeredgecolor": self.colour, "markeredgewidth": 1.0, "markerfacecolor": "white"}
        return {"color": self.colour, "linewidth": 1.8, "marker": self.marker} | edge


def agent_looks(agents: Sequence[str]) -> dict[str, Look]:
    """A look for each agent, the same for the same list; no two of up to 64 have both colour and marker in common."""
    hatches = ("", "//", "..", "xx", "\\\\", "++", "--", "oo")
    looks = {}
    for number, agent in enumerate(agents):
        # Colours that everybody can tell apart are few: with more agents they come again, with other markers, hollow.
        turn, colour = divmod(number, len(COLOURS))
        shape = (colour + 3 * turn) % 8
        looks[agent] = Look(COLOURS[colour], "osD^vP<X"[shape], hatches[shape], hollow=turn % 2 == 1)
    return looks


def add_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Puts a legend of `handles` above the axes, as wide as the figure."""
    labels = [shorten(str(handle.get_label()), LONGEST_LABEL) for handle in handles]
    entry_width = 0.55 + 0.066 * max(map(len, labels))  # inches, at 9 points
    fitting = max(1, int(figure.get_figwidth() / entry_width))
    columns = min(len(handles), fitting)
    # further rows make the figure higher instead of the axes smaller
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(handles) / columns) - 1))
    # Matplotlib leaves out labels that begin with an underscore, so that the names are only put in afterwards.
    places = list(map(str, range(len(handles))))
    legend = figure.legend(handles, places, loc="outside upper center", ncols=columns, columnspacing=1.2)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


def save(figure: Figure, output: Path) -> None:
    """Writes the figure; the same figure gives the same bytes. Raises `UserError` where the ending is none we write."""
    supported = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    kind = output.suffix.lstrip(".").lower()
    if kind not in supported:
        raise UserError(f"cannot write {output}: expected a name that ends in .{', .'.join(supported)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(output, metadata=supported[kind])
