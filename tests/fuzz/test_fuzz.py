"""The corpus as it is, and a few seconds of its mutations; `make fuzz` runs more."""

import os
from random import Random

import pytest

from tests.fuzz.startup import CORPUS, SIDES, corpus, fuzz

# FUZZ_EXAMPLES is what `make fuzz` gives one Hypothesis test; an input here is far cheaper.
INPUTS = 10 * int(os.environ.get("FUZZ_EXAMPLES", "1500"))
KEPT = [(side, path.name) for side in SIDES for path in sorted((CORPUS / side).glob("*.bin"))]

# How each kept input ends, over many cuts. The first end is without a listener certificate;
# further ones are with one, where the client has said in plaintext what TLS would have to carry.
ENDS = {
    "client/w01_one_byte.bin": {"unfinished"},
    "client/w03_ssl_then_startup.bin": {"StartupReceived", "early_plaintext"},
    "client/w03_startup_then_query.bin": {"StartupReceived"},
    "client/w04_length_10000.bin": {"StartupReceived"},
    "client/w04_length_7.bin": {"startup_length"},
    # With a certificate the hello is TLS's; what is cut off it is then no packet here.
    "client/w05_client_hello.bin": {"direct_tls", "unfinished", "startup_length"},
    "client/w06_http.bin": {"http_request"},
    "client/w07_ssl_request.bin": {"EncryptionAnswered"},
    "client/w08_gss_ssl_startup.bin": {"StartupReceived", "early_plaintext"},
    "client/w09_code_5681.bin": {"unsupported_protocol"},
    "client/w09_ssl_twice.bin": {"unsupported_protocol", "early_plaintext"},
    "client/w10_version_2_0.bin": {"unsupported_protocol"},
    "client/w11_version_3_1.bin": {"StartupReceived"},
    "client/w11_version_3_2.bin": {"StartupReceived"},
    "client/w12_grease.bin": {"StartupReceived"},
    "client/w15_no_terminator.bin": {"startup_layout"},
    "client/w16_no_user.bin": {"user_missing"},
    "client/w17_replication.bin": {"StartupReceived"},
    "client/w17_replication_bad.bin": {"replication_value"},
    "client/w20_routing_key.bin": {"StartupReceived"},
    "client/w21_options.bin": {"StartupReceived"},
    "client/w38_cancel_3_0.bin": {"CancelReceived"},
    "client/w38_cancel_3_2.bin": {"CancelReceived"},
    "client/w38_cancel_after_ssl.bin": {"CancelReceived", "early_plaintext"},
    "client/w38_cancel_short_key.bin": {"invalid_cancel_request"},
    "client/w50_settings.bin": {"StartupReceived"},
    "upstream/w24_late_error.bin": {"UpstreamRefused"},
    "upstream/w24_login.bin": {"UpstreamReady"},
    "upstream/w25_unknown_message.bin": {"UpstreamReady"},
    "upstream/w26_no_key.bin": {"UpstreamReady"},
    "upstream/w27_long_key.bin": {"UpstreamReady"},
    "upstream/w28_md5.bin": {"UnsupportedAuthentication"},
    "upstream/w28_password_only.bin": {"PasswordRequested"},
    "upstream/w28_password_then_error.bin": {"UpstreamRefused"},
    "upstream/w28_password_twice.bin": {"UnsupportedAuthentication"},
    "upstream/w28_scram.bin": {"UpstreamReady"},
    "upstream/w28_scram_final.bin": {"SASLFinished"},
    "upstream/w28_scram_first.bin": {"SASLRequested"},
    "upstream/w28_scram_second.bin": {"SASLContinued"},
    "upstream/w29_gateway_error.bin": {"UpstreamRefused"},
    "upstream/w30_early_notice.bin": {"PasswordRequested"},
    "upstream/w30_negotiation.bin": {"TLSAccepted"},
    "upstream/w30_negotiation_3_2.bin": {"UpstreamViolation"},
    "upstream/w52_error.bin": {"UpstreamViolation"},
    "upstream/w52_only_s.bin": {"TLSAccepted"},
    "upstream/w52_refused.bin": {"TLSRefused"},
    "upstream/w53_error_without_code.bin": {"UpstreamRefused"},
    "upstream/w53_error_without_end.bin": {"UpstreamViolation"},
    "upstream/w53_key_too_short.bin": {"UpstreamViolation"},
    "upstream/w53_length_3.bin": {"UpstreamViolation"},
}

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
def test_a_kept_input_ends_as_it_should_in_many_cuts(side: str, name: str) -> None:
    stream = (CORPUS / side / name).read_bytes()
    ends = {SIDES[side](Random(seed), stream) for seed in range(50)}
    assert ends == ENDS[f"{side}/{name}"]


def test_each_end_in_the_table_is_that_of_a_kept_input() -> None:
    assert sorted(ENDS) == sorted(f"{side}/{name}" for side, name in KEPT)


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
