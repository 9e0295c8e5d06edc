"""How a client asks for less than its target's pool: the startup parameter `lakebase.pool` (P2).

For: taking it out of the StartupMessage, and its value. Not for: targets without a pool, where it
is an ordinary custom setting that nothing here reads (P1).
"""

from typing import Final

from proxy.config import PoolMode
from proxy.errors import ErrorKind, ProxyError
from proxy.wire.options import take_settings
from proxy.wire.startup import StartupMessage

_PARAMETER: Final = b"lakebase.pool"
_NAMES: Final = frozenset((_PARAMETER,))
# From less to more: a client may ask for what stands before its target's mode.
_MODES: Final[tuple[PoolMode, ...]] = ("off", "session")


def take_pool_mode(message: StartupMessage, mode: PoolMode) -> tuple[PoolMode, StartupMessage]:
    """Return the mode for this client of a target with `mode`, and the message without its wish.

    It may stand where a shard key may, in any case; what stays is byte for byte as it was. Raises
    ProxyError for more than `mode`, another word, or several different ones.
    """
    found, rest = take_settings(message, _NAMES)
    if not found:
        return mode, message
    asked = {value.lower() for _, value in found}
    allowed = _MODES[: _MODES.index(mode) + 1]
    for one in allowed:
        if asked == {one.encode()}:
            return one, rest
    raise ProxyError(ErrorKind.POOL_MODE_INVALID, f"allowed: {', '.join(allowed)}")
