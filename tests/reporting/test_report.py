"""The report of a run: what the table, the picture and the page say, and that the page needs nothing beside it."""

import json
import re
import struct
import sys
from html.parser import HTMLParser

import matplotlib
import pytest
from matplotlib._pylab_helpers import Gcf

from bdistil.errors import UserError
from bdistil.reporting.curve_plot import plot_curve
from bdistil.reporting.report import write_report
from bdistil.reporting.tables import curve_table
from bdistil.storage.run_directory import CURVE_COLUMNS, FORMAT, RunConfig, RunDirectory

TEACHER = {"stage": "teacher", "macs": 1_204_224, "params": 602_112, "val_accuracy": 0.965, "val_loss": 0.1123}
ACCURACY = (0.794, 0.8765, 0.9001)
REASON = "rms error fell: a < b & c, 0.46 -> 0.31"


def row(stage, accuracy):
    return {
        "stage": stage, "macs": 5912 * stage, "link_macs": 512, "params": 3217 * stage, "train_macs": 1_241_520_000,
        "val_accuracy": accuracy, "val_loss": 0.61 / stage, "test_accuracy": accuracy - 0.0123, "latency_ms": 0.217,
        "seconds": 75.5 * stage, "accepted_class": "F_1", "margin_share": 0.4, "reason": REASON,
        "margin_min": -0.012345, "rms_error": 0.463 / stage, "sup_error": 3.14 / stage, "activation_bytes": 25_088,
        "area": 0.8112 + 0.01 * stage, "violations": 0,
    }  # fmt: skip


def rows(accuracy=ACCURACY):
    return [TEACHER, *(row(stage, value) for stage, value in enumerate(accuracy, 1))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three rounds that stopped in the fourth, as it lies on the disk."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "eta <0.5> & more")
    run.prepare()
    run.freeze(RunConfig({"model": {"note": "<script>alert(1)</script>", "eta": 0.5}}))
    run.write_curve(rows())
    for number, tries in enumerate([[], ["F_1: rms error did <not> fall"], []]):
        run.folder(number).mkdir()
        (run.folder(number) / "round.json").write_text(json.dumps({"format": FORMAT, "round": number, "tries": tries}))
    run.reject(3, "F_1: nothing gained")
    run.stop(3, "no class made <progress>")
    return run


class Page(HTMLParser):
    """The page taken apart: the tags in order, their attributes, the text, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""


@pytest.fixture(scope="module")
def page(run):
    text = write_report(run).read_text(encoding="utf-8")
    return Page(text)


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def as_read(tmp_path, given):
    run = RunDirectory(tmp_path)
    run.write_curve(given)
    return run.read_curve()


# ---- the table


def test_table_is_aligned_and_narrow(tmp_path):
    lines = curve_table(as_read(tmp_path, rows())).splitlines()
    assert len(lines) == 2 + len(rows())
    ends = [match.end() for match in re.finditer("-+", lines[1])]
    assert len(ends) == 9
    for line in lines:
        assert len(line) <= 100
        # Cells end where the rule of their column ends; a space follows, then the next column.
        assert all(line[end - 1] != " " and line[end] == " " for end in ends[:-1])
    assert lines[3].split() == ["1", "5.91k", "0.5%", "3.22k", "79.40%", "78.17%", "0.463", "0:01:16", "F_1"]


def test_a_long_class_is_wrapped_in_the_table(tmp_path):
    given = rows()
    given[1]["accepted_class"] = "F_2, hidden 32, " * 10
    lines = curve_table(as_read(tmp_path, given)).splitlines()
    assert 90 < max(map(len, lines)) <= 100
    assert " ".join(lines).count("F_2,") == 10


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("macs", 999, "999"), ("macs", 999_600, "1M"), ("macs", 20_000, "20k"), ("params", 12_345_678, "12.3M"),
        ("macs", 3.21e15, "3.21P"), ("seconds", 3.21, "3.21 s"), ("seconds", 59.7, "0:01:00"),
        ("seconds", 4000.0, "1:06:40"), ("rms_error", 0.123456, "0.1235"), ("val_accuracy", 0.98765, "98.77%"),
        ("rms_error", float("nan"), "nan"),
    ],
)  # fmt: skip
def test_units(tmp_path, column, value, shown):
    cells = curve_table(as_read(tmp_path, [{"stage": 1, column: value}])).splitlines()[2]
    assert f" {shown} " in f" {cells} "


# ---- the picture


def test_picture_has_its_size_and_no_leftovers(tmp_path):
    path = tmp_path / "picture" / "curve.png"
    path.parent.mkdir()
    plot_curve(as_read(tmp_path, rows()), path, title=r"as it is named, $\nope$")
    assert png_size(path) == (1080, 630)
    assert [file.name for file in path.parent.iterdir()] == ["curve.png"]


def test_picture_follows_the_data(tmp_path):
    pictures = {}
    changed = {
        "as it is": rows(), "again": rows(), "validation": rows((0.794, 0.85, 0.9001)), "no teacher": rows()[1:],
        "better teacher": [{**TEACHER, "val_accuracy": 0.98}, *rows()[1:]],
        "teacher of no known cost": [{**TEACHER, "macs": None}, *rows()[1:]],
        "test": [*rows()[:3], {**rows()[3], "test_accuracy": 0.82}],
        "dearer": [*rows()[:3], {**rows()[3], "macs": 40_000}],
        "longer": rows((*ACCURACY, 0.91)),
    }  # fmt: skip
    for name, given in changed.items():
        path = tmp_path / f"{name}.png"
        plot_curve(as_read(tmp_path, given), path)
        pictures[name] = path.read_bytes()
    assert pictures["as it is"] == pictures["again"]
    assert len(set(pictures.values())) == len(changed) - 1


# ---- the page


def test_page_is_well_formed_and_has_two_pictures(page):
    assert page.open == []
    assert page.tags.count("svg") == 2
    assert page.tags.count("table") == 1
    ids = [value for key, value in page.attributes if key == "id"]
    assert ids
    assert len(ids) == len(set(ids))
    targets = {value[1:] for key, value in page.attributes if key == "xlink:href"}
    assert targets
    assert targets <= set(ids)


def test_page_needs_nothing_beside_it(run, page):
    text = run.report.read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|<img|@import|url\((?!#)", text)
    assert all(value.startswith("#") for key, value in page.attributes if key in ("href", "src", "xlink:href"))


def test_page_follows_the_colour_scheme(run, page):
    text = run.report.read_text(encoding="utf-8")
    pictures = "".join(re.findall("<svg.*?</svg>", text, flags=re.DOTALL))
    assert "prefers-color-scheme:dark" in text
    used = set(re.findall(r"var\(--(\w+)\)", pictures))
    assert used == {"blue", "orange", "ink", "muted", "line", "paper"}
    assert not re.search(r": ?#[0-9a-f]{6}", pictures), "a colour that does not follow"


def test_teacher_is_a_dotted_line_and_a_star(run, page):
    styles = [value for key, value in page.attributes if key == "style"]
    assert any("stroke-dasharray" in style and "stroke: var(--ink)" in style for style in styles)
    assert any("fill: var(--ink); stroke: var(--paper); stroke-linejoin: bevel" in style for style in styles)


def test_page_has_every_exact_figure(run, page):
    values = {value for key, value in page.attributes if key == "value"}
    for line in run.read_curve():
        for column in CURVE_COLUMNS:
            assert line[column] in page.text, column
            assert line[column] in values or column == "reason", column


def test_page_has_key_figures_and_versions(page):
    for words in (
        "teacher96.50%",
        "ensemble of 390.01%",
        "first student79.40%",
        "area under the curve0.8412",
        "falls0",
    ):
        assert words in page.text
    assert "17.7k MACs · 1.5% of the teacher's · test 88.78%" in page.text
    assert re.search(r"torch \d+\.\d+.*, lightning \d+\.\d+.*, python 3\.\d+", page.text)


def test_page_tells_the_decisions(page):
    assert page.text.count(f"accepted, F_1: {REASON}") == 3
    assert "rejected, F_1: rms error did <not> fallaccepted" in page.text
    assert "rejected, F_1: nothing gained" in page.text
    assert "Stopped: no class made <progress>" in page.text


def test_page_escapes_what_the_run_says(run, page):
    text = run.report.read_text(encoding="utf-8")
    assert "<title>eta &lt;0.5&gt; &amp; more</title>" in text
    assert "note: &lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not {"script", "not", "progress", "0.5"} & set(page.tags)
    assert "note: <script>alert(1)</script>" in page.text


def test_report_brings_the_picture(run):
    assert write_report(run) == run.report
    assert png_size(run.picture) == (1080, 630)


# ---- runs that are not whole


@pytest.mark.parametrize("kept", [(), ("macs",), ("val_accuracy",), ("macs", "test_accuracy"), ("rms_error", "area")])
def test_empty_cells_survive(tmp_path, kept):
    run = RunDirectory(tmp_path)
    run.write_curve([{"stage": r["stage"], **{key: r.get(key) for key in kept}} for r in rows()])
    assert len(curve_table(run.read_curve()).splitlines()) == 2 + len(rows())
    assert "–" in Page(write_report(run).read_text(encoding="utf-8")).text
    assert png_size(run.picture) == (1080, 630)


@pytest.mark.parametrize("given", [[], [TEACHER], rows()[1:2]], ids=["no row", "teacher only", "no teacher"])
def test_short_curves_survive(tmp_path, given):
    run = RunDirectory(tmp_path)
    run.write_curve(given)
    assert len(curve_table(run.read_curve()).splitlines()) == 2 + len(given)
    assert Page(write_report(run).read_text(encoding="utf-8")).open == []


def test_a_run_without_a_curve_is_told_so(tmp_path):
    run = RunDirectory(tmp_path / "mine")
    with pytest.raises(UserError, match="No round is committed yet") as told:
        write_report(run)
    assert str(tmp_path / "mine") in str(told.value)
    assert not run.root.exists()


def test_drawing_leaves_no_global_state(tmp_path):
    settings, seen = matplotlib.rcParams.copy(), set(sys.modules)
    plot_curve(as_read(tmp_path, rows()), tmp_path / "curve.png")
    assert matplotlib.rcParams.copy() == settings
    assert not Gcf.figs
    assert "matplotlib.pyplot" not in set(sys.modules) - seen


def test_the_table_of_a_multilabel_run_fits_the_terminal(tmp_path):
    lines = curve_table(as_read(tmp_path, rows()), "multilabel").splitlines()
    assert lines[0].split()[-1] == "class"
    assert "val mAP" in lines[0]
    assert "…" not in "".join(lines)
