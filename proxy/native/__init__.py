"""The relay's fast lane, compiled by Cython: whether it was built here.

For: one answer, to whoever relays and to whoever tells operators of it. The modules are `activity`
(the idle tracker), `tls` (client TLS through libssl) and `lanes` (epoll, so Linux only); they are
names of this package where `AVAILABLE` says so. Not for: anything that pure Python does not do as
well, only slower.

Invariant: importing this package succeeds on every platform, built or not. Either all three modules
are there or none counts.
"""

from collections.abc import Iterable
from enum import StrEnum, unique
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # what is there where AVAILABLE is True
    from proxy.native import activity as activity
    from proxy.native import lanes as lanes
    from proxy.native import tls as tls

MODULES: Final = ("activity", "tls", "lanes")


def _why_missing() -> str:
    try:
        for name in MODULES:
            import_module(f"{__name__}.{name}")
    except ImportError as error:  # not built, or a library that it was built with is not here
        return str(error)
    return ""


WHY_MISSING: Final = _why_missing()
"""Why the compiled relay is not there, in Python's words; empty where it is."""

AVAILABLE: Final = not WHY_MISSING

WHAT_IT_TAKES: Final = (
    "Compiling takes Linux, a C compiler, and the headers of Python and OpenSSL at installation."
)
"""What to do about it: Python only says that there is no such module."""


@unique
class Acceleration(StrEnum):
    """What new sessions get, as operators are told."""

    USED = "used"
    PARTLY = "partly"  # by some targets
    OFF = "off"  # built, and no target wants it
    NOT_BUILT = "not_built"


def acceleration(wanted: Iterable[bool], *, built: bool = AVAILABLE) -> Acceleration:
    """Return what new sessions get; `wanted` says of each target whether it uses what is built."""
    if not built:
        return Acceleration.NOT_BUILT
    wishes = set(wanted)
    if len(wishes) > 1:
        return Acceleration.PARTLY
    return Acceleration.OFF if wishes == {False} else Acceleration.USED
