"""SVG from matplotlib for the page: text stays text, and colors are the variables of its style
sheet."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from xml.etree import ElementTree

from backfire import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

New: TypeAlias = "Callable[[float], tuple[Figure, Axes]]"

# Stand-ins that matplotlib can draw with; `svg` replaces them by the variables of the page.
INK, MUTED, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES: Final = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
_VARIABLES: Final = {INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES, 1)
}
_WIDTH: Final = 400
_STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "backfire",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.handlelength": 1.6,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "butt",
}
_NAMESPACE: Final = "http://www.w3.org/2000/svg"
_HREF: Final = "{http://www.w3.org/1999/xlink}href"


@contextmanager
def drawing() -> Iterator[New]:
    """Gives `new(height)`. Inside, matplotlib has our style and does not warn of glyphs it lacks
    (the browser has them)."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    def new(height: float) -> tuple[Figure, Axes]:
        figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
        return figure, figure.add_subplot()

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield new


def svg(figure: Figure, title: str) -> str:
    """The figure as one `<svg>` element with a title, fit to stand inside an HTML page."""
    out = io.BytesIO()
    figure.savefig(
        out,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    root = ElementTree.fromstring(out.getvalue())
    prefix = "f" + hashlib.sha256(title.encode("utf-8", "replace") + out.getvalue()).hexdigest()[:8]
    _tame(root, prefix)
    for size in ("width", "height"):
        del root.attrib[size]
    root.attrib |= {"role": "img", "aria-labelledby": prefix}
    name = ElementTree.Element(f"{{{_NAMESPACE}}}title", {"id": prefix})
    name.text = text.line(title)
    root.insert(0, name)
    return _plain_svg(root)


def alone(drawn: str) -> str:
    """The result of `svg` as a standalone picture for a notebook or a file: light, with a size."""
    page = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    colors = dict(re.findall(r"(--[\w-]+): (#\w+)", page.partition("@media")[0]))
    root = ElementTree.fromstring(re.sub(r"var\((--[\w-]+)\)", lambda v: colors[v[1]], drawn))
    _, _, width, height = root.attrib["viewBox"].split()
    sizes = {"width": f"{1.4 * float(width):g}", "height": f"{1.4 * float(height):g}"}
    root.attrib |= sizes | {"font-family": "DejaVu Sans, sans-serif"}
    paper = {"width": "100%", "height": "100%", "fill": colors["--sheet"]}
    root.insert(0, ElementTree.Element(f"{{{_NAMESPACE}}}rect", paper))
    return _plain_svg(root)


def _tame(root: ElementTree.Element, prefix: str) -> None:
    """Remove style sheets, metadata and unused ids; make the others unique; use color variables."""
    for parent in root.iter():
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    used = {value for item in root.iter() for value in _references(item)}
    for item in root.iter():
        if "id" in item.attrib and item.attrib["id"] not in used:
            del item.attrib["id"]
        for key, value in item.attrib.items():
            if key == "id":
                item.attrib[key] = prefix + value
            elif key == _HREF:
                item.attrib[key] = "#" + prefix + value[1:]
            elif key in ("style", "clip-path"):
                item.attrib[key] = _restyle(value, prefix)


def _references(item: ElementTree.Element) -> list[str]:
    links = [item.attrib[_HREF][1:]] if _HREF in item.attrib else []
    return links + re.findall(r"url\(#([^)]+)\)", " ".join(item.attrib.values()))


def _restyle(style: str, prefix: str) -> str:
    for color, variable in _VARIABLES.items():
        style = style.replace(color, f"var({variable})")
    style = re.sub(
        r"font-family: [^;]*;? ?", "", re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", style)
    )
    return style.replace("url(#", f"url(#{prefix}")


def _plain_svg(root: ElementTree.Element) -> str:
    ElementTree.register_namespace("", _NAMESPACE)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root, encoding="unicode")
