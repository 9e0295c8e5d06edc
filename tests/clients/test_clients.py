"""Every client does the same directly and through the proxy, and its pool outlives what happens."""

import faulthandler
from collections.abc import Callable, Sequence

import pytest
import uvloop

from tests.clients.harness import Outcome, build, run
from tests.clients.record import record
from tests.clients.registry import CHECKS, Client, Language, languages, missing
from tests.support.proxy_process import run_to_end
from tests.support.tools import lack

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

Outcomes = Callable[[Language], dict[str, Outcome]]
TRIED = [(language, client) for language in languages() for client in language.tried]


async def lacks(client: Client) -> str:
    if found := missing(client):
        return found
    if client.installed and (await run_to_end(*client.installed))[0]:
        return "its driver is missing"
    return ""


def run_all(clients: Sequence[Client], language: Language) -> dict[str, Outcome]:
    there = [client for client in clients if not uvloop.run(lacks(client))]
    if not there:
        return {}
    build(language)
    return uvloop.run(run(language, there))


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """Return what runs all selected clients of a language at the first of their tests."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    params = [item.callspec.params for item in items if hasattr(item, "callspec")]
    selected = [one["client"] for one in params if "client" in one]
    done: dict[str, dict[str, Outcome]] = {}

    def of(language: Language) -> dict[str, Outcome]:
        if language.name not in done:
            faulthandler.cancel_dump_traceback_later()  # each of its waits has a bound
            done[language.name] = run_all(
                [client for client in language.tried if client in selected], language
            )
        return done[language.name]

    return of


@pytest.mark.parametrize(
    ("language", "client"), TRIED, ids=[f"{one.name}-{client.name}" for one, client in TRIED]
)
def test_a_client_does_the_same_through_the_proxy(
    language: Language, client: Client, outcomes: Outcomes
) -> None:
    found = outcomes(language).get(client.name)
    if found is None:
        lack(f"{client.name} ({language.name})", [uvloop.run(lacks(client))])
        return
    assert found.failures == []
    assert found.cells.keys() == CHECKS.keys()
    record(language.folder, client.name, found.version, found.cells)
