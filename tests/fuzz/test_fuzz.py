"""The corpus as it is, and a few seconds of its mutations; `make fuzz` runs more."""

import os
from random import Random

import pytest

from tests.fuzz.startup import CORPUS, SIDES, corpus, fuzz

# FUZZ_EXAMPLES is what `make fuzz` gives one Hypothesis test; an input here is far cheaper.
INPUTS = 10 * int(os.environ.get("FUZZ_EXAMPLES", "1500"))
KEPT = [(side, path.name) for side in SIDES for path in sorted((CORPUS / side).glob("*.bin"))]

# Ends that the corpus must keep within the fuzzer's reach, else it tests less than it seems to.
REACHED = {
    "client": {
        "CancelReceived",
        "EncryptionAnswered",
        "StartupReceived",
        "http_request",
        "direct_tls",
        "invalid_cancel_request",
        "replication_value",
        "startup_layout",
        "startup_length",
        "unfinished",
        "unsupported_protocol",
        "user_missing",
    },
    "upstream": {
        "PasswordRequested",
        "SASLContinued",
        "SASLFinished",
        "SASLRequested",
        "TLSAccepted",
        "TLSRefused",
        "UnsupportedAuthentication",
        "UpstreamReady",
        "UpstreamRefused",
        "UpstreamViolation",
    },
}


@pytest.mark.parametrize(("side", "name"), KEPT)
def test_a_kept_input_keeps_the_promise_in_many_cuts(side: str, name: str) -> None:
    stream = (CORPUS / side / name).read_bytes()
    ends = {SIDES[side](Random(seed), stream) for seed in range(50)}
    assert ends


@pytest.mark.slow
@pytest.mark.parametrize("side", sorted(SIDES))
def test_mutations_keep_the_promise_and_reach_every_end(side: str) -> None:
    ends = fuzz(side, INPUTS, seed=1)
    assert ends.total() == INPUTS
    assert set(ends) >= REACHED[side]


@pytest.mark.parametrize("side", sorted(SIDES))
def test_a_seed_replays(side: str) -> None:
    assert fuzz(side, 300, seed=7) == fuzz(side, 300, seed=7)
    assert fuzz(side, 300, seed=7) != fuzz(side, 300, seed=8)


@pytest.mark.parametrize("side", sorted(SIDES))
def test_the_corpus_is_there_and_small(side: str) -> None:
    assert len(corpus(side)) >= 15
    assert sum(map(len, corpus(side))) < 64 * 1024
