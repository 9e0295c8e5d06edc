"""The results as a table for people and as JSON for programs, with the machine they are from."""

import os
import platform
import ssl
from pathlib import Path
from typing import Any, Final

from bench.contenders import DIRECT, PGBOUNCER, PROXY
from bench.readings import Quantity, Readings

_COLUMNS: Final = (DIRECT, PGBOUNCER, PROXY)
_RATIOS: Final = ((PROXY, PGBOUNCER), (PROXY, DIRECT))
_WIDTH: Final = 34


def machine(postgres_version: str, pgbouncer_version: str) -> dict[str, str]:
    """Return what was measured, and on what."""
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpu_lines if line.startswith("model name")]
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory_kib / 2**20:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_version()}, {ssl.OPENSSL_VERSION}",
        "postgres": postgres_version,
        "pgbouncer": pgbouncer_version,
    }


def table(readings: Readings, described: dict[str, str], rounds: int) -> str:
    """Return the table: medians over the rounds, then the medians of the rounds' ratios."""
    lines = [f"{name + ':':<13}{value}" for name, value in described.items()]
    head = "".join(f"{name:>12}" for name in _COLUMNS)
    head += "".join(f"{f'{one}/{other}':>17}" for one, other in _RATIOS)
    lines += ["", f"{f'median of {rounds} round' + 's' * (rounds > 1):<{_WIDTH}}{head}"]
    for case in dict.fromkeys(quantity.case for quantity in readings.values):
        lines += ["", case]
        lines += [_row(readings, one) for one in readings.values if one.case == case]
    return "\n".join(lines)


def as_json(readings: Readings, described: dict[str, str], rounds: int) -> dict[str, Any]:
    """Return all of it: every round's value, medians and ratios."""
    quantities = [
        {
            "case": quantity.case,
            "name": quantity.name,
            "unit": quantity.unit,
            "values": values,
            "medians": {name: readings.median(quantity, name) for name in values},
            "ratios": {
                f"{one}/{other}": readings.ratio(quantity, one, other) for one, other in _RATIOS
            },
        }
        for quantity, values in readings.values.items()
    ]
    return {"machine": described, "rounds": rounds, "quantities": quantities}


def _row(readings: Readings, quantity: Quantity) -> str:
    row = f"{f'  {quantity.name}, {quantity.unit}':<{_WIDTH}}"
    for contender in _COLUMNS:
        row += f"{_number(readings.median(quantity, contender)):>12}"
    for one, other in _RATIOS:
        ratio = readings.ratio(quantity, one, other)
        row += f"{'-' if ratio is None else f'{ratio:.2f}':>17}"
    return row


def _number(value: float | None) -> str:
    """Return a value with about three digits."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
