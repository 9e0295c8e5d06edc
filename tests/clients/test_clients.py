"""Every client does the same directly and through the proxy, and its pool outlives what happens."""

import faulthandler
import subprocess
from collections.abc import Callable, Iterator, Sequence

import pytest
import uvloop

from tests.clients.harness import Outcome, build, run
from tests.clients.record import record, recorded
from tests.clients.registry import CHECKS, Client, Language, languages, missing
from tests.support.proxy_process import run_to_end
from tests.support.tools import lack

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

Selected = tuple[Language, Client]
Outcomes = Callable[[Client], Outcome | None]
TRIED = [(language, client) for language in languages() for client in language.tried]
# Whole languages run together, as long as they have no more clients: it saves the waiting, and
# each client opens twenty connections both ways.
TOGETHER_MAX = 13
TEST = "test_a_client_does_the_same_through_the_proxy"


def name_of(language: Language, client: Client) -> str:
    return f"{language.name}-{client.name}"


async def lacks(client: Client) -> str:
    if found := missing(client):
        return found
    if client.installed and (await run_to_end(*client.installed))[0]:
        return "its driver is missing"
    return ""


def batches(selected: Sequence[Selected]) -> Iterator[list[Selected]]:
    """Yield what runs together."""
    batch: list[Selected] = []
    for language in languages():
        more = [(one, client) for one, client in selected if one is language]
        if batch and len(batch) + len(more) > TOGETHER_MAX:
            yield batch
            batch = []
        batch += more
    yield batch


def run_together(batch: Sequence[Selected]) -> dict[Client, Outcome]:
    there = [(language, one) for language, one in batch if not uvloop.run(lacks(one))]
    wrong = {}  # a language that cannot be built must not keep the others from running
    for language in {language.name: language for language, _ in there}.values():
        try:
            build(language)
        except subprocess.SubprocessError as error:
            wrong[language.name] = f"it cannot be built: {error}"
    built = [(language, one) for language, one in there if language.name not in wrong]
    outcomes = uvloop.run(run(built)) if built else {}
    for language, one in there:
        if language.name in wrong:
            outcomes[one] = Outcome(one, failures=[wrong[language.name]])
    return outcomes


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """Return what runs the selected clients of a batch at the first of their tests."""
    ids = {item.name for item in request.session.items}
    waiting = list(batches([one for one in TRIED if f"{TEST}[{name_of(*one)}]" in ids]))
    done: dict[Client, Outcome] = {}

    def of(client: Client) -> Outcome | None:
        for batch in waiting:
            if any(client is one for _, one in batch):
                faulthandler.cancel_dump_traceback_later()  # each of its waits has a bound
                waiting.remove(batch)
                done.update(run_together(batch))
                break
        return done.get(client)

    return of


@pytest.mark.parametrize(("language", "client"), TRIED, ids=[name_of(*one) for one in TRIED])
def test_a_client_does_the_same_through_the_proxy(
    language: Language, client: Client, outcomes: Outcomes
) -> None:
    found = outcomes(client)
    if found is None:
        lack(f"{client.name} ({language.name})", [uvloop.run(lacks(client))])
        return
    assert found.failures == []
    assert found.cells.keys() == CHECKS.keys()
    record(language.folder, client.name, found.version, found.cells)
    # A refusal without its hint or SQLSTATE, and a "cannot", are cells as well.
    assert found.cells == recorded(language.folder)[client.name]["cells"], "run `make clients`"
