"""Cancel keys: what a client is given, and which session a CancelRequest means (W14, W26, W27)."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from proxy.session.cancel import CancelKeys, ForwardSlots
from proxy.upstream.address_lookup import Target
from proxy.wire.messages import BackendKeyData
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_0, V3_2, CancelRequest, ProtocolVersion

TARGET = Target("ep-one.example.com", "", 5432, "verify-full", "system")
OTHER_TARGET = Target("ep-two.example.com", "", 5432, "verify-full", "system")
UPSTREAM = BackendKeyData(4711, Secret(b"key1"))


class Dice:
    """Fixed randomness: pids in order, and secrets of one repeated byte."""

    def __init__(self, *pids: int) -> None:
        self._pids = iter(pids)
        self.asked_bits: list[int] = []
        self.asked_bytes: list[int] = []

    def bits(self, count: int) -> int:
        self.asked_bits.append(count)
        return next(self._pids)

    def bytes(self, count: int) -> bytes:
        self.asked_bytes.append(count)
        return b"r" * count


def request(key: BackendKeyData) -> CancelRequest:
    return CancelRequest(key.pid, key.key)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def issue(
    stack: ExitStack,
    keys: CancelKeys,
    upstream: BackendKeyData,
    target: Target = TARGET,
    version: ProtocolVersion = V3_0,
) -> BackendKeyData:
    """Register a key until the test ends. Return what its client is sent."""
    held = stack.enter_context(keys.issue(upstream, target, version))
    assert held is not None
    return held.issued


@pytest.mark.parametrize("version", [V3_0, V3_2], ids=str)
def test_w27_the_upstreams_key_is_passed_through_unchanged(version: ProtocolVersion) -> None:
    keys = CancelKeys()
    with keys.issue(UPSTREAM, TARGET, version) as held:
        assert held is not None
        assert held.issued == UPSTREAM
        found = keys.find(request(UPSTREAM))
        assert found is held
        assert (found.issued, found.target, found.upstream) == (UPSTREAM, TARGET, UPSTREAM)


def test_w26_without_a_key_from_upstream_the_client_gets_none() -> None:
    keys = CancelKeys()
    with keys.issue(None, TARGET, V3_0) as held:
        assert held is None
        assert len(keys) == 0


@pytest.mark.parametrize("pid", [0, -1, -(2**31)])
def test_w27_a_pid_that_is_not_positive_is_replaced(pid: int) -> None:
    upstream = BackendKeyData(pid, Secret(b"key1"))
    dice = Dice(815)
    keys = CancelKeys(dice.bits, dice.bytes)
    with keys.issue(upstream, TARGET, V3_0) as held:
        assert held is not None
        assert held.issued == BackendKeyData(815, Secret(b"rrrr"))
        found = keys.find(request(held.issued))
        assert found is not None
        assert found.upstream == upstream
        assert keys.find(request(upstream)) is None


def test_an_own_pid_is_positive_of_31_bits_and_free(stack: ExitStack) -> None:
    dice = Dice(0, 7, 7, 0, 8)
    keys = CancelKeys(dice.bits, dice.bytes)
    negative = BackendKeyData(-1, Secret(b"key1"))
    first = issue(stack, keys, negative)
    second = issue(stack, keys, negative)
    assert (first.pid, second.pid) == (7, 8)
    assert set(dice.asked_bits) == {31}


def test_w14_an_own_key_has_32_bytes_for_a_client_that_speaks_3_2(stack: ExitStack) -> None:
    dice = Dice(1, 2)
    keys = CancelKeys(dice.bits, dice.bytes)
    negative = BackendKeyData(-1, Secret(b"key1"))
    old = issue(stack, keys, negative)
    new = issue(stack, keys, negative, version=V3_2)
    assert (len(old.key), len(new.key)) == (4, 32)


def test_w27_a_pair_that_a_live_session_holds_is_replaced(stack: ExitStack) -> None:
    dice = Dice(815)
    keys = CancelKeys(dice.bits, dice.bytes)
    first = issue(stack, keys, UPSTREAM)
    second = issue(stack, keys, UPSTREAM, OTHER_TARGET)
    assert first == UPSTREAM
    assert second == BackendKeyData(815, Secret(b"rrrr"))
    found = keys.find(request(second))
    assert found is not None
    assert (found.target, found.upstream) == (OTHER_TARGET, UPSTREAM)


def test_two_sessions_may_hold_one_pid_with_different_keys(stack: ExitStack) -> None:
    # Two shards count their processes each for itself.
    keys = CancelKeys()
    twin = BackendKeyData(UPSTREAM.pid, Secret(b"key2"))
    assert issue(stack, keys, UPSTREAM) == UPSTREAM
    assert issue(stack, keys, twin, OTHER_TARGET) == twin
    for key, target in ((UPSTREAM, TARGET), (twin, OTHER_TARGET)):
        found = keys.find(request(key))
        assert found is not None
        assert found.target == target
    assert len(keys) == 2


def test_a_key_is_forgotten_with_its_session_and_only_with_it(stack: ExitStack) -> None:
    keys = CancelKeys()
    twin = BackendKeyData(UPSTREAM.pid, Secret(b"key2"))
    with keys.issue(UPSTREAM, TARGET, V3_0), keys.issue(twin, TARGET, V3_0):
        pass
    assert len(keys) == 0
    assert keys.find(request(UPSTREAM)) is None
    with keys.issue(UPSTREAM, TARGET, V3_0):
        with keys.issue(twin, TARGET, V3_0):
            pass
        assert keys.find(request(UPSTREAM)) is not None
        assert keys.find(request(twin)) is None


def test_a_session_that_fails_forgets_its_key_too() -> None:
    keys = CancelKeys()
    with pytest.raises(RuntimeError), keys.issue(UPSTREAM, TARGET, V3_0):
        raise RuntimeError
    assert len(keys) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        CancelRequest(4711, Secret(b"key2")),
        CancelRequest(4711, Secret(b"key")),
        CancelRequest(4711, Secret(b"key1\0")),
        CancelRequest(4711, Secret(b"k" * 256)),
        CancelRequest(4712, Secret(b"key1")),
        CancelRequest(-4711, Secret(b"key1")),
    ],
    ids=["other key", "shorter", "longer", "longest", "other pid", "negative pid"],
)
def test_a_wrong_pid_or_key_finds_nothing(wrong: CancelRequest) -> None:
    keys = CancelKeys()
    with keys.issue(UPSTREAM, TARGET, V3_0):
        assert keys.find(wrong) is None


def test_w40_what_is_held_tells_whether_its_session_lives() -> None:
    keys = CancelKeys()
    with keys.issue(UPSTREAM, TARGET, V3_0) as held:
        assert held is not None
        assert held.live
    assert not held.live


# Keys of sessions that serve several clients


class Secrets:
    """Secrets in order, each repeated to the size that is asked for."""

    def __init__(self, *texts: bytes) -> None:
        self._texts = iter(texts)

    def bytes(self, count: int) -> bytes:
        text = next(self._texts)
        return (text * count)[:count]


@pytest.mark.parametrize(("version", "size"), [(V3_0, 4), (V3_2, 32)], ids=str)
def test_p30_each_client_of_a_pooled_session_gets_the_pid_and_a_secret_of_its_own(
    version: ProtocolVersion, size: int
) -> None:
    keys = CancelKeys()
    issued: list[BackendKeyData] = []
    for _ in range(3):
        with keys.issue(UPSTREAM, TARGET, version, own_secret=True) as held:
            assert held is not None
            assert keys.find(request(held.issued)) is held
            assert held.upstream == UPSTREAM
            assert keys.find(request(UPSTREAM)) is None
            # The key of a client that has gone reaches no other one.
            assert [keys.find(request(one)) for one in issued] == [None] * len(issued)
            issued.append(held.issued)
    assert {(one.pid, len(one.key)) for one in issued} == {(UPSTREAM.pid, size)}
    assert len({one.key.reveal() for one in issued} | {UPSTREAM.key.reveal()}) == 4


def test_p30_an_own_secret_is_neither_the_upstreams_nor_one_that_is_in_use(
    stack: ExitStack,
) -> None:
    secrets = Secrets(b"key1", b"aaaa", b"aaaa", b"key1", b"bbbb")
    keys = CancelKeys(random_bytes=secrets.bytes)
    first, second = (
        stack.enter_context(keys.issue(UPSTREAM, target, V3_0, own_secret=True))
        for target in (TARGET, OTHER_TARGET)
    )
    assert first is not None
    assert second is not None
    assert first.issued == BackendKeyData(UPSTREAM.pid, Secret(b"aaaa"))
    assert second.issued == BackendKeyData(UPSTREAM.pid, Secret(b"bbbb"))
    assert keys.find(request(first.issued)) is first
    assert keys.find(request(second.issued)) is second


def test_p30_a_pid_that_is_not_positive_is_replaced_here_too() -> None:
    keys = CancelKeys(Dice(815).bits, Secrets(b"r").bytes)
    upstream = BackendKeyData(-1, Secret(b"key1"))
    with keys.issue(upstream, TARGET, V3_0, own_secret=True) as held:
        assert held is not None
        assert held.issued == BackendKeyData(815, Secret(b"rrrr"))
    with keys.issue(None, TARGET, V3_0, own_secret=True) as none:
        assert none is None


def test_p17_p31_a_cancel_marks_its_session_while_that_lives_and_is_dropped_after_it() -> None:
    keys = CancelKeys()
    with keys.issue(UPSTREAM, TARGET, V3_0, own_secret=True) as cancelled:
        assert cancelled is not None
        marks = [cancelled.forwarded, cancelled.record_forward(), cancelled.forwarded]
        assert marks == [False, True, True]
    with keys.issue(UPSTREAM, TARGET, V3_0, own_secret=True) as ended:
        assert ended is not None
    assert not ended.record_forward()
    assert not ended.forwarded
    assert cancelled.forwarded


def test_real_randomness_makes_different_keys(stack: ExitStack) -> None:
    keys = CancelKeys()
    negative = BackendKeyData(-1, Secret(b"key1"))
    issued = [issue(stack, keys, negative, version=V3_2) for _ in range(100)]
    assert len({key.pid for key in issued}) == 100
    assert len({key.key for key in issued}) == 100


# -- slots -----------------------------------------------------------------------------------------


class Slots:
    """Slots, and tasks that hold one each until they are told to release it."""

    def __init__(self, slots_max: int) -> None:
        self.slots = ForwardSlots(slots_max)
        self.holding: list[str] = []
        self._release: dict[str, asyncio.Event] = {}

    async def start(self, name: str, *, first: bool = False) -> asyncio.Task[None]:
        self._release[name] = asyncio.Event()
        task = asyncio.create_task(self._hold(name, first))
        await asyncio.sleep(0)
        return task

    async def release(self, name: str) -> None:
        self._release[name].set()
        for _ in range(4):
            await asyncio.sleep(0)

    async def _hold(self, name: str, first: bool) -> None:
        async with self.slots.slot(first=first):
            self.holding.append(name)
            await self._release[name].wait()
            self.holding.remove(name)


async def test_w42_those_that_wait_get_a_slot_in_order_and_clients_own_come_first() -> None:
    made = Slots(1)
    tasks = [await made.start("one"), await made.start("gone 1"), await made.start("gone 2")]
    tasks += [await made.start("own 1", first=True), await made.start("own 2", first=True)]
    order = ["one", "own 1", "own 2", "gone 1", "gone 2"]
    for name in order:
        assert made.holding == [name]
        await made.release(name)
    await asyncio.gather(*tasks)
    assert made.holding == []


@pytest.mark.parametrize("first", [True, False])
async def test_w42_one_that_gives_up_takes_no_slot(first: bool) -> None:
    made = Slots(1)
    one = await made.start("one")
    impatient, patient = await made.start("x", first=first), await made.start("patient")
    impatient.cancel()
    await made.release("one")
    assert made.holding == ["patient"]
    await made.release("patient")
    await asyncio.wait([one, impatient, patient])
    assert not (await made.start("next")).done()
    assert made.holding == ["next"]
    await made.release("next")


async def test_w42_a_slot_that_is_given_to_one_that_gives_up_goes_to_the_next() -> None:
    made = Slots(1)
    one, impatient, patient = [await made.start(name) for name in ("one", "impatient", "patient")]
    made._release["one"].set()
    await asyncio.sleep(0)  # `one` goes on, and gives its slot away
    impatient.cancel()
    await asyncio.wait([impatient])
    await made.release("one")
    assert made.holding == ["patient"]
    await made.release("patient")
    await asyncio.gather(one, patient)
