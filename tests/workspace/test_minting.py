"""Who shares a mint: both ways, with a mint that ends when told to."""

import asyncio

import pytest

from proxy.blocking import THREADS_MAX
from proxy.errors import ErrorKind, ProxyError
from proxy.wire.secret import Secret
from proxy.workspace.client import Credential
from proxy.workspace.minting import Minting, MintPerConnection, MintShared
from proxy.workspace.single_flight import BACKOFF_SECONDS_MIN, Backoff
from tests.support.fake_clock import FakeClock


class Mint:
    """Keeps its failures as whoever mints does."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.backoff = Backoff(self.clock, lambda: 1.0)
        self.made = self.under_way = self.peak = 0
        self.failure: ProxyError | None = None
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self) -> Credential:
        self.made += 1
        number = self.made
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)
        try:
            await self.go.wait()
            await asyncio.sleep(0)
        finally:
            self.under_way -= 1
        if self.failure is not None:
            self.backoff.start(self.failure)
            raise self.failure
        self.backoff.reset()
        return Credential(Secret(b"not-a-real-token-%d" % number), 0.0, 3600.0)


def both(mint: Mint) -> list[Minting]:
    return [MintShared(mint), MintPerConnection(mint, mint.backoff)]


@pytest.mark.parametrize("own", [False, True])
async def test_many_who_ask_at_once_share_one_or_get_one_each(own: bool) -> None:
    mint = Mint()
    tokens = both(mint)[own]
    got = await asyncio.gather(*(tokens.token(None) for _ in range(50)))
    assert len({credential.secret for credential in got}) == mint.made == (50 if own else 1)
    assert mint.peak == (THREADS_MAX if own else 1)


@pytest.mark.parametrize("own", [False, True])
async def test_a_call_that_hangs_is_a_failure_and_goes_on_until_the_end(own: bool) -> None:
    mint = Mint()
    mint.go.clear()
    tokens = both(mint)[own]
    with pytest.raises(ProxyError) as refused:
        await tokens.token(0.01)
    assert refused.value.kind is ErrorKind.API_UNREACHABLE
    assert "no answer within 0.01 seconds" in refused.value.detail
    assert mint.under_way == 1
    await tokens.close()
    assert mint.under_way == 0


async def test_after_a_failure_one_finds_out_and_the_others_wait_for_it() -> None:
    mint = Mint()
    tokens = MintPerConnection(mint, mint.backoff)
    mint.failure = ProxyError(ErrorKind.API_UNREACHABLE)
    outcomes = await asyncio.gather(
        *(tokens.token(None) for _ in range(50)), return_exceptions=True
    )
    assert outcomes == [mint.failure] * 50
    assert mint.made == THREADS_MAX
    mint.clock.move(BACKOFF_SECONDS_MIN)
    await asyncio.gather(*(tokens.token(None) for _ in range(50)), return_exceptions=True)
    assert mint.made == THREADS_MAX + 1
    mint.clock.move(2 * BACKOFF_SECONDS_MIN)
    mint.failure = None
    got = await asyncio.gather(*(tokens.token(None) for _ in range(50)))
    assert len({credential.secret for credential in got}) == 50
    await tokens.close()


@pytest.mark.parametrize("own", [False, True])
async def test_a_token_is_renewed_for_nobody_only_where_somebody_may_use_it(own: bool) -> None:
    mint = Mint()
    tokens = both(mint)[own]
    tokens.refresh()
    tokens.refresh()
    await asyncio.sleep(0)
    assert mint.made == (0 if own else 1)
    await tokens.close()
