"""The addresses of a name: look-ups in daemon threads, so that a silent DNS delays one name only.

For: one look-up for all who wait for a name, and the memory of its last answer. Not for: which name
is dialled (`address_lookup`), or which address is tried first (`connector`).

Invariant: a name has at most `THREADS_OF_A_NAME_MAX` threads, and no other name waits for them.
"""

import asyncio
import ipaddress
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

from aiohappyeyeballs import AddrInfoType

from proxy.blocking import BlockingCalls
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import get_logger
from proxy.upstream.address_lookup import Target
from proxy.upstream.diagnosis import diagnose_network
from proxy.workspace.single_flight import PendingCalls, SingleFlight

Addresses = Sequence[AddrInfoType]
"""A target's addresses, in the order in which to try them."""

GetAddrInfo = Callable[..., list[Any]]
"""`socket.getaddrinfo`."""

# A resolver asks each of its servers for 5 s by default. With the first two of three dead, the
# answer of the third one comes after 10 s.
LOOK_UP_SECONDS_MAX: Final = 15.0
# A resolver that lists many search domains goes on for a minute after that. Its threads are left
# to themselves, and this many in all may run for one name.
THREADS_OF_A_NAME_MAX: Final = 4
# After a failure DNS is not asked for this time: a thousand clients dial a dead name again and
# again.
FAILURE_SECONDS: Final = 1.0
# How long the last addresses serve while DNS fails. A front end may move to others meanwhile.
STALE_SECONDS_MAX: Final = 600.0
# A connection that could use them waits so long for an answer.
STALE_AFTER_SECONDS: Final = 1.0
NAMES_MAX: Final = 4096  # names that are remembered; the one not used for longest is removed

# DNS has answered: there is no such name, or it has no address. Anything else may be otherwise
# soon.
_NO_SUCH_NAME: Final = {
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)
}

_log = get_logger(__name__)


class NameLookup:
    """Looks up names, and remembers the last answer for each."""

    def __init__(
        self,
        pending: PendingCalls,
        *,
        getaddrinfo: GetAddrInfo = socket.getaddrinfo,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`pending` is the owner's, who closes it."""
        self._new_name = partial(
            _Name, pending=pending, getaddrinfo=getaddrinfo, clock=clock, sleep=sleep
        )
        self._names: OrderedDict[str, _Name] = OrderedDict()

    async def resolve(self, target: Target) -> Addresses:
        """Return a target's addresses. Raises ProxyError. The caller bounds the time."""
        name = target.hostaddr or target.host
        if _is_address(name):
            flags = socket.AI_NUMERICHOST  # this asks no server
            return socket.getaddrinfo(name, target.port, type=socket.SOCK_STREAM, flags=flags)
        found = await self._named(name).addresses()
        return [
            (family, kind, protocol, canonical, (at[0], target.port, *at[2:]))
            for family, kind, protocol, canonical, at in found
        ]

    def _named(self, name: str) -> "_Name":
        if (known := self._names.get(name)) is None:
            known = self._names[name] = self._new_name(name)
            if len(self._names) > NAMES_MAX:
                self._names.popitem(last=False)
        self._names.move_to_end(name)
        return known


class _Name:
    """One name: its look-up, which is under way at most once, and what the last one answered."""

    def __init__(
        self,
        name: str,
        *,
        pending: PendingCalls,
        getaddrinfo: GetAddrInfo,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._name = name
        self._look_up = partial(getaddrinfo, name, None, type=socket.SOCK_STREAM)
        self._clock = clock
        self._sleep = sleep
        self._threads = BlockingCalls("dns", threads_max=1, overdue_max=THREADS_OF_A_NAME_MAX)
        self._single_flight = SingleFlight(self._ask, pending)
        self._last: Addresses = ()
        self._last_at = 0.0
        self._failure: ProxyError | None = None
        self._failed_at = 0.0
        self._final = False  # whether the failure is an answer of DNS

    async def addresses(self) -> Addresses:
        """Return addresses: new ones, or the last ones while DNS is silent. Raises ProxyError."""
        last = self._stale()
        if self._failure is not None and (wait := self._silence_seconds()) > 0:
            if last:
                return last
            if self._final:
                raise self._failure.with_traceback(None)
            await self._sleep(wait)
        if not last:
            return await self._single_flight.result()
        try:
            async with asyncio.timeout(0 if self._failure else STALE_AFTER_SECONDS):
                return await self._single_flight.result()
        except TimeoutError:
            return last

    def _silence_seconds(self) -> float:
        """Return for how long DNS is not to be asked again."""
        return self._failed_at + FAILURE_SECONDS - self._clock()

    def _stale(self) -> Addresses:
        """Return the last addresses, if they may still be used."""
        return self._last if self._clock() < self._last_at + STALE_SECONDS_MAX else ()

    async def _ask(self) -> Addresses:
        try:
            found = await self._threads.run(self._look_up, LOOK_UP_SECONDS_MAX)
        except (OSError, UnicodeError, RuntimeError) as error:
            return self._failed(error)
        if self._failure is not None:
            _log.info("DNS answers again", name=self._name)
        self._last, self._last_at, self._failure = found, self._clock(), None
        return found

    def _failed(self, error: Exception) -> Addresses:
        """Return the last addresses after a failure, where they may be used. Raises ProxyError."""
        failure = self._diagnose(error)
        self._final = isinstance(error, UnicodeError) or (
            isinstance(error, socket.gaierror) and error.errno in _NO_SUCH_NAME
        )
        if self._final:
            self._last = ()
        last = self._stale()
        if last and self._failure is None:
            _log.warning("DNS does not answer; the last addresses are used", error=failure.detail)
        self._failure, self._failed_at = failure, self._clock()
        if not last:
            raise failure
        return last

    def _diagnose(self, error: Exception) -> ProxyError:
        match error:
            case socket.gaierror():
                text = error.strerror
            case TimeoutError():
                text = f"DNS did not answer within {LOOK_UP_SECONDS_MAX:g} seconds"
            case UnicodeError():  # a label is too long or empty: no resolver was asked
                text = "not a valid DNS name"
            case OSError():  # no file is left for a query
                return diagnose_network(error, self._name)
            case _:  # no thread could be started
                return ProxyError(ErrorKind.OUT_OF_RESOURCES, str(error))
        return ProxyError(ErrorKind.UPSTREAM_DNS, f"{self._name}: {text}")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
