"""The client's own wish for a pool: what it may ask for, and what stays of its message."""

import pytest

from proxy.config import PoolMode
from proxy.errors import ErrorKind, ProxyError
from proxy.pool.pool_mode import take_pool_mode
from proxy.wire.startup import V3_0, StartupMessage

USER = (b"user", b"app")


def startup(*pairs: tuple[bytes, bytes]) -> StartupMessage:
    return StartupMessage(V3_0, (USER, *pairs))


def options(text: bytes) -> StartupMessage:
    return startup((b"options", text))


def test_p2_without_a_wish_the_mode_is_the_targets() -> None:
    for message in (
        startup(),
        options(b"-c  lakebase.pools=off  -cx=1"),
        options(b"-B -clakebase.pool=off"),
        startup((b"lakebase_pool", b"off")),
    ):
        mode, rest = take_pool_mode(message, "session")
        assert mode == "session"
        assert rest is message


@pytest.mark.parametrize("wish", ["off", "session"])
@pytest.mark.parametrize(
    ("given", "rest"),
    [
        (startup((b"lakebase.pool", b"%s")), startup()),
        (startup((b"Lakebase.POOL", b"%s"), (b"x.y", b"z")), startup((b"x.y", b"z"))),
        (options(b"-c lakebase.pool=%s"), startup()),
        (options(b"-clakebase.pool=%s"), startup()),
        (options(b"--LAKEBASE.pool=%s"), startup()),
        (options(b"-ec lakebase.pool=%s"), options(b"-e")),
        (options(rb"-c lake\base.pool=%s"), startup()),
        (options(rb"-c a.b=\ %% -c lakebase.pool=%s --c=d"), options(rb"-c a.b=\ % --c=d")),
        (options(b"-c lakebase.pool=%s -c lakebase.pool=%s"), startup()),
        (startup((b"options", b"-c x=1"), (b"lakebase.pool", b"%s")), options(b"-c x=1")),
    ],
)
def test_p2_a_wish_is_taken_out_wherever_it_stands(
    given: StartupMessage, rest: StartupMessage, wish: PoolMode
) -> None:
    def with_wish(text: bytes) -> bytes:
        return text.replace(b"%s", wish.encode()).replace(b"%%", b"%")

    pairs = tuple((name, with_wish(value)) for name, value in given.parameters)
    message = StartupMessage(V3_0, pairs)
    assert take_pool_mode(message, "session") == (wish, rest)


def test_p2_the_word_may_be_in_any_case_and_several_may_agree() -> None:
    message = startup((b"options", b"-c lakebase.pool=OFF"), (b"lakebase.pool", b"Off"))
    assert take_pool_mode(message, "session") == ("off", startup())


@pytest.mark.parametrize(
    ("mode", "message", "allowed"),
    [
        ("session", startup((b"lakebase.pool", b"transaction")), "off, session"),
        ("session", startup((b"lakebase.pool", b"")), "off, session"),
        ("session", startup((b"lakebase.pool", b"on")), "off, session"),
        ("session", startup((b"lakebase.pool", b"session ")), "off, session"),
        ("session", startup((b"lakebase.pool", b"\xff")), "off, session"),
        ("session", options(b"-c lakebase.pool=off --lakebase.pool=session"), "off, session"),
        ("off", startup((b"lakebase.pool", b"session")), "off"),
    ],
)
def test_p2_more_than_the_targets_mode_or_another_word_is_refused(
    mode: PoolMode, message: StartupMessage, allowed: str
) -> None:
    with pytest.raises(ProxyError) as caught:
        take_pool_mode(message, mode)
    assert caught.value.kind is ErrorKind.POOL_MODE_INVALID
    error = caught.value.response()
    assert error.sqlstate == "22023"
    assert error.text(b"D") == f"reason=pool_mode_invalid allowed: {allowed}"
