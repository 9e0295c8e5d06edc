"""A token for all endpoints of one workspace, minted for whichever of them works.

The credential call names one resource, and its token opens every database of that workspace that
the identity may use. So the endpoints of a workspace share their tokens, and one that was deleted
or may not be used must not cost the others theirs.

For: choosing the resource. Not for: when to mint (`token_source`), or the call (`client`).
"""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from proxy.errors import ProxyError
from proxy.workspace.credential import Credential
from proxy.workspace.resources import OF_ONE_RESOURCE, Resource

# Resources tried for one mint. Each is a call, and a workspace that refuses three refuses all.
TRIES_MAX: Final = 3


class Minter:
    """Mints for the resource that worked last, or else for the next one that works."""

    def __init__(
        self, mint: Callable[[Resource], Awaitable[Credential]], resources: Sequence[Resource]
    ) -> None:
        """`resources` are of one workspace and of one kind, in the order in which to try them."""
        self._mint = mint
        self._resources: deque[Resource] = deque()
        self.offer(resources)

    def offer(self, resources: Sequence[Resource]) -> None:
        """Mint for one of these from now on; the one that worked last stays first if it is there.

        A reload may bring others.
        """
        assert resources, "a workspace without resources has nothing to mint for"
        last = self._resources[0] if self._resources else resources[0]
        self._resources = deque(sorted(resources, key=lambda one: one != last))

    async def __call__(self) -> Credential:
        """Return a new credential. Raises the ProxyError of the first resource that was tried."""
        first_failure: ProxyError | None = None
        for _ in range(min(TRIES_MAX, len(self._resources))):
            tried = self._resources[0]
            try:
                return await self._mint(tried)
            except ProxyError as error:
                if error.kind not in OF_ONE_RESOURCE:
                    raise
                first_failure = first_failure or error
                # Unless a mint that ran at the same time has gone on to the next one already.
                if self._resources[0] is tried:
                    self._resources.rotate(-1)
        assert first_failure is not None
        raise first_failure
