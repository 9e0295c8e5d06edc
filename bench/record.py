"""The record of a run: what was measured, on what machine; to JSON and back.

The JSON has every round's value. It has medians and ratios as well, for other programs; here they
are computed again, so that table and document depend on the values alone.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Final

from bench.measurements import Measurements, Quantity
from bench.systems import BASE, DIRECT, HAPROXY, PGBOUNCER, POOLED, PROXY

SYSTEMS: Final = (DIRECT, HAPROXY, PGBOUNCER, BASE, PROXY, POOLED)
RATIOS: Final = (
    *((PROXY, PGBOUNCER), (PROXY, DIRECT), (PROXY, BASE)),
    *((POOLED, PGBOUNCER), (POOLED, DIRECT), (POOLED, PROXY)),
)
_DIGITS: Final = 5  # more than a measurement is good for, few enough for a small file


@dataclass(slots=True)
class Record:
    """One run. `machine` describes the machine and the run, by heading, in the order of output."""

    rounds: int
    machine: dict[str, str] = field(default_factory=dict)
    measurements: Measurements = field(default_factory=Measurements)

    @property
    def systems(self) -> tuple[str, ...]:
        """The systems that took part, in the order of the columns."""
        seen = {name for values in self.measurements.values.values() for name in values}
        return tuple(name for name in SYSTEMS if name in seen)

    @property
    def ratios(self) -> tuple[tuple[str, str], ...]:
        """The pairs that are compared; those of some runs alone only if they took part."""
        absent = {BASE, POOLED} - set(self.systems)
        return tuple(pair for pair in RATIOS if not absent & set(pair))


def to_json(record: Record) -> str:
    """Return every round's value, the medians and the ratios, one line for each quantity."""
    measurements = record.measurements
    quantities = [
        {
            "case": quantity.case,
            "name": quantity.name,
            "unit": quantity.unit,
            "values": {name: [_short(one) for one in rounds] for name, rounds in values.items()},
            "medians": {name: _short(measurements.median(quantity, name)) for name in values},
            "ratios": {
                f"{one}/{other}": _short(measurements.ratio(quantity, one, other))
                for one, other in RATIOS
                if one in values and other in values
            },
        }
        for quantity, values in measurements.values.items()
    ]
    lines = ",\n  ".join(json.dumps(one) for one in quantities)
    head = f' "rounds": {record.rounds},\n "machine": {json.dumps(record.machine, indent=2)}'
    return f'{{\n{head},\n "quantities": [\n  {lines}\n ]\n}}\n'


def from_json(text: str) -> Record:
    """Return the record that `to_json` wrote, with the digits that it wrote."""
    parsed: dict[str, Any] = json.loads(text)
    measurements = Measurements()
    for one in parsed["quantities"]:
        quantity = Quantity(one["case"], one["name"], one["unit"])
        measurements.values[quantity] = one["values"]
    return Record(parsed["rounds"], parsed["machine"], measurements)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
