"""A figure as SVG that lies inside a page and takes the page's colours, or as PNG."""

import io
import re
import xml.etree.ElementTree as ElementTree

from storage.report.plots import Picture
from storage.report.style import DARK, settings

PNG_DPI = 90
_FONT = re.compile(r"font: ([0-9.]+)px [^;]*")
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_SIZE = re.compile(r"[0-9.]+")


def variable(colour: str) -> str:
    """Name of the CSS variable that stands for one of our colours."""
    return f"--{colour.removeprefix('#')}"


def svg(picture: Picture) -> str:
    """One <svg> element without references to anything outside; ids begin with the picture's key."""
    sink = io.StringIO()
    with settings():
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        picture.figure.savefig(sink, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(sink.getvalue())
    for parent in root.iter():
        # Its one rule is in the page's style sheet.
        for child in [child for child in parent if _local(child.tag) in ("style", "metadata")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): _inside(_local(name), text, picture.key) for name, text in element.items()}
    width = _SIZE.match(root.attrib.pop("width"))
    assert width is not None
    root.attrib.pop("height")
    root.set("style", f"max-width: {float(width[0]) * 4 / 3:.0f}px")  # points to pixels
    root.set("role", "img")
    root.set("aria-label", picture.alt)
    title = ElementTree.Element("title")
    title.text = picture.title
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def png(picture: Picture) -> bytes:
    """The same on white, for what cannot show SVG."""
    sink = io.BytesIO()
    with settings():
        picture.figure.savefig(sink, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return sink.getvalue()


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _inside(name: str, text: str, key: str) -> str:
    if name == "id":
        return f"{key}-{text}"
    if name == "href":
        return f"#{key}-{text.removeprefix('#')}"
    linked = text.replace("url(#", f"url(#{key}-")
    return _COLOUR.sub(_themed, _FONT.sub(r"font-size: \1px", linked)) if name == "style" else linked


def _themed(match: re.Match[str]) -> str:
    return f"var({variable(match[0])})" if match[0] in DARK else match[0]
