"""The published document is generated from the record, and explains each missed goal."""

import re

import pytest

from bench import publish
from bench.goals import GOALS
from bench.record import Record, from_json
from tests.bench.records import record

EMPTY = f"before\n{publish.BEGIN}\n{publish.END}\nafter\n"


def test_the_published_document_is_that_of_the_published_record() -> None:
    document = publish.DOCUMENT.read_text()
    assert publish.with_results(document, from_json(publish.RECORD.read_text())) == document


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
