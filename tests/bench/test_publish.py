"""The published document is generated from the record, and explains each missed goal."""

import re

import pytest

from bench import pool, publish
from bench.goals import GOALS
from bench.record import Record, from_json, to_json
from tests.bench.records import record

EMPTY = f"before\n{publish.BEGIN}\n{publish.END}\nafter\n"


def test_the_published_document_is_that_of_the_published_record() -> None:
    document, record = publish.DOCUMENT.read_text(), publish.RECORD.read_text()
    assert publish.with_results(document, from_json(record)) == document
    assert to_json(from_json(record)) == record, "its medians and ratios are those of its values"


def test_the_published_ratios_are_those_of_the_published_medians() -> None:
    """Each row of the document's table, as a reader divides it."""
    table = publish.DOCUMENT.read_text().partition("```text\n")[2].partition("```")[0]
    (head,) = (line for line in table.splitlines() if line.startswith("median of "))
    titles = head.partition("rounds")[2].split()
    checked = 0
    for line in table.splitlines():
        fields = line[38:].replace(",", "").split()
        if not line.startswith("  ") or len(fields) != len(titles):
            continue
        shown = dict(zip(titles, fields, strict=True))
        for title in [title for title in titles if "/" in title and shown[title] != "-"]:
            value, reference = (float(shown[name]) for name in title.split("/"))
            apart = abs(value / reference - float(shown[title]))
            assert apart <= 0.005 + _rounding(value, reference), (line, title)
            checked += 1
    assert checked > 100


def test_numbers_of_pools_are_written_by_hand_only_while_the_record_has_none() -> None:
    cases = {one.case for one in from_json(publish.RECORD.read_text()).measurements.values}
    is_measured = any(case.startswith(pool.CASE) for case in cases)
    assert ("\n## A pool\n" in publish.DOCUMENT.read_text()) is not is_measured


def test_the_document_begins_with_what_the_proxy_costs() -> None:
    headings = re.findall(r"^## (.+)$", publish.DOCUMENT.read_text(), re.MULTILINE)
    assert headings[0] == "What does it cost me, in five numbers"
    assert headings.index("Goals and results") < headings.index("How it is measured")
    shown = publish.results(record(cost=0.25))
    assert "| CPU of a transaction, with 8 clients | - | 0.25 us | 1.00 us |" in shown


def _rounding(value: float, reference: float) -> float:
    """Return how far a quotient may be off that is made of two numbers of three digits."""
    return (
        value / reference * sum(0.0051 / one if one < 10 else 0.0051 for one in (value, reference))
    )


def test_every_measure_has_a_section_that_explains_it() -> None:
    headings = re.findall(r"^### (.+)$", publish.DOCUMENT.read_text(), re.MULTILINE)
    assert headings == [goal.measure for goal in GOALS]


def test_only_the_part_between_the_markers_is_written() -> None:
    once = publish.with_results(EMPTY, record())
    assert once.startswith(f"before\n{publish.BEGIN}\n\n## ")
    assert once.endswith(f"```\n\n{publish.END}\nafter\n")
    assert publish.with_results(once, record()) == once


def test_a_document_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="markers"):
        publish.with_results("nothing\n", record())


def test_met_missed_and_not_measured_are_told_apart() -> None:
    good, poor, none = (
        publish.results(one)
        for one in (record(), record(speed=0.5, cost=2, latency=150, own=99), Record(1))
    )
    assert "| met |" in good
    assert "**missed**" not in good
    assert "[why](#cpu-a-transaction)" in poor
    assert "| met |" not in poor
    assert "| met |" not in none
    assert "Not measured in this run: [CPU a transaction](#cpu-a-transaction); " in none
    assert "[CPU a transaction](#cpu-a-transaction)" not in good


@pytest.mark.parametrize(
    ("measure", "expected"),
    [("Two workers, CPU", "two-workers-cpu"), ("CPU a GB", "cpu-a-gb")],
)
def test_the_anchor_is_that_of_rendered_markdown(measure: str, expected: str) -> None:
    assert publish.anchor(measure) == expected
