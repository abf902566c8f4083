"""The page and its pictures: read back as HTML and XML, and compared with the numbers that went in."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgrad.measuring.picture import downsample
from slimgrad.measuring.report import (
    MemoryReport,
    ModuleRow,
    PlanRow,
    Timeline,
    render_html,
    save_html,
    timeline_svg,
    treemap_svg,
)
from slimgrad.measuring.treemap import Rect, squarify
from slimgrad.types import Column, format_bytes

MIB = 2**20
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</script><img src='https://evil.example/x' onerror=\"alert(1)\">&\"'"
VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}


def long_timeline(label="plain", peak=3000 * MIB, num_instants=5001):
    """A ramp with one instant that stands out, which any careless thinning would lose."""
    ramp = [MIB * (i % 100) for i in range(num_instants)]
    spike = [0] * num_instants
    spike[num_instants // 3] = peak - 500 * MIB - ramp[num_instants // 3]
    return Timeline(
        label,
        {"weights": [500 * MIB] * num_instants, "activations": ramp, "temporaries": spike},
        [(0, "blocks.0"), (num_instants // 2, "backward begins"), (num_instants - 10, "optimizer")],
    )


def whole_report(name="blocks.0.mlp"):
    return MemoryReport(
        title=f"A model in 1 GiB {name}",
        subtitle=f"subtitle {name}",
        timelines=[long_timeline(), long_timeline("slimgrad", 900 * MIB, 777)],
        budget_bytes=1024 * MIB,
        modules=[
            ModuleRow(name, "Linear", 300 * MIB, 300 * MIB, 600 * MIB, 12345, 0.25, 0.5),
            ModuleRow("blocks.1", f"Block{name}", 7 * MIB, 7 * MIB, 14 * MIB, 3 * MIB),
        ],
        plan_rows=[
            PlanRow(f"recompute{name}", name, name, {"activations": 777 * MIB}, 1.25),
            PlanRow("files", "all", "", {"optimizer_state": 600 * MIB, "temporaries": -8 * MIB}, 0),
        ],
        facts=[(f"machine {name}", f"2 cores {name}")],
        proof=[
            (f"peak {name}", f"900 MiB {name}", True),
            ("error", "1e-3", False),
            ("r", "s", None),
        ],
    )


class Page(HTMLParser):
    """Every tag must be closed in order; texts and attributes are collected."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.links, self.texts, self.scripts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.texts).append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def panels(svg):
    return [g for g in ET.fromstring(svg).iter(f"{SVG}g") if g.get("class") == "panel"]


def bytes_at(panel, y):
    """Read the vertical axis of a panel backwards."""
    top, bottom = float(panel.get("data-top")), float(panel.get("data-bottom"))
    return (bottom - y) / (bottom - top) * float(panel.get("data-scale-bytes"))


def corners(path):
    pairs = re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)
    return [(float(x), float(y)) for x, y in pairs]


def layers(panel):
    return {p.get("data-column"): corners(p.get("d")) for p in panel.iter(f"{SVG}path")}


def test_the_page_is_well_formed_and_loads_nothing():
    text = render_html(whole_report())
    page = Page(text)
    assert page.links == []
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|@font-face|url\((?!#)", text)
    assert "link" not in page.tags
    assert "default-src 'none'" in text


def test_the_figures_are_on_the_page():
    page = Page(render_html(whole_report()))
    for num_bytes in (3000 * MIB, 900 * MIB, 1024 * MIB, 777 * MIB, 600 * MIB, 1200 * MIB + 12345):
        assert format_bytes(num_bytes) in page.text
    assert "124.0 MiB to spare" in page.text
    assert "30% of plain" in page.text
    assert "-8.0 MiB" in page.text
    assert "1.25 s" in page.text
    assert "✓ holds" in page.text
    assert "✗ fails" in page.text
    assert "shown" in page.text


def test_a_peak_over_the_budget_is_called_over():
    page = Page(
        render_html(MemoryReport("t", timelines=[long_timeline()], budget_bytes=1000 * MIB))
    )
    assert "1.95 GiB over" in page.text


def test_parts_without_content_are_left_out():
    page = Page(render_html(MemoryReport("only a title")))
    assert "only a title" in page.text
    assert "table" not in page.tags
    assert "section" not in page.tags


def test_everything_from_outside_is_escaped():
    text = render_html(whole_report(HOSTILE))
    page = Page(text)
    assert "img" not in page.tags
    assert page.links == []
    assert len(page.scripts) == 1
    assert "evil" not in page.scripts[0]
    assert text.count("evil.example") >= 10  # shown as text in every place it was given
    assert page.text.count("<img src='https://evil.example/x'") >= 8


def test_hostile_labels_stay_inside_the_pictures():
    columns = {"weights": [1, 2]}
    svg = timeline_svg([Timeline(HOSTILE, columns, [(0, HOSTILE)])], None)
    (panel,) = panels(svg)
    assert panel.get("data-label") == HOSTILE
    cells = [
        g
        for g in ET.fromstring(treemap_svg([ModuleRow(HOSTILE, HOSTILE, 5)])).iter()
        if g.get("data-path")
    ]
    assert cells[0].get("data-path") == HOSTILE


def test_save_html_makes_the_folder(tmp_path):
    path = save_html(whole_report(), tmp_path / "a" / "b.html")
    assert path.read_text(encoding="utf-8") == render_html(whole_report())


def test_the_drawn_peak_is_the_true_peak():
    timelines = whole_report().timelines
    for panel, timeline in zip(panels(timeline_svg(timelines, 1024 * MIB)), timelines, strict=True):
        pixel = float(panel.get("data-scale-bytes")) / (
            float(panel.get("data-bottom")) - float(panel.get("data-top"))
        )
        highest = min(y for path in layers(panel).values() for _, y in path)
        assert abs(bytes_at(panel, highest) - timeline.peak_bytes) < 0.02 * pixel
        (peak,) = [g for g in panel.iter(f"{SVG}g") if g.get("class") == "peak"]
        (dot,) = peak.iter(f"{SVG}circle")
        assert abs(bytes_at(panel, float(dot.get("cy"))) - timeline.peak_bytes) < 0.02 * pixel
        assert format_bytes(timeline.peak_bytes) in "".join(peak.itertext())


def test_layers_are_stacked_in_the_order_of_the_columns():
    columns = {name: [10 * (i + 1), 100 * (i + 1)] for i, name in enumerate(Column)}
    (panel,) = panels(timeline_svg([Timeline("t", columns)], None))
    tops = np.cumsum([100 * (i + 1) for i in range(6)])
    assert list(layers(panel)) == list(Column)
    for top, below, path in zip(tops, [0, *tops], layers(panel).values(), strict=False):
        second_half = [y for x, y in path if x > np.mean([p[0] for p in path])]
        assert bytes_at(panel, min(second_half)) == pytest.approx(top, abs=0.1)
        assert bytes_at(panel, max(second_half)) == pytest.approx(below, abs=0.1)


def test_panels_share_one_scale_and_one_budget():
    svg = timeline_svg([Timeline("a", {"weights": [7000]}), Timeline("b", {"weights": [10]})], 9000)
    a, b = panels(svg)
    for name in ("data-scale-bytes", "data-top", "data-bottom"):
        assert a.get(name) == b.get(name)
    for panel in (a, b):
        (line,) = [e for e in panel.iter(f"{SVG}line") if e.get("class") == "budget"]
        assert bytes_at(panel, float(line.get("y1"))) == pytest.approx(9000, rel=1e-3)
    assert float(a.get("data-x")) + float(a.get("data-width")) < float(b.get("data-x"))


def test_what_the_hover_reads_is_what_is_drawn():
    timeline = long_timeline()
    panel, _ = panels(timeline_svg([timeline, timeline], None))
    columns = np.array(json.loads(panel.get("data-columns")))
    assert columns.shape[0] == len(Column)
    assert columns.sum(axis=0).max() == timeline.peak_bytes
    assert columns.shape[1] < 1000 < timeline.num_instants


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=300), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_downsampling_keeps_the_maximum_and_the_order(totals, num_bins):
    totals = np.array(totals)
    chosen = downsample(totals, num_bins)
    assert totals[chosen].max() == totals.max()
    assert (np.diff(chosen) > 0).all()
    assert len(chosen) == min(num_bins, len(totals))


def test_labels_of_marks_do_not_touch():
    marks = [(i, f"layers.{i}") for i in range(100)] + [(50, "backward begins"), (52, "optimizer")]
    svg = timeline_svg([Timeline("t", {"weights": [1] * 100}, marks)], None)
    (group,) = [g for g in ET.fromstring(svg).iter(f"{SVG}g") if g.get("class") == "marks"]
    texts = [(float(t.get("y")), float(t.get("x")), t.text) for t in group.iter(f"{SVG}text")]
    assert {"backward begins", "optimizer", "layers.0"} <= {text for *_, text in texts}
    assert len(list(group.iter(f"{SVG}line"))) == len(marks)
    for y, x, text in texts:
        for y_other, x_other, other in texts:
            if y == y_other and (x, text) != (x_other, other):
                assert abs(x - x_other) > 3 * (len(text) + len(other))


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"weight": [1]}, "weight"),
        ({"weights": [1], "inputs": [1, 2]}, "2"),
        ({"weights": []}, "0"),
    ],
)
def test_a_timeline_that_makes_no_sense_is_refused(columns, found):
    with pytest.raises(ValueError, match=found):
        Timeline("t", columns)


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one timeline"):
        timeline_svg([], None)


def test_at_peak_names_every_column():
    timeline = long_timeline()
    at_peak = timeline.at_peak()
    assert list(at_peak) == list(Column)
    assert sum(at_peak.values()) == timeline.peak_bytes == 3000 * MIB
    assert at_peak["weights"] == 500 * MIB


@given(st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_squarify_fills_the_rectangle_in_proportion(sizes):
    sizes = sorted(sizes, reverse=True)
    places = squarify(sizes, Rect(3, 5, 400, 300))
    areas = np.array([p.width * p.height for p in places])
    np.testing.assert_allclose(areas, 120000 * np.array(sizes) / sum(sizes), rtol=1e-6, atol=1e-2)
    for p in places:
        assert p.x >= 3
        assert p.y >= 5
        assert p.x + p.width <= 403 + 1e-6
        assert p.y + p.height <= 305 + 1e-6


def test_squarify_prefers_squares():
    """The example of the paper: 6 6 4 3 2 2 1 in a rectangle of 6 by 4; its figure has no cell beyond 3.5 : 1."""
    places = squarify([6, 6, 4, 3, 2, 2, 1], Rect(0, 0, 6, 4))
    ratios = [max(p.width / p.height, p.height / p.width) for p in places]
    assert max(ratios) <= 3.5
    assert [round(p.width, 6) for p in places[:2]] == [3, 3]  # the first two, one above the other


def cells_of(svg):
    return [g for g in ET.fromstring(svg).iter(f"{SVG}g") if g.get("class") == "cell"]


def test_cells_of_the_treemap_hold_all_bytes_once():
    rows = [
        ModuleRow(f"net.blocks.{i}.{part}", "Linear", 10 * MIB * (i + 1), 5, 7, 9)
        for i in range(4)
        for part in ("a", "b")
    ]
    rows.append(ModuleRow("net.head", "Linear", 3 * MIB, 0, 0, 64 * MIB))
    rows.append(
        ModuleRow("net.blocks.1", "Block", 0, 0, 0, 20 * MIB)
    )  # bytes of its own beside its parts
    cells = cells_of(treemap_svg(rows))
    assert sum(int(c.get("data-bytes")) for c in cells) == sum(row.num_bytes for row in rows)
    own = [c for c in cells if c.get("data-path") == "net.blocks.1"]
    assert [int(c.get("data-bytes")) for c in own] == [20 * MIB]


def test_bands_of_a_cell_are_the_shares_of_its_columns():
    (cell,) = cells_of(treemap_svg([ModuleRow("m", "Linear", 100, 200, 300, 400)], 500, 300))
    bands = {
        r.get("data-column"): float(r.get("height"))
        for r in cell.iter(f"{SVG}rect")
        if r.get("data-column")
    }
    assert bands == {"weights": 30, "gradients": 60, "optimizer_state": 90, "activations": 120}


def test_a_treemap_without_bytes_is_empty_but_well_formed():
    assert cells_of(treemap_svg([ModuleRow("m", "Identity")])) == []
