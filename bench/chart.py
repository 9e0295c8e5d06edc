"""`python -m bench.chart RESULTS.json [PICTURE.svg]`: a record as a picture.

Each bar is a ratio to PgBouncer (or to direct) on a logarithmic scale; to the right is always
better, whether more is better or less. The diamond shows where the other one is. It is drawn from
the record alone, so the same JSON gives the same bytes; it needs no font and no script, and follows
the reader's light or dark mode.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.drawing import Canvas
from bench.readings import Readings
from bench.record import Record, from_json
from bench.report import number
from bench.systems import DIRECT, PGBOUNCER, PROXY
from bench.targets import TARGETS, standings

_WIDTH: Final = 1000
_MARGIN: Final = 32
_LABELS_END: Final = 232  # labels end here, the bars' field begins a little further right
_FIELD: Final = (250, 650)
_COLUMNS: Final = (712, 800, 880, 968)  # right edges: ratio, proxy, PgBouncer, direct
_ROW: Final = 24
_BAR: Final = 12
_RATIO_MAX: Final = 4.0  # a bar that goes further is cut, and ends in an arrow
_TICKS: Final = (0.25, 0.5, 1.0, 2.0, 4.0)
_EVEN: Final = 0.025  # so near to 1.0 is neither better nor worse
# Of the machine's description what does not say by itself what it is.
_NAMED: Final = {"python": "Python ", "relay": "relay "}


@dataclass(frozen=True, slots=True)
class _Row:
    """One bar: a quantity, by the beginning of its case and by its name."""

    label: str
    case: str
    name: str


@dataclass(frozen=True, slots=True)
class _Panel:
    """Bars of one unit, against one reference; the other one is marked where it is measured."""

    title: str
    unit: str
    rows: tuple[_Row, ...]
    more_is_better: bool = False
    reference: str = PGBOUNCER
    mark: str = DIRECT


def _loads(name: str) -> tuple[_Row, ...]:
    return tuple(
        _Row(f"{protocol}, {clients}", f"pgbench {protocol}, {clients}", name)
        for protocol in ("simple", "extended", "prepared")
        for clients in ("1 client", "8 clients", "32 clients")
    )


_TRANSFERS: Final = (
    ("COPY out", "COPY out"),
    ("COPY in", "COPY in"),
    ("one value of 100 MB, out", "one value out"),
    ("one value of 100 MB, in", "one value in"),
    ("1,000,000 small rows", "1,000,000 small rows"),
)

_PANELS: Final = (
    _Panel("Throughput", "transactions a second", _loads("throughput"), more_is_better=True),
    _Panel("CPU a transaction", "microseconds, user and system", _loads("CPU")),
    _Panel(
        "Latency",
        "microseconds",
        tuple(
            _Row(
                f"prepared, {clients}, {share}", f"pgbench prepared, {clients}", f"latency {share}"
            )
            for clients in ("1 client", "8 clients")
            for share in ("p50", "p99")
        ),
    ),
    _Panel(
        "Bulk",
        "MB/s",
        tuple(_Row(label, case, "speed") for label, case in _TRANSFERS),
        more_is_better=True,
    ),
    _Panel("CPU a GB", "seconds", tuple(_Row(label, case, "CPU") for label, case in _TRANSFERS)),
    _Panel(
        "New session, beside direct TLS",
        "ms to the first answer; PgBouncer logs in once and keeps its connections",
        (
            _Row("on this machine, p50", "connect, on this", "p50"),
            _Row("PostgreSQL 1 ms away, p50", "connect, PostgreSQL", "p50"),
            _Row("500 at once, p50", "storm", "p50"),
            _Row("500 at once, last one", "storm", "until all answered"),
        ),
        reference=DIRECT,
        mark=PGBOUNCER,
    ),
)

_TILES: Final = (
    ("memory at rest", "resident memory", "at rest"),
    ("for each of 1,000 idle sessions", "resident memory", "per session of 1,000"),
    ("growth by a bulk transfer", "resident memory", "growth by a bulk transfer"),
    ("growth in the soak", "soak", "memory growth, first to last tenth"),
)


def draw(record: Record) -> str:
    """Return the picture as SVG."""
    canvas = Canvas(_WIDTH)
    _head(canvas, record)
    for panel in _PANELS:
        _panel(canvas, panel, record.readings)
    _tiles(canvas, record.readings)
    _foot(canvas, record)
    title = "lakebase-auth-proxy beside PgBouncer and a direct TLS connection"
    return canvas.svg(title, _description(record), margin=_MARGIN)


def factor(value: float, reference: float, *, more_is_better: bool) -> float:
    """Return how many times as good as the reference a value is."""
    return value / reference if more_is_better else reference / value


def _head(canvas: Canvas, record: Record) -> None:
    canvas.y = 48
    canvas.text(_MARGIN, "lakebase-auth-proxy beside PgBouncer and direct TLS", "title")
    canvas.y += 24
    rounds = f"Medians of {record.rounds} interleaved round{'s' * (record.rounds > 1)}, one machine"
    canvas.text(_MARGIN, f"{rounds}. Bars to the right are better, whatever is measured.", "soft")
    canvas.y += 26
    _legend(canvas)
    canvas.y += 8


def _legend(canvas: Canvas) -> None:
    x: float = _MARGIN
    for kind, words in (("better", "better"), ("even", "even"), ("worse", "worse")):
        canvas.box(kind, x, canvas.y - 10, 22, _BAR)
        canvas.text(x + 29, words, "soft")
        x += 84
    canvas.diamond(x + 6, canvas.y - 4)
    canvas.text(x + 20, "direct TLS (PgBouncer in the last panel)", "soft")


def _panel(canvas: Canvas, panel: _Panel, readings: Readings) -> None:
    rows = [row for row in panel.rows if _measured(readings, row, panel.reference)]
    if not rows:
        return
    canvas.y += 34
    canvas.text(_MARGIN, panel.title, "head")
    less = "more is better" if panel.more_is_better else "less is better"
    canvas.y += 17
    canvas.text(_MARGIN, f"{panel.unit}; {less}", "soft")
    for x, words in zip(_COLUMNS, ("ratio", "proxy", "PgBouncer", "direct"), strict=True):
        canvas.text(x, words, "soft", "end")
    canvas.y += 8
    top = canvas.y
    bottom = top + _ROW * len(rows)
    for tick in _TICKS:
        canvas.line(_place(tick), top, bottom + 4, "one" if tick == 1 else "line")
    for row in rows:
        canvas.y += _ROW
        _bar(canvas, panel, row, readings)
    canvas.y = bottom + 18
    reference = "direct" if panel.reference == DIRECT else "PgBouncer"
    for tick in _TICKS:
        words = reference if tick == 1 else f"{tick:g}x as good"
        canvas.text(_place(tick), words, "soft", "middle")


def _bar(canvas: Canvas, panel: _Panel, row: _Row, readings: Readings) -> None:
    quantity = readings.find(row.case, row.name)
    ratio = readings.ratio(quantity, PROXY, panel.reference)
    if ratio is None or ratio <= 0:
        return
    good = factor(ratio, 1.0, more_is_better=panel.more_is_better)
    kind = "even" if abs(good - 1) <= _EVEN else "better" if good > 1 else "worse"
    start, end = sorted((_place(1.0), _place(good)))
    baseline, middle = canvas.y - 4, canvas.y - 8
    canvas.box(kind, start, middle - _BAR / 2, max(2.0, end - start), _BAR)
    if not 1 / _RATIO_MAX <= good <= _RATIO_MAX:
        canvas.chevron(_place(good), middle, left=good < 1)
    mark = readings.ratio(quantity, panel.mark, panel.reference)
    if mark and 1 / _RATIO_MAX <= mark <= _RATIO_MAX:
        at = factor(mark, 1.0, more_is_better=panel.more_is_better)
        canvas.diamond(_place(at), middle)
    below, canvas.y = canvas.y, baseline
    canvas.text(_LABELS_END, row.label, "", "end")
    cells = [f"{ratio:.2f}x"]
    cells += [number(readings.median(quantity, one)) for one in (PROXY, PGBOUNCER, DIRECT)]
    for x, words in zip(_COLUMNS, cells, strict=True):
        canvas.text(x, words, "number", "end")
    canvas.y = below


def _tiles(canvas: Canvas, readings: Readings) -> None:
    seen = [
        (label, f"{number(readings.median(quantity, PROXY))} {quantity.unit}")
        for label, case, name in _TILES
        if (quantity := readings.find(case, name)) is not None
    ]
    if not seen:
        return
    canvas.y += 40
    canvas.text(_MARGIN, "Resident memory of the proxy", "head")
    canvas.y += 12
    width, gap, top = 222.0, 16.0, canvas.y
    for index, (label, value) in enumerate(seen):
        x = _MARGIN + index * (width + gap)
        canvas.box("tile", x, top, width, 68, rounded=6)
        canvas.y = top + 32
        canvas.text(x + 16, value, "large number")
        canvas.y = top + 54
        canvas.text(x + 16, label, "soft")
    canvas.y = top + 68


def _foot(canvas: Canvas, record: Record) -> None:
    said = record.machine
    canvas.y += 34
    on = ("processor", "cores", "memory", "system")
    words = [f"{said[one]} cores" if one == "cores" else said[one] for one in on if one in said]
    canvas.text(_MARGIN, ", ".join(words), "soft")
    for names in (("python", "relay", "postgres", PGBOUNCER), ("run", "disturbance")):
        words = [f"{_NAMED.get(one, '')}{said[one]}" for one in names if one in said]
        if words:
            canvas.y += 17
            canvas.text(_MARGIN, "; ".join(words), "soft")


def _description(record: Record) -> str:
    """Return what the picture shows, for those who do not see it: how many targets are met."""
    known = [one for one in standings(record) if one.met is not None]
    met = sum(one.met is True for one in known)
    return (
        f"Ratios of the proxy to PgBouncer and to direct TLS by measure. {met} of {len(known)} "
        f"measured values keep the bounds of {len(TARGETS)} targets; docs/performance.md has them."
    )


def _measured(readings: Readings, row: _Row, reference: str) -> bool:
    return bool(readings.ratio(readings.find(row.case, row.name), PROXY, reference))


def _place(good: float) -> float:
    """Return where in the field a factor is: 1.0 in the middle, twice and half equally far."""
    first, last = _FIELD
    share = math.log(min(max(good, 1 / _RATIO_MAX), _RATIO_MAX), _RATIO_MAX)
    return round((first + last) / 2 + share * (last - first) / 2, 1)


def main() -> None:
    """Draw the record of a file."""
    drawn = draw(from_json(Path(sys.argv[1]).read_text()))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(drawn)
    else:
        sys.stdout.write(drawn)


if __name__ == "__main__":
    main()
