"""A record as a table for people, and the description of the machine."""

import os
import platform
import ssl
from pathlib import Path
from typing import Final

from bench.measurements import Quantity
from bench.record import Record
from proxy.native import WHY_MISSING

_WIDTH: Final = 38


def describe_machine(versions: dict[str, str]) -> dict[str, str]:
    """Return the machine by heading, and the given versions of the measured programs."""
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpu_lines if line.startswith("model name")]
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory_kib / 2**20:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_version()}, {ssl.OPENSSL_VERSION}",
        "relay": f"pure Python ({WHY_MISSING})" if WHY_MISSING else "compiled",
    } | versions


def table(record: Record) -> str:
    """Return the table: medians over the rounds, then the ratios of these medians."""
    lines = [f"{name + ':':<13}{value}" for name, value in record.machine.items()]
    head = "".join(f"{name:>11}" for name in record.systems)
    head += "".join(f"{f'{one}/{other}':>17}" for one, other in record.ratios)
    rounds = f"median of {record.rounds} round{'s' * (record.rounds > 1)}"
    lines += ["", f"{rounds:<{_WIDTH}}{head}"]
    for case in dict.fromkeys(quantity.case for quantity in record.measurements.values):
        lines += ["", case]
        lines += [_row(record, one) for one in record.measurements.values if one.case == case]
    return "\n".join(line.rstrip() for line in lines)


def format_number(value: float | None) -> str:
    """Return a value with about three digits."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _row(record: Record, quantity: Quantity) -> str:
    label = f"  {quantity.name}, {quantity.unit}" if quantity.unit else f"  {quantity.name}"
    row = f"{label:<{_WIDTH}}"
    for system in record.systems:
        row += f"{format_number(record.measurements.median(quantity, system)):>11}"
    for one, other in record.ratios:
        ratio = record.measurements.ratio(quantity, one, other)
        row += f"{'-' if ratio is None else f'{ratio:.2f}':>17}"
    return row
