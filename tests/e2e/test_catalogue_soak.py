"""Twenty seconds of a catalogue's map under constant change; `make soak` does it for minutes."""

import random
from pathlib import Path

import pytest

from tests.soak.catalogue import run
from tests.support.catalogue import Stores

SECONDS = 20.0

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


async def test_no_session_lives_where_its_key_is_not_served(stores: Stores, tmp_path: Path) -> None:
    outcome = await run(stores, tmp_path, SECONDS, random.randrange(2**32))
    assert outcome.wrong == [], str(outcome)  # with the seed
    assert outcome.counts["verbs: online"], str(outcome)
    assert outcome.counts["sessions ended"], str(outcome)
