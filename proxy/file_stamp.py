"""Whether a file that a setting names is still the one that was seen.

For: noticing contents that changed under an unchanged name. Not for: reading them.

Invariant: a file that was replaced or written again has another stamp; one that was not, the same.
"""

from pathlib import Path

Stamp = tuple[int, int, int]
"""Inode, size in bytes, time of the last change in nanoseconds."""


def stamp_of(file: str) -> Stamp:
    """Return the stamp of what `file` leads to now. Raises OSError."""
    found = Path(file).stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
