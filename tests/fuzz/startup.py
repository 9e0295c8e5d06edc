"""Mutates a kept corpus and feeds it to a startup machine: `python -m tests.fuzz.startup`.

The promise that is checked, for any bytes in any cut: events or the documented violation, never
another exception; no more held than the stated bound; the same events as for the uncut stream.
Deterministic: the same seed and number of inputs run the same inputs, and a failure shows its own.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Final

from proxy.wire.client_startup import (
    ClientEvent,
    ClientStartup,
    ClientState,
    DirectTLSReceived,
    StartupReceived,
    Violated,
)
from proxy.wire.options import settings, split_words, without
from proxy.wire.startup import FIRST_PACKET_BYTES_MAX, StartupMessage
from proxy.wire.upstream_message import upstream_message
from proxy.wire.upstream_startup import (
    HELD_BYTES_MAX,
    HELD_MESSAGE_BYTES_MAX,
    UpstreamEvent,
    UpstreamStartup,
    UpstreamState,
    UpstreamViolated,
)
from proxy.wire.violations import ClientViolation
from tests.support.cuts import at_offsets
from tests.wire.driving import shown

CORPUS: Final = Path(__file__).parent / "corpus"
INPUT_BYTES_MAX: Final = 4096  # mutation may double an input each time; a start is far shorter
FLOOD_EVERY: Final = 2000  # one input in so many is blown up to reach the bounds
FLOOD_BYTES: Final = HELD_BYTES_MAX + HELD_MESSAGE_BYTES_MAX
TELLING_BYTES: Final = b"\0\1\2\3\4\x08\x10\x16\x27\x7f\x80\xd2\xff =-\\_\tcRKSZENvpAIUqod"
TELLING_WORDS: Final = [
    *(number.to_bytes(4, "big") for number in (0, 3, 4, 5, 7, 8, 12, 264, 9999, 10000, 10001)),
    *(number.to_bytes(4, "big") for number in (65540, 65541, 2**31 - 1, 2**31, 2**32 - 1)),
    *(bytes.fromhex(code) for code in ("04d2162e", "04d2162f", "04d21630", "00030002", "0003270f")),
    *(
        b"user\0",
        b"options\0",
        b"_pq_.",
        b"replication\0",
        b" -c a=b",
        b"\\ ",
        b"SFATAL\0",
        b"\0\0",
    ),
]


def corpus(side: str) -> list[bytes]:
    """Return the kept inputs of a side, in a stable order."""
    return [path.read_bytes() for path in sorted((CORPUS / side).glob("*.bin"))]


def mutate(random: Random, kept: list[bytes]) -> bytes:
    """Return a kept input, changed in one to four places."""
    found = bytearray(random.choice(kept))
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(found))
        until = min(len(found), at + random.randint(0, 24))
        match random.randrange(8):
            case 0:
                found[at:until] = b""
            case 1:
                found[at:at] = found[at:until]
            case 2:
                found[at : at + 1] = bytes([random.choice(TELLING_BYTES)])
            case 3:
                found[at : at + 1] = bytes([random.randrange(256)])
            case 4:
                word = random.choice(TELLING_WORDS)
                found[at : at + random.choice((0, len(word)))] = word
            case 5:
                found[at:] = random.choice(kept)[random.randint(0, 40) :]
            case 6:
                found[:at] = random.choice(kept)
            case _:
                del found[at:]
    return bytes(found[:INPUT_BYTES_MAX])


def with_length(random: Random, packet: bytes) -> bytes:
    """Return a first packet, or one after an SSLRequest, with its true length."""
    at = random.choice((0, 0, 0, 8))
    return packet[:at] + max(0, len(packet) - at).to_bytes(4, "big") + packet[at + 4 :]


def with_lengths(random: Random, stream: bytes, kept: list[bytes]) -> bytes:
    """Cut a kept upstream's stream into messages, mutate some, and frame them all anew."""
    messages: list[tuple[bytes, bytes]] = []
    rest = random.choice(kept)[1:]
    while len(rest) >= 5:
        end = max(5, 1 + int.from_bytes(rest[1:5], "big"))
        messages.append((rest[:1], rest[5:end]))
        rest = rest[end:]
    messages.insert(random.randint(0, len(messages)), (stream[1:2] or b"A", stream[6:]))
    if random.random() < 0.5:
        messages.insert(random.randint(0, len(messages)), random.choice(messages))
    if random.random() < 0.5:
        messages.pop(random.randrange(len(messages)))
    if random.random() < 1 / FLOOD_EVERY:
        notice = (b"N", b"M" + b"x" * random.randint(1, HELD_MESSAGE_BYTES_MAX) + b"\0\0")
        at = random.randint(0, len(messages))
        messages[at:at] = [notice] * (FLOOD_BYTES // len(notice[1]))
    frames = (kind + (len(body) + 4).to_bytes(4, "big") + body for kind, body in messages)
    return b"S" + b"".join(frames)


def cut(random: Random, stream: bytes) -> Iterator[bytes]:
    """Cut the stream: whole, in a few pieces, or byte by byte."""
    match random.randrange(8):
        case 0:
            offsets = list(range(1, min(len(stream), 400)))
        case 1 | 2:
            offsets = []
        case _:
            offsets = [random.randint(0, len(stream)) for _ in range(random.randint(1, 4))]
    return at_offsets(stream, offsets)


def fuzz_client(random: Random, stream: bytes) -> str:
    """Feed one input to a client's machine; return how it ended."""
    tls_offered = random.random() < 0.3
    machine = ClientStartup(tls_offered=tls_offered)
    events: list[ClientEvent] = []
    for chunk in cut(random, stream):
        events += machine.receive_data(chunk)
        assert machine.state is not ClientState.AWAIT_STARTUP or (
            len(machine._buffer) < FIRST_PACKET_BYTES_MAX
        ), "held too much"
        assert len(machine._buffer) <= len(stream), "held more than was sent"
        if machine.state is ClientState.AWAIT_TLS:  # as an owner does, at once
            machine.tls_started()
    if not tls_offered:
        assert shown(events) == shown(ClientStartup().receive_data(stream)), "the cut mattered"
    for event in events:
        if isinstance(event, StartupReceived):
            use_startup(event.message)
    ends = [event for event in events if isinstance(event, Violated)]
    assert ends == events[len(events) - len(ends) :], "a violation was not the last event"
    machine.receive_eof()
    match events:
        case [*_, Violated(violation)]:
            return str(violation.reason)
        case [*_, DirectTLSReceived()] | []:
            return "unfinished"
        case _:
            return type(events[-1]).__name__


def use_startup(message: StartupMessage) -> None:
    """Do with a StartupMessage what a session does with it."""
    options = message.get(b"options") or b""
    assert len(b"".join(word.text for word in split_words(options))) <= len(options)
    assert b"key" not in [setting.name.lower() for setting in settings(without(options, [b"key"]))]
    try:
        upstream = upstream_message(message, message.get(b"user") or b"", b"main")
    except ClientViolation:
        return
    assert len(upstream.encode()) < FIRST_PACKET_BYTES_MAX, "too long for the upstream"


def run_upstream(chunks: Iterator[bytes]) -> tuple[UpstreamStartup, list[UpstreamEvent], bytes]:
    """Feed chunks as a dialer does: one byte, TLS, all else until it is ready."""
    machine = UpstreamStartup()
    events: list[UpstreamEvent] = []
    relayed = b""
    for chunk in chunks:
        if machine.state is UpstreamState.READY:
            relayed += chunk
            continue
        events += machine.receive_data(chunk)
        if machine.state is UpstreamState.AWAIT_TLS:
            machine.tls_started()
        parts = {id(part): part for part in (machine._before_key, machine._held)}
        held = sum(len(raw) for part in parts.values() for raw in part)
        assert held <= HELD_BYTES_MAX, "held too much"
        if machine.state in (UpstreamState.AWAIT_AUTHENTICATION, UpstreamState.AWAIT_READY):
            assert len(machine._reader._buffer) < HELD_MESSAGE_BYTES_MAX + 5, "buffered too much"
    return machine, events, relayed


def fuzz_upstream(random: Random, stream: bytes) -> str:
    """Feed one input to an upstream's machine; return how it ended."""
    reply, rest = stream[:1], stream[1:]
    machine, events, relayed = run_upstream(iter([reply, *cut(random, rest)]))
    whole, expected, _ = run_upstream(iter([reply, rest]))
    assert shown(events) == shown(expected), "the cut mattered"
    if machine.state is UpstreamState.READY:
        assert machine.welcome(machine.key) == whole.welcome(whole.key), "the cut mattered"
        assert machine.trailing_data() + relayed == whole.trailing_data(), "bytes were lost"
        assert machine.welcome(machine.key)[-6:-1] == b"Z\0\0\0\5", "no ReadyForQuery at the end"
    machine.receive_eof()
    match events:
        case [*_, UpstreamViolated(violation)]:
            return type(violation).__name__
        case []:
            return "unfinished"
        case _:
            return type(events[-1]).__name__


SIDES: Final[dict[str, Callable[[Random, bytes], str]]] = {
    "client": fuzz_client,
    "upstream": fuzz_upstream,
}


def fuzz(side: str, inputs: int, seed: int) -> Counter[str]:
    """Run so many inputs; return how often each end was reached. Raises with the failing input."""
    random, kept, ends = Random(seed), corpus(side), Counter[str]()
    for number in range(inputs):
        stream = mutate(random, kept)
        if random.random() < 0.6:
            repaired = with_length(random, stream)
            stream = repaired if side == "client" else with_lengths(random, stream, kept)
        if number % FLOOD_EVERY == FLOOD_EVERY - 1:
            stream += stream[-random.randint(1, 200) :] * (FLOOD_BYTES // max(1, len(stream)))
        try:
            ends[SIDES[side](random, stream)] += 1
        except Exception as error:
            text = f"{side}, seed {seed}, input {number}: {stream[:5000].hex()}"
            raise AssertionError(text) from error
    return ends


def main() -> None:
    """Run from the command line and print seed, count, speed and how the inputs ended."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.startup")
    parser.add_argument("--side", choices=sorted(SIDES), required=True)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    begun = time.perf_counter()
    ends = fuzz(asked.side, asked.inputs, asked.seed)
    rate = asked.inputs / (time.perf_counter() - begun)
    sys.stdout.write(
        f"{asked.side}: seed {asked.seed}, {asked.inputs} inputs, {rate:.0f} a second\n"
    )
    for end, count in ends.most_common():
        sys.stdout.write(f"  {count:9} {end}\n")


if __name__ == "__main__":
    main()
