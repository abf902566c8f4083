"""SVG elements as strings, and how each column of the ledger looks: a colour and a hatch.

The colours are Okabe and Ito's set, which stays distinct under the common colour-vision deficiencies; the
hatches tell the columns apart in grey print. Styles are plain class rules with a dark variant, so that a picture
works alone (in a README) as well as inside a page.
"""

from __future__ import annotations

from markupsafe import Markup, escape

from slimgrad.types import Column

COLOURS: dict[str, str] = {
    Column.WEIGHTS: "#0072b2",
    Column.OPTIMIZER_STATE: "#cc79a7",
    Column.GRADIENTS: "#e69f00",
    Column.ACTIVATIONS: "#009e73",
    Column.TEMPORARIES: "#56b4e9",
    Column.INPUTS: "#f0e442",
}

_HATCHES: dict[str, str] = {  # the path drawn in each 8 x 8 tile
    Column.WEIGHTS: "",
    Column.OPTIMIZER_STATE: "M-2,2 L2,-2 M0,8 L8,0 M6,10 L10,6",
    Column.GRADIENTS: "M4,0 V8",
    Column.ACTIVATIONS: "M-2,6 L2,10 M0,0 L8,8 M6,-2 L10,2",
    Column.TEMPORARIES: "M0,4 H8",
    Column.INPUTS: "M0,4 H8 M4,0 V8",
}

STYLE = """
.sg text{font-family:system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;font-size:12px;fill:#1c2128}
.sg .small{font-size:11px;fill:#57606a}
.sg .cell-text{font-size:11px}
.sg .strong{font-size:14px;font-weight:600}
.sg .paper{fill:#ffffff}
.sg .grid{stroke:#d8dee4;stroke-width:1}
.sg .axis{stroke:#57606a;stroke-width:1}
.sg .mark{stroke:#57606a;stroke-width:1;stroke-dasharray:2 3;opacity:.55}
.sg .budget{stroke:#b3261e;stroke-width:2;stroke-dasharray:7 4}
.sg .under{stroke:#ffffff;stroke-width:4;stroke-opacity:.7}
.sg .budget-text{font-weight:600}
.sg .halo{paint-order:stroke;stroke:#ffffff;stroke-width:3.5px;stroke-opacity:.88;stroke-linejoin:round}
.sg .dot{fill:#1c2128;stroke:#ffffff;stroke-width:1.5}
.sg .skyline{fill:none;stroke:#1c2128;stroke-width:1;stroke-linejoin:round}
.sg .frame{fill:none;stroke:#ffffff;stroke-width:2}
.sg .group{fill:#eaeef2;stroke:#ffffff;stroke-width:2}
.sg .hatch{stroke:#000000;stroke-opacity:.22;stroke-width:1.2;fill:none}
@media screen and (prefers-color-scheme:dark){
.sg text{fill:#e6edf3}
.sg .small{fill:#a0aab4}
.sg .paper{fill:#12161b}
.sg .grid{stroke:#2d343c}
.sg .axis,.sg .mark{stroke:#8b949e}
.sg .budget{stroke:#ff8a80}
.sg .under{stroke:#12161b}
.sg .halo{stroke:#12161b}
.sg .dot{fill:#ffffff;stroke:#12161b}
.sg .skyline{stroke:#e6edf3}
.sg .frame,.sg .group{stroke:#12161b}
.sg .group{fill:#222931}
}
"""


def element(name: str, *children: str | Markup, **attributes: object) -> Markup:
    """One element; children and attribute values are escaped unless they are ``Markup`` already.

    Underscores in attribute names become hyphens (``class_`` is ``class``); numbers are written to a hundredth.
    """
    written = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(str(escape(child)) for child in children)
    return Markup(f"<{name}{written}>{inner}</{name}>" if inner else f"<{name}{written}/>")


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def column_title(column: str) -> str:
    """A column's name for a reader.

    >>> column_title("optimizer_state")
    'optimizer state'
    """
    return column.replace("_", " ")


def patterns(prefix: str) -> Markup:
    """Definitions of the six fills, to be used as ``fill(prefix, column)``."""
    tiles = [
        element(
            "pattern",
            element("rect", width=8, height=8, fill=COLOURS[column]),
            element("path", d=_HATCHES[column], class_="hatch"),
            id=f"{prefix}-{column}",
            width=8,
            height=8,
            patternUnits="userSpaceOnUse",
        )
        for column in Column
    ]
    return element("defs", *tiles)


def fill(prefix: str, column: str) -> str:
    """The value of a ``fill`` attribute for ``column``."""
    return f"url(#{prefix}-{column})"


def picture(
    width: float, height: float, *children: Markup, prefix: str, label: str, **attributes: object
) -> Markup:
    """A whole picture with its styles, its fills and a label for readers who do not see it."""
    return element(
        "svg",
        element("title", label),
        Markup(f"<style>{STYLE}</style>"),
        patterns(prefix),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_number(float(width))} {_number(float(height))}",
        width=width,
        height=height,
        class_="sg",
        role="img",
        aria_label=label,
        **attributes,
    )


def text_width(text: str, size: float = 12.0) -> float:
    """An upper estimate of a text's width in pixels, for laying out labels without a font at hand."""
    return 0.62 * size * len(text)


def shortened(text: str, width: float, size: float = 12.0) -> str:
    """``text`` cut in the middle to fit ``width`` pixels; empty where not even six letters fit."""
    room = int(width / (0.62 * size))
    if len(text) <= room:
        return text
    if room < 6:
        return ""
    tail = (room - 1) // 2
    return f"{text[: room - 1 - tail]}…{text[len(text) - tail :]}"
