"""What a check asks of a map in a catalogue: the map itself, and of each shard an admission.

For: the steps "catalogue" and "admission". Not for: the steps of every target (`check`).

Nothing is admitted: the shard is asked for a mapping that cannot exist. That it says so means that
the role may call it, in a database that is this shard.
"""

import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Final

from proxy.catalogue.admission import Admission, AdmissionRequest, Verdict, admit
from proxy.catalogue.model import Located, Mapping, Shard
from proxy.catalogue.shard_upstreams import target_name
from proxy.errors import ProxyError
from proxy.observe.metrics import Metrics
from proxy.server.catalogue_reading import ReadMap, reading_map
from proxy.server.snapshot import ConfigSnapshot
from proxy.transport.stream import StartupStream
from proxy.upstream.phases import DialPhases
from proxy.upstream.upstreams import Upstream
from proxy.verbs.check_report import Report, Step
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_0, StartupMessage

_CATALOGUE: Final = "catalogue"
_ADMISSION: Final = "admission"
_PROGRAM: Final = "lakebase-auth-proxy check"

CheckTarget = Callable[[str, Upstream], Awaitable[bool]]
"""Does the steps of every target. Returns whether all passed."""


async def check_map(
    snapshot: ConfigSnapshot, metrics: Metrics, report: Report, check_target: CheckTarget | None
) -> None:
    """Report whether the map can be read; with `check_target`, also the steps of each shard."""
    settings = snapshot.settings
    where, seconds_max = settings.catalogue.target, settings.upstream.connect_timeout_seconds
    report.begin(_CATALOGUE, where, seconds_max)
    began = time.perf_counter()
    try:
        async with reading_map(snapshot, metrics) as read:
            shards = await read.reader.shards(read.map.map_id)
            text = _described(read, len(shards))
            report.end(Step(_CATALOGUE, where, True, time.perf_counter() - began, text))
            for shard in shards if check_target is not None else ():
                await _check_shard(read, shard, report, check_target)
    except ProxyError as error:
        report.end(failed_step(_CATALOGUE, where, error, time.perf_counter() - began))


async def _check_shard(
    read: ReadMap, shard: Shard, report: Report, check_target: CheckTarget | None
) -> None:
    assert check_target is not None
    name = target_name(read.map.name, shard)
    began = time.perf_counter()
    try:
        upstream = await read.shards.of(shard)
    except ProxyError as error:
        report.begin(_ADMISSION, name, 0)
        report.end(failed_step(_ADMISSION, name, error, time.perf_counter() - began))
        return
    if not await check_target(name, upstream):
        return
    report.begin(_ADMISSION, name, upstream.settings.connect_timeout_seconds)
    began = time.perf_counter()
    try:
        text = await _ask(read, shard, upstream)
    except ProxyError as error:
        report.end(failed_step(_ADMISSION, name, error, time.perf_counter() - began))
    else:
        report.end(Step(_ADMISSION, name, True, time.perf_counter() - began, text))


async def _ask(read: ReadMap, shard: Shard, upstream: Upstream) -> str:
    """Return what a shard says of a mapping that cannot exist. Raises ProxyError."""
    mapping = Mapping(uuid.uuid4(), read.map.map_id, shard.shard_id, b"", None)
    request = AdmissionRequest(Located(mapping, shard), b"", _PROGRAM)
    answers: list[Admission] = []

    async def ask(stream: StartupStream, _ticket: Secret | None) -> None:
        answers.append(await admit(stream, request))

    message = StartupMessage(V3_0, ((b"user", _PROGRAM.encode()),))
    session = await upstream.open(message, DialPhases(), admit=ask)
    session.stream.transport.close()
    if answers[-1].verdict is not Verdict.MAPPING_MISSING:
        raise answers[-1].refusal(target_name(read.map.name, shard))
    return f"may be called, as shard {shard.name} of {read.map.name}"


def _described(read: ReadMap, shards: int) -> str:
    found = read.map
    return (
        f"shard map {found.name}, {found.spec.kind} of {found.spec.key_type}, version "
        f"{found.version}, {shards} shards"
    )


def failed_step(name: str, target: str, error: ProxyError, seconds: float) -> Step:
    """Return a step that failed with this error."""
    response = error.response()
    texts = (response.message, error.detail)
    text = ": ".join(dict.fromkeys(filter(None, texts)))  # PostgreSQL's own error is both
    fix = response.text(b"H")
    return Step(name, target, False, seconds, text, error.reason, response.sqlstate, fix)
