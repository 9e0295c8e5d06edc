"""Building a shard map from rows, with every problem of the rows reported at once.

Not for finding a key in the map (`shard_map`). A problem names the number of a row, its target and
the rule that is broken, never a key or bound: a reload logs problems, and keys must not be logged.

Invariant: mappings of a map never overlap, none is empty, and the target of each exists.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias, TypeVar

from proxy.errors import ErrorKind, ProxyError
from proxy.routing.keys import HASH_BYTES, KEY_BYTES, KeyType, Normalise, key_parser
from proxy.routing.map_rows import Problems, Row, rows_from_csv, rows_from_tables
from proxy.routing.shard_map import (
    HIGHEST_BOUND,
    LOWEST_BOUND,
    UNASSIGNED,
    Kind,
    MapSpec,
    ShardMap,
)

_Parse: TypeAlias = Callable[[str], bytes]
_Bounds: TypeAlias = tuple[bytes, bytes | None]
_Bound = TypeVar("_Bound", bytes, bytes | None)

# With a million rows, a part has about 4,000.
_PARTS: Final = 256
_SAMPLES: Final = 16 * _PARTS

_HASH_VALUES: Final = 1 << 8 * HASH_BYTES
_HASH_RULE: Final = f"a hash is a number from 0 to {_HASH_VALUES}"
# Of a target that does not exist: enough to find it, since a line of a file may contain anything.
_SHOWN_CHARACTERS_MAX: Final = 40
_OPEN_LOW: Final = frozenset(("", LOWEST_BOUND))
_OPEN_HIGH: Final = frozenset(("", HIGHEST_BOUND))


def map_from_tables(
    tables: Iterable[Mapping[str, object]], spec: MapSpec, targets: Collection[str]
) -> ShardMap:
    """Return the map of `mappings` in TOML. `targets` are the known names. Raises MapError."""
    problems = Problems()
    rows = rows_from_tables(tables, spec.kind, problems)
    return _Builder(spec, targets, "mapping", problems).build(rows)


def map_from_csv(lines: Iterable[str], spec: MapSpec, targets: Collection[str]) -> ShardMap:
    """Return the map of a file's lines. `targets` are the known names. Raises MapError."""
    problems = Problems()
    rows = rows_from_csv(lines, spec.kind, problems)
    return _Builder(spec, targets, "line", problems).build(rows)


class LineMapping(NamedTuple):
    """A mapping of a file, with the number of its line; the bounds are those of a catalogue."""

    line: int
    lo: bytes
    hi: bytes | None
    shard: str


class LineMappings:
    """The mappings of a file, by their lower bounds. Each is made when it is read.

    A million take a third of what as many `LineMapping` objects do.
    """

    def __init__(self, builder: "_Builder", order: Sequence[int]) -> None:
        self._builder = builder
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[LineMapping]:
        return map(self._builder.mapping, self._order)

    def __getitem__(self, number: int) -> LineMapping:
        return self._builder.mapping(self._order[number])


def mappings_from_csv(lines: Iterable[str], spec: MapSpec, shards: Collection[str]) -> LineMappings:
    """Return the mappings of a file's lines, for a catalogue. Raises MapError."""
    problems = Problems()
    rows = rows_from_csv(lines, spec.kind, problems, owner="shard")
    return _Builder(spec, shards, "line", problems, owner="shard").mappings(rows)


class _InvalidRow(Exception):
    """A row that is not a valid mapping; the text says why."""


class _Builder:
    """Collects the bounds, the target and the number of each row."""

    def __init__(
        self,
        spec: MapSpec,
        targets: Collection[str],
        word: str,
        problems: Problems,
        *,
        owner: str = "target",
    ) -> None:
        """`word` is what a problem calls a row, before the row's number; `owner`, who has it."""
        self._spec = spec
        self._is_list = spec.kind is Kind.LIST
        self._read_bounds = _READERS[spec.kind]
        self._parse = key_parser(spec.key_type, spec.normalise)
        self._lowest = lowest_key(spec)
        self._names = sorted(targets)
        self._owner_of = {name: owner for owner, name in enumerate(self._names)}
        self._word = word
        self._owner = owner
        self._problems = problems
        self._los: list[bytes] = []
        self._his: list[bytes | None] = []
        self._owners = array("I")
        self._row_numbers = array("I")

    def build(self, rows: Iterable[Row]) -> ShardMap:
        """Return the map of these rows. Raises MapError."""
        return self._assemble(self._read(rows))

    def mappings(self, rows: Iterable[Row]) -> LineMappings:
        """Return the mappings of these rows. Raises MapError."""
        return LineMappings(self, self._read(rows))

    def mapping(self, at: int) -> LineMapping:
        """Return the mapping at a position."""
        lo = self._los[at]
        hi = lo + b"\0" if self._is_list else self._his[at]
        return LineMapping(self._row_numbers[at], lo, hi, self._names[self._owners[at]])

    def _read(self, rows: Iterable[Row]) -> Sequence[int]:
        """Return the positions of these rows, sorted by lower bound. Raises MapError."""
        spec = self._spec
        if spec.normalise is not Normalise.NONE and spec.key_type is not KeyType.TEXT:
            self._problems.add(f"normalise is for keys of type text, not {spec.key_type}")
        for row in rows:
            try:
                self._add(row)
            except _InvalidRow as error:
                self._problems.add(f"{self._word} {row.number}: {error}")
        order = self._sorted_positions()
        self._check_overlaps(order)
        self._problems.check()
        return order

    def _add(self, row: Row) -> None:
        """Add a row. Raises _InvalidRow."""
        lo, hi = self._read_bounds(row, self._parse)
        if hi is not None and not self._is_list and (lo >= hi or hi <= self._lowest):
            raise _InvalidRow("low is not below high, so it contains no key")
        owner = self._owner_of.get(row.target)
        if owner is None:
            raise _InvalidRow(f"there is no {self._owner} {row.target[:_SHOWN_CHARACTERS_MAX]!r}")
        if self._his and self._his[-1] == lo:
            lo = self._his[-1]  # most follow each other: both share one bound
        self._los.append(lo)
        self._his.append(hi)
        self._owners.append(owner)
        self._row_numbers.append(row.number)

    def _sorted_positions(self) -> Sequence[int]:
        """Return the positions of the rows, sorted by lower bound.

        Rows that are sorted already, as those of a large file often are, are not sorted again.
        """
        los, following = self._los, iter(self._los)
        next(following, None)
        if all(lo <= next_lo for lo, next_lo in zip(los, following, strict=False)):
            return range(len(los))
        order = array("I")
        for part in _partitions(los):
            order.extend(sorted(part, key=los.__getitem__))
        return order

    def _check_overlaps(self, order: Sequence[int]) -> None:
        """Report each mapping that begins before an earlier one has ended."""
        los, his = self._los, self._his
        widest = -1  # the mapping with the highest end so far
        for at in order:
            if widest < 0:
                widest = at
                continue
            hi, end = his[at], his[widest]
            if end is None or los[at] < end or (self._is_list and los[at] == end):
                self._report_overlap(widest, at)
            if end is not None and (hi is None or hi > end):
                widest = at

    def _report_overlap(self, one: int, other: int) -> None:
        first, second = sorted((one, other), key=self._row_numbers.__getitem__)
        self._problems.add(f"{self._describe(first)} and {self._describe(second)} overlap")

    def _describe(self, at: int) -> str:
        return f"{self._word} {self._row_numbers[at]} (on {self._names[self._owners[at]]})"

    def _assemble(self, order: Sequence[int]) -> ShardMap:
        """Return the map. If the next mapping begins where one ends, both share one bound."""
        bounds: list[bytes] = []
        owners = array("I")
        end: bytes | None = None
        for at in order:
            lo = self._los[at]
            if end is not None and end != lo:
                bounds.append(end)
                owners.append(UNASSIGNED)
            bounds.append(lo)
            owners.append(self._owners[at])
            end = None if self._is_list else self._his[at]
        if end is not None:
            bounds.append(end)
            owners.append(UNASSIGNED)
        return ShardMap(self._spec, bounds, owners, self._names)


def _partitions(los: Sequence[bytes]) -> Iterator[Sequence[int]]:
    """Yield the positions in parts; all bounds of a part are below those of the next.

    `sorted` holds the interpreter lock. Sorting a million bounds at once would stop every session
    for seconds; a part stops them for milliseconds.
    """
    sample = sorted(los[:: max(1, len(los) // _SAMPLES)])
    limits = sample[:: _SAMPLES // _PARTS]
    parts = [array("I") for _ in range(len(limits) + 1)]
    for at, lo in enumerate(los):
        parts[bisect_right(limits, lo)].append(at)
    yield from parts


def lowest_key(spec: MapSpec) -> bytes:
    """Return the lowest key or hash: an upper bound must be above it to include any."""
    size_bytes = HASH_BYTES if spec.kind is Kind.HASH else KEY_BYTES[spec.key_type]
    return b"\0" * (size_bytes or 1)


def _read_list(row: Row, parse: _Parse) -> _Bounds:
    key = _read_key("key", row.low, parse)
    if not key:
        raise _InvalidRow("the key is empty")
    return key, key  # not the next key: that would be a second object for each of a million keys


def _read_range(row: Row, parse: _Parse) -> _Bounds:
    lo = b"" if row.low in _OPEN_LOW else _read_key("low", row.low, parse)
    hi = None if row.high in _OPEN_HIGH else _read_key("high", row.high, parse)
    return lo, hi


def _read_hash(row: Row, _parse: _Parse) -> _Bounds:
    low = b"" if row.low in _OPEN_LOW else _read_key("low", row.low, parse_hash_bound)
    high = None if row.high in _OPEN_HIGH else _read_key("high", row.high, parse_hash_bound)
    if low is None:
        raise _InvalidRow("low is above every hash")
    return low, high


def _read_key(name: str, text: str, parse: Callable[[str], _Bound]) -> _Bound:
    try:
        return parse(text)
    except ProxyError as error:
        raise _InvalidRow(f"{name}: {error.detail}") from None


def parse_hash_bound(text: str) -> bytes | None:
    """Return the bytes of a hash value, None for the number after the last one.

    It is decimal, or hex with the prefix 0x. Raises ProxyError: KEY_SYNTAX, KEY_RANGE.
    """
    is_hex = text.startswith("0x")
    digits = text.removeprefix("0x")
    known = frozenset("0123456789abcdefABCDEF" if is_hex else "0123456789")
    if not 0 < len(digits) <= 10 or not known.issuperset(digits):
        raise ProxyError(ErrorKind.KEY_SYNTAX, _HASH_RULE)
    value = int(digits, 16 if is_hex else 10)
    if value > _HASH_VALUES:
        raise ProxyError(ErrorKind.KEY_RANGE, _HASH_RULE)
    return None if value == _HASH_VALUES else value.to_bytes(HASH_BYTES)


_READERS: Final[dict[Kind, Callable[[Row, _Parse], _Bounds]]] = {
    Kind.LIST: _read_list,
    Kind.RANGE: _read_range,
    Kind.HASH: _read_hash,
}
