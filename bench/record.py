"""A finished run: what was measured, on what machine; to JSON and back.

The JSON holds every round's value. Medians and ratios are beside them for other programs; here they
are computed again, so that table and document follow from the values alone.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Final

from bench.readings import Quantity, Readings
from bench.systems import BASE, DIRECT, HAPROXY, PGBOUNCER, PROXY

CONTENDERS: Final = (DIRECT, HAPROXY, PGBOUNCER, BASE, PROXY)
RATIOS: Final = ((PROXY, PGBOUNCER), (PROXY, DIRECT), (PROXY, BASE))
_DIGITS: Final = 5  # more than a reading is good for, and a file that can be kept


@dataclass(slots=True)
class Record:
    """One run: `machine` in words, by heading, in the order in which it is shown."""

    rounds: int
    machine: dict[str, str] = field(default_factory=dict)
    readings: Readings = field(default_factory=Readings)

    @property
    def contenders(self) -> tuple[str, ...]:
        """Those that took part, in the order of the columns."""
        seen = {name for values in self.readings.values.values() for name in values}
        return tuple(name for name in CONTENDERS if name in seen)

    @property
    def ratios(self) -> tuple[tuple[str, str], ...]:
        """What is divided by what: the column of another checkout only where it took part."""
        return RATIOS if BASE in self.contenders else RATIOS[:-1]


def to_json(record: Record) -> str:
    """Return all of it: every round's value, medians and ratios; one line a quantity."""
    readings = record.readings
    quantities = [
        {
            "case": quantity.case,
            "name": quantity.name,
            "unit": quantity.unit,
            "values": {name: [_short(one) for one in those] for name, those in values.items()},
            "medians": {name: _short(readings.median(quantity, name)) for name in values},
            "ratios": {
                f"{one}/{other}": _short(readings.ratio(quantity, one, other))
                for one, other in RATIOS
                if one in values and other in values
            },
        }
        for quantity, values in readings.values.items()
    ]
    lines = ",\n  ".join(json.dumps(one) for one in quantities)
    head = f' "rounds": {record.rounds},\n "machine": {json.dumps(record.machine, indent=2)}'
    return f'{{\n{head},\n "quantities": [\n  {lines}\n ]\n}}\n'


def from_json(text: str) -> Record:
    """Return what `to_json` wrote, with the digits that it kept."""
    parsed: dict[str, Any] = json.loads(text)
    readings = Readings()
    for one in parsed["quantities"]:
        quantity = Quantity(one["case"], one["name"], one["unit"])
        readings.values[quantity] = one["values"]
    return Record(parsed["rounds"], parsed["machine"], readings)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
