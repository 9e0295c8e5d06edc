"""A stamp of a file, which changes when the file does.

For: detecting new contents under the same name. Not for: reading the file.

Invariant: the stamp of a file that was replaced or written is different; otherwise it is the same.
"""

from pathlib import Path

Stamp = tuple[int, int, int]
"""Inode, size in bytes, and time of the last modification in nanoseconds."""


def stamp_of(file: str) -> Stamp:
    """Return the present stamp of `file`, following links. Raises OSError."""
    found = Path(file).stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def stamp_if_found(file: str) -> Stamp | None:
    """Return the present stamp of `file`; None if it is not there or cannot be reached."""
    try:
        return stamp_of(file)
    except OSError:
        return None
