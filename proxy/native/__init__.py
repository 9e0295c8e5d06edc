"""The compiled relay (Cython): whether it was built here.

The modules are `activity` (the idle tracker), `tls` (client TLS through libssl) and `lanes` (the
fast path; epoll, so Linux only). They are names of this package if `AVAILABLE` is True. Not for:
anything that pure Python cannot do, more slowly.

Invariant: importing this package succeeds on every platform, built or not. If one of the three
modules is missing, none is used.
"""

from collections.abc import Iterable
from enum import StrEnum, unique
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # names that exist if AVAILABLE is True
    from proxy.native import activity as activity
    from proxy.native import lanes as lanes
    from proxy.native import tls as tls

MODULES: Final = ("activity", "tls", "lanes")


def _why_missing() -> str:
    try:
        for name in MODULES:
            import_module(f"{__name__}.{name}")
    except ImportError as error:  # not built, or a library that it needs is missing
        return str(error)
    return ""


WHY_MISSING: Final = _why_missing()
"""Why the compiled relay cannot be imported, as Python reports it; empty if it can."""

AVAILABLE: Final = not WHY_MISSING

WHAT_IT_TAKES: Final = (
    "Compiling takes Linux, a C compiler, and the headers of Python and OpenSSL at installation."
)
"""The remedy: Python only reports that there is no such module."""


@unique
class Acceleration(StrEnum):
    """Whether new sessions use the compiled relay, as operators see it."""

    USED = "used"
    PARTLY = "partly"  # by some targets
    OFF = "off"  # built, and no target uses it
    NOT_BUILT = "not_built"


def acceleration(wanted: Iterable[bool], *, built: bool = AVAILABLE) -> Acceleration:
    """Return what new sessions use; `wanted` is each target's setting `accelerated`."""
    if not built:
        return Acceleration.NOT_BUILT
    settings = set(wanted)
    if len(settings) > 1:
        return Acceleration.PARTLY
    return Acceleration.OFF if settings == {False} else Acceleration.USED
