"""The first token of each workspace, minted when the proxy starts.

For: finding a wrong secret when the proxy starts and not at its first client, so that `/startup`
fails and a rollout stops (`startup.require`). Not for: later tokens, which sessions ask for. A mint
resumes no database.

Invariant: it ends as soon as each workspace has had a token; readiness never depends on it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from proxy.errors import ProxyError
from proxy.observe.logs import get_logger
from proxy.server.app import App
from proxy.workspace.registry import TokenAccount

# The token source has its own back-off; asked meanwhile it repeats the failure without a call.
RETRY_SECONDS: Final = 1.0

_log = get_logger(__name__)


async def mint_first_tokens(
    app: App, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Mint a token for each workspace, until all have had one or no token is required."""
    reported: dict[str, str] = {}  # the reason that was logged last, by account
    while not app.started:
        missing = app.snapshot.accounts_without_token()  # of now: a reload may bring others
        await asyncio.gather(*(_mint(app, account, reported) for account in missing))
        if not app.started:
            await sleep(RETRY_SECONDS)
    if reported:
        _log.info("each workspace has issued a token; /startup succeeds")


async def _mint(app: App, account: TokenAccount, reported: dict[str, str]) -> None:
    """Mint one token, or report why there is none: each reason once."""
    try:
        await account.token_source.fresh()
    except ProxyError as error:
        if reported.get(account.name) == error.reason:
            return
        reported[account.name] = error.reason
        kind = error.kind.value
        app.metrics.recent_errors.record(error.reason, kind.sqlstate)
        _log.warning(
            "no token yet; /startup fails until there is one",
            workspace=account.name,
            reason=error.reason,
            detail=error.detail,
            hint=kind.hint,
        )
