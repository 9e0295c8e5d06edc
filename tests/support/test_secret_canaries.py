"""The search for secrets finds each canary, and nothing where there is none."""

import base64
import re
import sys
from pathlib import Path

import pytest

from proxy.emulator.lakebase import CLIENT_SECRET
from proxy.emulator.tokens import Purpose, TokenIssuer
from proxy.observe.admin import serve_admin
from proxy.wire.secret import Secret
from tests.support import secret_canaries
from tests.support.admin_address import ScriptedAdminState
from tests.support.proxy_process import ROOT, run_to_end

# Spelled so that the output of the inner run, which is searched as well, does not contain it.
SECRET = "'canary' + '-secret'"

LEAKS = {
    "a log line": f"logging.getLogger('x').warning('it is %s', {SECRET})",
    "a key of a log line": f"structlog.stdlib.get_logger('x').warning('said', value={SECRET})",
    "a logged exception": (
        "try:\n        try:\n            "
        f"raise KeyError({SECRET})\n        except KeyError as error:\n            "
        "raise ValueError('no') from error\n    except ValueError:\n        "
        "logging.getLogger('x').exception('it failed')"
    ),
    "standard output": f"print({SECRET})",
    "standard error": f"print({SECRET}, file=sys.stderr)",
    "what a client received": f"secret_canaries.look('a client', ({SECRET}).encode())",
    "a process": ("asyncio.run(run_to_end(sys.executable, '-c', \"print('canary' + '-secret')\"))"),
}


@pytest.mark.slow
async def test_a_leak_fails_the_test_that_it_happens_in_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").touch()
    bodies = [*LEAKS.values(), "logging.getLogger('x').warning('nothing of note')"]
    (tmp_path / "test_it.py").write_text(
        "import asyncio, logging, sys\nimport structlog\n"
        "from tests.support import secret_canaries\n"
        "from tests.support.proxy_process import run_to_end\n"
        "from proxy.observe.logs import configure_logging\n"
        + "".join(
            f"def test_{number}():\n    configure_logging()\n    {body}\n"
            for number, body in enumerate(bodies)
        )
    )
    # What was captured is not printed: here it would be found once more.
    plugins = ("-p", "tests.support.secret_canaries", "-p", "no:cacheprovider", "-p", "no:asyncio")
    command = ("-B", "-m", "pytest", "-q", "-rE", "--show-capture=no", *plugins)
    code, out, err = await run_to_end(
        sys.executable, *command, str(tmp_path), environment={"PYTHONPATH": str(ROOT)}
    )
    assert (code, err) == (pytest.ExitCode.TESTS_FAILED, "")
    assert out.count("a secret showed in: ") >= len(LEAKS)
    failed = re.findall(r"^ERROR .*::test_(\d+)", out, re.MULTILINE)
    assert [int(number) for number in failed] == list(range(len(LEAKS)))


def found(text: str | bytes) -> bool:
    """Look at the text, and forget what was found in it."""
    before = len(secret_canaries._found)
    secret_canaries.look("this very test", text)
    more = secret_canaries._found[before:]
    del secret_canaries._found[before:]
    return bool(more)


@pytest.mark.parametrize("identity", ["a", "ab", "abc"])  # base64 has three beginnings
def test_any_piece_of_a_token_is_found(identity: str) -> None:
    token = TokenIssuer("1", lambda: 1.5).issue(identity, Purpose.DATABASE, 60)
    assert found(token)
    assert found(token.encode())
    header, claims, _ = token.split(".")
    assert found(header)
    length, end = 48, 4  # the last four characters are no padding
    pad = range(len(claims) // 5, len(claims) - length - end)
    assert all(found(claims[start : start + length]) for start in pad)


@pytest.mark.parametrize("text", ['{"token": "********"}', "said token=********", "a ********!"])
def test_a_mask_in_a_log_line_is_found(text: str) -> None:
    assert found(text)


@pytest.mark.parametrize("client", ["a", "ab", "abc", "5ca1ab1e-0000"])
def test_a_secret_in_a_basic_login_is_found(client: str) -> None:
    assert found(base64.b64encode(f"{client}:{CLIENT_SECRET}".encode()))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "eyJ",
        "a real one",
        repr(Secret(b"x")),
        '# token = "********"',
        "reason=token_rejected jwk not found",
    ],
)
def test_nothing_is_found_where_nothing_is(text: str) -> None:
    assert not found(text)


async def test_a_secret_on_a_page_of_the_admin_address_is_found() -> None:
    class Leaking(ScriptedAdminState):
        def exposition(self) -> bytes:
            return b"a " + CLIENT_SECRET.encode()

    async with serve_admin(Leaking(), host="127.0.0.1", port=0) as address:
        assert found(await secret_canaries._page(address.host, address.port, "/metrics"))
        assert not found(await secret_canaries._page(address.host, address.port, "/liveness"))
