"""A value that must never be shown: a token, a password, a cancel key.

Not encryption: the bytes are in memory as they are. The class exists so that a log line, a
traceback, an f-string or a `repr` of anything that holds one shows only that there is one.
"""

from typing import Final, final

MASK: Final = "Secret(***)"


@final
class Secret:
    """Bytes that only `reveal` gives out; equality is by value, for tests and look-ups."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """Return the bytes. Call it where they go on the wire, and nowhere else."""
        return self._value

    def __repr__(self) -> str:
        return MASK

    def __str__(self) -> str:
        return MASK

    def __format__(self, format_spec: str) -> str:
        return MASK

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __len__(self) -> int:
        return len(self._value)

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a Secret is never pickled")
