"""Drawings of matplotlib as pictures in an HTML page: vectors whose text and axes have the page's colour."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from mft.console.screen import shown
from mft.training.panels import COLORS

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

INK = "#010203"
"""Stands in a drawing for the colour of the page's text, which is another one in dark mode."""

GREY = "#888888"
"""Of what is in the background, on white and on black."""

THEMED = {
    INK: "currentColor",
    **{color.lower(): f"var(--c{place})" for place, color in enumerate(COLORS) if color != "#000000"},
}
"""Color of a drawing → that of the page, which is a lighter one in dark mode."""

GOOD, BAD = COLORS[:2]
"""Better and worse; the colour-blind tell them apart, too."""

PANEL = (3.35, 2.5)
"""Inches of a picture of which four stand side by side."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and has the page's font
    "text.parse_math": False,  # a $ in the name of a task is a $
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "axes.grid": True,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.unicode_minus": False,
    **{f"{name}.color": INK for name in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{name}color": INK for name in ("label", "edge", "title")},
}

HINT = "hint:"
"""Begins the group id of an artist that shows the rest of it where the pointer rests on it."""

NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
"""Characters that XML cannot hold at all."""


@dataclass(frozen=True)
class Entry:
    """A line of a legend. dash: as the attribute stroke-dasharray; shape: line, disc or ring."""

    text: str
    color: str
    dash: str = ""
    shape: str = "line"


@dataclass
class Section:
    """Pictures under a heading, with what a reader needs to read them."""

    title: str
    text: Sequence[str]
    pictures: list[Markup]
    legend: list[Entry] = field(default_factory=list)


class Canvas:
    """Makes the pictures of one page, whose ids are all different."""

    def __init__(self) -> None:
        self._count = 0

    def picture(
        self, label: str, draw: Callable[[Axes], object], size: tuple[float, float] = PANEL
    ) -> Markup:
        """Returns what `draw` draws into a figure of this size in inches, as an svg element.

        label: what the picture shows, for readers who do not see it.
        """
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with anybody

        self._count += 1
        # Ids are hashes of contents: equal contents of two pictures would have the same one.
        style: dict[Any, Any] = {**STYLE, "svg.hashsalt": f"mft {self._count}"}
        with matplotlib.rc_context(style), warnings.catch_warnings():
            # The browser has letters that matplotlib's own font lacks.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure = Figure(figsize=size, layout="constrained")
            draw(figure.add_subplot())
            for axis in figure.axes:
                axis.patch.set_visible(False)
                for artist in (*axis.lines, *axis.collections, *axis.patches):
                    artist.set_in_layout(False)  # they lie within their axes; to measure them takes long
            figure.patch.set_visible(False)
            buffer = io.StringIO()
            # Figure.savefig would draw everything twice.
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
        return inlined(buffer.getvalue(), label)


def inlined(drawing: str, label: str) -> Markup:
    """Returns the SVG file that matplotlib wrote as an element for a page.

    Styles become attributes, which a page's policy allows and its own style may overrule; ids that nothing
    refers to, fonts and metadata go; group ids that begin with HINT become titles. It is parsed and written
    again, so that whatever its text holds stays text.
    """
    from markupsafe import Markup

    root = ElementTree.fromstring(_held(drawing))
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
    used = set(re.findall(r'(?:href="|url\()#(\w+)', drawing))
    for element in list(root.iter()):
        for child in list(element):
            if child.tag in ("metadata", "style"):
                element.remove(child)
        _rewrite(element, used)
    for name in ("version", "width", "height"):
        root.attrib.pop(name, None)
    _, _, width, height = root.get("viewBox", "0 0 1 1").split()
    root.attrib |= {"role": "img", "aria-label": shown(label), "width": f"{width}pt", "height": f"{height}pt"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _rewrite(element: ElementTree.Element, used: set[str]) -> None:
    attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    for declaration in attributes.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":  # the shorthand is no attribute
            size = re.search(r"[\d.]+px", value)
            name, value = "font-size", size[0] if size else ""
        if value and name != "font-family":
            attributes[name] = THEMED.get(value.lower(), value)
    if "d" in attributes:  # a hundredth of a point is enough
        attributes["d"] = re.sub(r"(\.\d\d)\d+", r"\1", " ".join(attributes["d"].split()))
    own = attributes.get("id", "")
    if own not in used:
        attributes.pop("id", None)
    element.attrib.clear()
    element.attrib.update(attributes)
    if element.text is not None:
        element.text = shown(element.text).strip()
    element.tail = None
    if own.startswith(HINT):
        title = ElementTree.Element("title")
        title.text = shown(own.removeprefix(HINT))
        element.insert(0, title)


def _held(text: str) -> str:
    return NO_XML.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def hint(text: str) -> str:
    """Returns the group id that shows text where the pointer rests."""
    return f"{HINT}{text}"


def short(text: str, room: int = 28) -> str:
    """Returns text in one line of at most so many characters, its middle left out."""
    text = " ".join(_held(shown(text)).split())
    if len(text) <= room:
        return text
    tail = (room - 1) // 2
    return f"{text[: room - 1 - tail]}…{text[len(text) - tail :]}"
