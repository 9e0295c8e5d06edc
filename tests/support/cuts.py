"""How a stream is cut into pieces: whole, byte by byte, at random, or at given offsets.

For: trying everything that is sent in several ways. A receiver must do the same for each of them.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Final

Cut = Callable[[bytes], Iterator[bytes]]

PIECE_BYTES_MAX: Final = 11  # shorter than most messages, so that most of them are cut


def whole(content: bytes) -> Iterator[bytes]:
    """Return the content in one piece."""
    yield content


def byte_by_byte(content: bytes) -> Iterator[bytes]:
    """Return pieces of one byte."""
    for index in range(len(content)):
        yield content[index : index + 1]


def at_random(content: bytes) -> Iterator[bytes]:
    """Return pieces of 0 to PIECE_BYTES_MAX bytes; the same content is always cut the same way."""
    chance = random.Random(content)
    position = 0
    while position < len(content):
        size = chance.randint(0, PIECE_BYTES_MAX)
        yield content[position : position + size]
        position += size


def at_offsets(content: bytes, offsets: Iterable[int]) -> Iterator[bytes]:
    """Return the pieces between these offsets; an offset that occurs twice is an empty piece."""
    inside = sorted(offset for offset in offsets if offset <= len(content))
    for start, end in pairwise((0, *inside, len(content))):
        yield content[start:end]


THREE_WAYS: Final[tuple[Cut, ...]] = (whole, byte_by_byte, at_random)


def three_ways(content: bytes) -> Iterator[list[bytes]]:
    """Return the content's pieces for each of the three cuts."""
    for cut in THREE_WAYS:
        yield list(cut(content))
