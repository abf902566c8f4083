"""A squarified treemap of bytes by module: areas are bytes, bands inside a cell are the ledger's columns.

Layout after Bruls, Huizing and van Wijk, "Squarified Treemaps" (2000): rows are filled along the shorter side
for as long as the worst aspect ratio in the row improves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from slimgrad.measuring.svg import column_title, element, fill, picture, shortened, text_width
from slimgrad.types import Column, format_bytes

_HEADER = 17.0
_SMALLEST_GROUP = (84.0, 56.0)
_SMALLEST_SIDE = 0.5
_COLUMNS = (Column.WEIGHTS, Column.OPTIMIZER_STATE, Column.GRADIENTS, Column.ACTIVATIONS)


@dataclass(frozen=True)
class ModuleRow:
    """One module: its dotted path, its class, bytes by column and seconds.

    Bytes and seconds are the module's own: what its submodules' rows already count is not counted here again.
    """

    path: str
    cls: str
    weights: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    activations: int = 0
    forward_s: float = 0.0
    backward_s: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Bytes of all columns."""
        return self.weights + self.gradients + self.optimizer_state + self.activations


@dataclass(frozen=True)
class Rect:
    """A rectangle in pixels."""

    x: float
    y: float
    width: float
    height: float


def squarify(sizes: Sequence[float], rect: Rect) -> list[Rect]:
    """One rectangle for each of ``sizes`` (positive, in falling order), of proportional area, filling ``rect``."""
    total = sum(sizes)
    areas = [size * rect.width * rect.height / total for size in sizes] if total else []
    placed: list[Rect] = []
    while areas:
        side = min(rect.width, rect.height)
        if side <= 0:  # rounding has used up the last sliver
            return placed + [Rect(rect.x, rect.y, 0, 0)] * len(areas)
        count = 1
        while count < len(areas) and _worst(areas[: count + 1], side) <= _worst(
            areas[:count], side
        ):
            count += 1
        row, areas = areas[:count], areas[count:]
        placed_row, rect = _place(row, rect)
        placed += placed_row
    return placed


def _worst(row: Sequence[float], side: float) -> float:
    """The largest aspect ratio of ``row`` laid along ``side``."""
    thickness = sum(row) / side
    return max(max(thickness**2 / area, area / thickness**2) for area in row)


def _place(row: Sequence[float], rect: Rect) -> tuple[list[Rect], Rect]:
    """``row`` along the shorter side of ``rect``, and what is left of ``rect``.

    Lengths are shares of the side and the thickness never exceeds the rectangle's, so that rounding cannot push
    a cell outside.
    """
    total, offset, placed = sum(row), 0.0, list[Rect]()
    if rect.width >= rect.height:
        thickness = min(total / rect.height, rect.width)
        for area in row:
            length = rect.height * area / total
            placed.append(Rect(rect.x, rect.y + offset, thickness, length))
            offset += length
        return placed, Rect(rect.x + thickness, rect.y, rect.width - thickness, rect.height)
    thickness = min(total / rect.width, rect.height)
    for area in row:
        length = rect.width * area / total
        placed.append(Rect(rect.x + offset, rect.y, length, thickness))
        offset += length
    return placed, Rect(rect.x, rect.y + thickness, rect.width, rect.height - thickness)


@dataclass
class _Node:
    """A module with its submodules. ``name`` is its path from its parent."""

    name: str
    path: str
    cls: str = ""
    own: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COLUMNS, 0))
    children: dict[str, _Node] = field(default_factory=dict[str, "_Node"])

    def columns(self) -> dict[str, int]:
        parts = [self.own, *(child.columns() for child in self.children.values())]
        return {name: sum(part[name] for part in parts) for name in _COLUMNS}

    def parts(self) -> list[_Node]:
        """Submodules with bytes, largest first, and the module's own bytes as a part without a name."""
        own = [_Node("", self.path, self.cls, self.own)] if any(self.own.values()) else []
        parts = [p for p in (*self.children.values(), *own) if any(p.columns().values())]
        return sorted(parts, key=lambda p: -sum(p.columns().values()))


def _tree(rows: Sequence[ModuleRow]) -> _Node:
    root = _Node("", "")
    for row in rows:
        node = root
        for name in row.path.split(".") if row.path else []:
            path = f"{node.path}.{name}" if node.path else name
            node = node.children.setdefault(name, _Node(name, path))
        node.cls = row.cls
        for column in _COLUMNS:
            node.own[column] += int(getattr(row, column))
    return root


def treemap_svg(rows: Sequence[ModuleRow], width: float = 1120, height: float = 460) -> str:
    """Modules by bytes. Submodules lie inside their module wherever there is room to draw them."""
    root = _tree(rows)
    total = sum(root.columns().values())
    cells = _draw(root, Rect(0, 0, width, height)) if total else []
    label = f"Bytes by module: {format_bytes(total)} in {len(rows)} modules"
    return picture(width, height, *cells, prefix="tree", label=label)


def _draw(node: _Node, rect: Rect) -> list[Markup]:
    while len(node.children) == 1 and not any(node.own.values()):
        (child,) = node.children.values()  # model -> layers with nothing beside it: one name
        joined = f"{node.name}.{child.name}" if node.name else child.name
        node = _Node(joined, child.path, child.cls, child.own, child.children)
    large = rect.width >= _SMALLEST_GROUP[0] and rect.height >= _SMALLEST_GROUP[1]
    parts = node.parts()
    if len(parts) < 2 or not large:
        return [_cell(node, rect)]
    inner, drawn = rect, []
    if node.name:
        drawn = [_group(node, rect)]
        inner = Rect(rect.x + 2, rect.y + _HEADER, rect.width - 4, rect.height - _HEADER - 2)
    sizes = [sum(part.columns().values()) for part in parts]
    for part, place in zip(parts, squarify(sizes, inner), strict=True):
        if min(place.width, place.height) >= _SMALLEST_SIDE:
            drawn += _draw(part, place)
    return drawn


def _description(node: _Node) -> str:
    columns = {name: size for name, size in node.columns().items() if size}
    lines = [f"{node.path or 'model'}{f' ({node.cls})' if node.cls else ''}"]
    lines.append(f"{format_bytes(sum(columns.values()))} in all")
    lines += [f"{column_title(name)}: {format_bytes(size)}" for name, size in columns.items()]
    return "\n".join(lines)


def _group(node: _Node, rect: Rect) -> Markup:
    text = f"{node.name}  {format_bytes(sum(node.columns().values()))}"
    if text_width(text, 11) > rect.width - 8:
        text = shortened(node.name, rect.width - 8, 11)
    description = _description(node)
    return element(
        "g",
        element("title", description),
        element("rect", x=rect.x, y=rect.y, width=rect.width, height=rect.height, class_="group"),
        element("text", text, x=rect.x + 6, y=rect.y + 13, class_="small"),
        data_tip=description,
    )


def _cell(node: _Node, rect: Rect) -> Markup:
    """A module as one rectangle, cut into bands whose heights are its columns' shares."""
    columns = node.columns()
    total, y, bands = sum(columns.values()), rect.y, list[Markup]()
    for column, size in columns.items():
        if not size:
            continue
        height = rect.height * size / total
        bands.append(
            element(
                "rect",
                x=rect.x,
                y=y,
                width=rect.width,
                height=height,
                fill=fill("tree", column),
                data_column=column,
            )
        )
        y += height
    description = _description(node)
    return element(
        "g",
        element("title", description),
        *bands,
        element("rect", x=rect.x, y=rect.y, width=rect.width, height=rect.height, class_="frame"),
        *_names(node, rect, total),
        class_="cell",
        data_tip=description,
        data_bytes=total,
        data_path=node.path,
    )


def _names(node: _Node, rect: Rect, total: int) -> list[Markup]:
    """The module's name, and its bytes below, where there is room."""
    name = shortened(node.name or node.cls or "itself", rect.width - 8, 11)
    size = format_bytes(total)
    lines = [name, size if text_width(size, 11) <= rect.width - 8 else ""]
    room = int((rect.height - 4) / 14) if name else 0
    return [
        element("text", line, x=rect.x + 5, y=rect.y + 14 + 14 * i, class_="cell-text halo")
        for i, line in enumerate(lines[:room])
        if line
    ]
