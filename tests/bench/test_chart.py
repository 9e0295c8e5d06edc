"""The picture: what is better goes to the right, and all of it can be read by machines, too."""

import re
from xml.etree import ElementTree as ET

import pytest

from bench.chart import draw, factor
from bench.record import Record
from tests.bench.records import record

SVG = "{http://www.w3.org/2000/svg}"


def boxes(drawn: str, kind: str) -> list[ET.Element]:
    return [one for one in ET.fromstring(drawn).iter(f"{SVG}rect") if one.get("class") == kind]


def words(drawn: str) -> list[str]:
    return [one.text or "" for one in ET.fromstring(drawn).iter(f"{SVG}text")]


def test_the_same_record_gives_the_same_picture() -> None:
    assert draw(record()) == draw(record())


def test_more_speed_and_less_cost_are_both_better() -> None:
    assert factor(2.0, 1.0, more_is_better=True) == factor(0.5, 1.0, more_is_better=False) == 2.0


@pytest.mark.parametrize(
    ("speed", "cost", "latency", "kind"),
    [(2.0, 0.5, 60.0, "better"), (0.5, 2.0, 240.0, "worse"), (1.01, 0.99, 119.0, "even")],
)
def test_every_bar_has_the_colour_of_its_kind(
    speed: float, cost: float, latency: float, kind: str
) -> None:
    drawn = draw(record(speed=speed, cost=cost, latency=latency))
    for one in ("better", "even", "worse"):
        bars = len(boxes(drawn, one)) - 1  # one is the legend's
        assert bars > 10 if one == kind else bars == 0


def test_what_is_better_lies_to_the_right_of_what_is_worse() -> None:
    better = min(float(one.get("x", "")) for one in boxes(draw(record()), "better")[1:])
    poor = draw(record(speed=0.5, cost=2.0, latency=240.0))
    worse = max(
        float(one.get("x", "")) + float(one.get("width", "")) for one in boxes(poor, "worse")[1:]
    )
    assert better == pytest.approx(worse)  # both begin at PgBouncer


def test_a_bar_beyond_the_scale_is_cut_there_and_says_so() -> None:
    drawn = draw(record(speed=400.0))
    rightmost = max(
        float(one.get("x", "")) + float(one.get("width", "")) for one in boxes(drawn, "better")
    )
    assert rightmost <= 650
    assert 'class="cut"' in drawn
    assert "400.00x" in words(drawn)
    assert 'class="cut"' not in draw(record())


def test_a_panel_of_which_nothing_was_measured_is_left_out() -> None:
    assert "Throughput" in words(draw(record()))
    assert "Throughput" not in words(draw(Record(1)))


def test_the_machine_is_named_and_cannot_break_the_picture() -> None:
    assert any("a <processor>, 2 cores, 4 GiB, Linux" in one for one in words(draw(record())))


def test_it_has_a_title_and_a_description_and_both_modes() -> None:
    drawn = draw(record())
    root = ET.fromstring(drawn)
    assert root.findtext(f"{SVG}title")
    assert "values keep the bounds" in (root.findtext(f"{SVG}desc") or "")
    assert "prefers-color-scheme: dark" in drawn


def test_it_asks_for_nothing_from_elsewhere() -> None:
    assert re.findall(r"(?:href|src|url\()", draw(record())) == []
