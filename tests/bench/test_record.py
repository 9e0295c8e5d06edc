"""A record survives its file; table and JSON show the same values."""

import json

from bench.measurements import Quantity
from bench.record import Record, from_json, to_json
from bench.report import describe_machine, format_number, table
from proxy.native import AVAILABLE
from tests.bench.records import record


def test_a_record_survives_its_file() -> None:
    whole = record()
    again = from_json(to_json(whole))
    assert again == whole
    assert to_json(again) == to_json(whole)


def test_a_value_is_written_with_five_digits() -> None:
    whole = Record(1)
    whole.measurements.add("proxy", Quantity("COPY out", "speed", "MB/s"), 1234.56789)
    (one,) = json.loads(to_json(whole))["quantities"]
    assert one["values"] == {"proxy": [1234.6]}


def test_medians_and_ratios_are_written_beside_the_values() -> None:
    quantities = json.loads(to_json(record(speed=3)))["quantities"]
    (copy,) = (
        one for one in quantities if (one["case"], one["name"]) == ("COPY out, 64 MB", "speed")
    )
    assert copy["medians"] == {"direct": 1, "pgbouncer": 1, "proxy": 3}
    assert copy["ratios"] == {"proxy/pgbouncer": 3, "proxy/direct": 3}


def test_the_table_has_a_column_for_each_system_that_took_part() -> None:
    whole = Record(1, {"cores": "2"})
    for system, value in (("proxy", 30.0), ("direct", 40.0)):
        whole.measurements.add(system, Quantity("COPY out", "speed", "MB/s"), value)
    lines = table(whole).splitlines()
    assert lines[0] == "cores:       2"
    assert lines[2].split()[4:] == ["direct", "proxy", "proxy/pgbouncer", "proxy/direct"]
    assert lines[-1].split() == ["speed,", "MB/s", "40.0", "30.0", "-", "0.75"]


def test_another_checkout_has_a_column_only_if_it_took_part() -> None:
    copied = Quantity("COPY out", "speed", "MB/s")
    whole = Record(1)
    whole.measurements.add("proxy", copied, 30.0)
    assert "proxy/base" not in table(whole)
    whole.measurements.add("base", copied, 20.0)
    assert table(whole).splitlines()[-1].split()[-1] == "1.50"


def test_a_number_has_about_three_digits() -> None:
    assert [format_number(one) for one in (None, 0.123, 12.34, -123.4, 12345.6)] == [
        *("-", "0.12", "12.3", "-123", "12,346")
    ]


def test_the_description_says_whether_the_relay_was_compiled() -> None:
    # Without a compiler the same command publishes other numbers.
    assert describe_machine({})["relay"].startswith("compiled" if AVAILABLE else "pure Python")
