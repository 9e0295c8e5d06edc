"""Logging: structlog configured once for the process, for our lines and those of libraries.

For: one format on one stream, the connection's id in each of its lines, and a last check that masks
what looks like a secret. Not for: keeping secrets out of the log in the first place; that is done
by `Secret`, and by not logging them.

Invariant: every line goes through `mask`. Tracebacks show no local variables.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache, partial
from types import NoneType
from typing import Any, Final, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor

from proxy.observe.log_writer import LogWriter
from proxy.wire.secret import MASK

Logger = structlog.stdlib.BoundLogger

# If a key ends in one of these words, as client_secret or access_token do, its value is masked.
# Numbers are not: they are no secrets. (`tokens` and `token_age_seconds` do not end in one.)
_SECRET_WORDS: Final = frozenset({"token", "password", "secret", "authorization", "credential"})

# What secrets look like: a JWT, complete or truncated; Databricks' personal access tokens and OAuth
# secrets; anything after an authorization scheme.
_SECRET_TEXT: Final = re.compile(
    r"\beyJ[\w-]{5,}(?:\.[\w-]*)*"
    r"|\b(?:dapi|dose|dkea)[0-9a-f]{16,}(?:-\d+)?"
    r"|(?<=\bBearer )[\w.~+/=-]+"
    r"|(?<=\bBasic )[\w.~+/=-]{8,}",
    re.ASCII,
)

# Every match contains one of these. A search for them is 25 times as fast, and few lines have one.
_SECRET_PIECES: Final = ("eyJ", "dapi", "dose", "dkea", "Bearer ", "Basic ")

_NAMES_MAX: Final = 1024  # keys whose result is cached; there are some dozens

_NUMBERS: Final = (int, float, NoneType)
_FLAT: Final = (str, *_NUMBERS)
# What a line consists of that is made later, and what must be made at once.
_PLAIN: Final = frozenset((str, int, float, bool, NoneType))
_NOT_LATER: Final = frozenset(("exc_info", "stack_info"))
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "exception": logging.ERROR,
    "critical": logging.CRITICAL,
}

# What each line of a task has, if it was set there. Those of structlog's own `contextvars` are
# looked for among all variables, for each line.
_TaskField = int | str | None
_worker: Final = ContextVar[_TaskField]("worker", default=None)
_connection: Final = ContextVar[_TaskField]("connection", default=None)

# How many levels of nested values are searched for keys; deeper ones are only masked as text.
_NESTING_MAX: Final = 5

# What a person reads first, and last.
_FIRST_KEYS: Final = ("worker", "connection")
_LAST_KEYS: Final = ("reason", "detail", "hint")


def mask(text: str) -> str:
    """Return `text` with `MASK` in place of everything that looks like a secret."""
    for piece in _SECRET_PIECES:
        if piece in text:
            return _SECRET_TEXT.sub(MASK, text)
    return text


@lru_cache(maxsize=_NAMES_MAX)
def _is_secret_name(name: object) -> bool:
    return isinstance(name, str) and re.split(r"[_\-. ]", name.lower())[-1] in _SECRET_WORDS


@lru_cache(maxsize=_NAMES_MAX)
def _has_secret_name(names: tuple[str, ...]) -> bool:
    return any(map(_is_secret_name, names))


def _without_secrets(value: object, depth: int = _NESTING_MAX) -> object:
    """Return `value` with the values of secret keys masked, at each level of mappings."""
    if depth == 0 or isinstance(value, _FLAT):
        return value
    if isinstance(value, Mapping):
        return {
            name: MASK
            if _is_secret_name(name) and not isinstance(inner, _NUMBERS)
            else _without_secrets(inner, depth - 1)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_secrets(inner, depth - 1) for inner in value]
    return value


def redact(logger: object, method_name: str, event: EventDict) -> EventDict:
    """Mask the values of keys that are named like a secret; a structlog processor."""
    if _is_plain(event) and not _has_secret_name(tuple(event)):  # nearly every line
        return event
    return cast(EventDict, _without_secrets(event))


def _is_plain(event: Mapping[str, object]) -> bool:
    return _PLAIN.issuperset(map(type, event.values()))


def _task_fields(worker: _TaskField, connection: _TaskField) -> dict[str, int | str]:
    """Return the fields of a line that say which task it is of, as far as that is known."""
    fields = {"worker": worker, "connection": connection}
    return {name: value for name, value in fields.items() if value is not None}


def _add_task_fields(logger: object, method_name: str, event: EventDict) -> EventDict:
    """Add them to a line; a structlog processor."""
    return {**_task_fields(_worker.get(), _connection.get()), **event}


def _complete(logger: logging.Logger, method_name: str, event: EventDict) -> EventDict:
    """Add what each line has; a structlog processor. One for each field takes twice the time."""
    event["level"] = "error" if method_name == "exception" else method_name
    event["logger"] = logger.name
    logged_at: datetime = event.get("timestamp") or datetime.now(UTC)
    event["timestamp"] = logged_at.isoformat().replace("+00:00", "Z")
    return event


class _MaskingFormatter(structlog.stdlib.ProcessorFormatter):
    """Renders a line and masks all of it: message, values and traceback."""

    def __init__(self, *, foreign: Sequence[Processor], render: Sequence[Processor]) -> None:
        super().__init__(
            foreign_pre_chain=foreign, processors=[self.remove_processors_meta, *render]
        )
        self._render = render

    def format(self, record: logging.LogRecord) -> str:
        method = getattr(record, "_name", None)  # set by `wrap_for_formatter`, on our lines
        if method is None or not isinstance(record.msg, dict):
            return mask(super().format(record))
        # Our lines are complete. What is added to a library's would double the time.
        return self.render(method, dict(record.msg))

    def render(self, method: str, line: Any) -> str:
        """Return a line of ours that is complete."""
        for processor in self._render:
            line = processor(None, method, line)
        return mask(str(line))


class _QueueHandler(logging.Handler):
    """Gives lines to the process's log writer, which never makes the caller wait."""

    formatter: _MaskingFormatter

    def handle(self, record: logging.LogRecord) -> bool:
        """Pass a record to `emit`, without the handler's lock: the writer has one.

        A finalizer may log while the writer's is held, and would wait for a thread that has the
        handler's and waits for the writer's.
        """
        is_logged = bool(self.filter(record))
        if is_logged:
            self.emit(record)
        return is_logged

    def emit(self, record: logging.LogRecord) -> None:
        _stderr.write(self._made(self.format, record))

    def write_later(self, logger: logging.Logger, method_name: str, event: EventDict) -> None:
        """Queue a line of plain values, which is made later."""
        event["timestamp"] = datetime.now(UTC)
        of_task = _worker.get(), _connection.get()
        _stderr.write(partial(self._made, self._rendered, logger, method_name, event, of_task))

    def _rendered(
        self,
        logger: logging.Logger,
        method_name: str,
        event: EventDict,
        of_task: tuple[_TaskField, _TaskField],
    ) -> str:
        event = _complete(logger, method_name, {**_task_fields(*of_task), **event})
        return self.formatter.render(method_name, redact(logger, method_name, event))

    @staticmethod
    def _made(make: Callable[..., str], *given: Any) -> bytes:
        try:
            line = make(*given)
        except Exception as error:  # a value that cannot be shown must not fail what is logged
            line = f"a log line could not be made: {type(error).__name__}"
        return (line + "\n").encode(errors="backslashreplace")


class _BoundLogger(structlog.stdlib.BoundLogger):
    """Leaves lines of plain values for standard error to the log writer, as they are.

    The writer makes many such lines at a time. Made one by one in the middle of sessions, they
    would displace the sessions' code in the CPU's caches, and be displaced by it.
    """

    def _proxy_to_logger(
        self, method_name: str, event: str | None = None, *event_args: str, **event_kw: Any
    ) -> Any:
        handlers = logging.root.handlers
        handler = handlers[0] if len(handlers) == 1 else None
        if not isinstance(handler, _QueueHandler) or event_args:
            return super()._proxy_to_logger(method_name, event, *event_args, **event_kw)
        logger: logging.Logger = self._logger
        if not logger.isEnabledFor(_LEVELS[method_name]):
            return None
        line = {**self._context, **event_kw, "event": event}
        if not _is_plain(line) or not _NOT_LATER.isdisjoint(line):
            return super()._proxy_to_logger(method_name, event, **event_kw)
        return handler.write_later(logger, method_name, line)


def _report_dropped(lines: int) -> None:
    event = "log lines were dropped: nothing took them, or they did not fit"
    get_logger(__name__).warning(event, lines=lines)


_STDERR: Final = 2
_stderr: Final = LogWriter(_STDERR, flows_again=_report_dropped)
os.register_at_fork(before=_stderr.before_fork, after_in_child=_stderr.start_over)


def log_lines_dropped() -> int:
    """Return how many lines of this process were dropped."""
    return _stderr.dropped


def flush_log() -> None:
    """Wait until the log is written, for a bounded time; after that it fails nothing any more."""
    _stderr.flush()
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except (OSError, ValueError):
        # Else what it holds makes the interpreter exit with 120.
        sys.stderr = None


def _handler_of(stream: TextIO | None) -> logging.Handler:
    """Return a handler for a stream; standard error is written by a thread of its own."""
    if stream is None:
        return logging.NullHandler()  # descriptor 2 was closed at the start, and may be a socket
    try:
        queued = stream.fileno() == _STDERR
    except OSError:  # it has no descriptor
        queued = False
    return _QueueHandler() if queued else logging.StreamHandler(stream)


def _renderer(
    console: bool, colors: bool, event_key: str = "event", level_key: str = "level"
) -> list[Processor]:
    if not console:
        keys = {"timestamp": "timestamp", "level": level_key, "event": event_key}

        def in_order(logger: object, method_name: str, event: EventDict) -> EventDict:
            """Return the line with its three fixed keys first, by their configured names."""
            fixed = {name: event.pop(key) for key, name in keys.items() if key in event}
            return {**fixed, **event, **fixed}  # again: another field may have such a name

        encode = json.JSONEncoder(default=repr).encode  # json.dumps makes an encoder for each line

        def to_json(logger: object, method_name: str, event: EventDict) -> str:
            return encode(event)

        return [structlog.processors.format_exc_info, in_order, to_json]
    # The default formatter of exceptions shows local variables, which may hold tokens.
    plain = structlog.dev.plain_traceback
    line = structlog.dev.ConsoleRenderer(
        colors=colors, exception_formatter=plain, sort_keys=False, pad_level=False
    )
    return [_for_people, line]


def _for_people(logger: object, method_name: str, event: EventDict) -> EventDict:
    """Return the line with local time and without the logger.

    Its keys are the connection, those of the event in their order in the code, and what explains.
    """
    at = datetime.fromisoformat(event.pop("timestamp")).astimezone()
    event.pop("logger", None)
    first, last = (
        {key: event.pop(key) for key in keys if key in event} for keys in (_FIRST_KEYS, _LAST_KEYS)
    )
    return {**first, **event, **last, "timestamp": f"{at:%H:%M:%S}"}


def is_for_people(format: Literal["auto", "console", "json"], stream: TextIO | None = None) -> bool:
    """Return whether the log has lines for people, and not JSON."""
    target = stream or sys.stderr
    terminal = target is not None and target.isatty()
    return format == "console" or (format == "auto" and terminal)


def _has_colors(stream: TextIO | None) -> bool:
    """Return whether lines for people have colours: on a terminal, unless a variable decides."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def configure_logging(
    *,
    format: Literal["auto", "console", "json"] = "auto",
    level: Literal["debug", "info", "warning", "error"] = "info",
    event_key: str = "event",
    level_key: str = "level",
    stream: TextIO | None = None,
) -> None:
    """Write the process's log to `stream`, by default standard error. May be called again.

    A JSON line begins with `timestamp`, the level and the event; `event_key` and `level_key` name
    the last two.

    `level` applies to the proxy's own lines. Libraries always log from `warning` upwards, because
    the SDK and urllib3 log complete requests at lower levels.
    """
    target = stream or sys.stderr
    foreign: list[Processor] = [
        _add_task_fields,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        redact,
    ]
    handler = _handler_of(target)
    formatter = _MaskingFormatter(
        foreign=foreign,
        render=_renderer(is_for_people(format, target), _has_colors(target), event_key, level_key),
    )
    handler.setFormatter(formatter)
    # None of them is shown.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # noqa: SLF001 - documented: no frame is looked for
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("proxy").setLevel(level.upper())
    # Its warnings are repeated by the failure of the call, which is logged with a connection's id.
    logging.getLogger("databricks").setLevel(logging.ERROR)
    # It shows a header that it cannot read, which may be a secret.
    logging.getLogger("opentelemetry.util.re").setLevel(logging.ERROR)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            _add_task_fields,
            _complete,
            redact,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=_BoundLogger,
        # A later call changes only the handler and the levels, not the loggers.
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> Logger:
    """Return the logger of a module. Events are words, facts are keys."""
    return structlog.stdlib.get_logger(name)


def worker_log(number: int) -> AbstractContextManager[None]:
    """Add `worker=<number>` to every line of the block, and of tasks that start in it.

    Do not nest them, as with `connection_log`.
    """
    return _SetTaskField(_worker, number)


def connection_log(connection_id: int | str) -> AbstractContextManager[None]:
    """Add `connection=<id>` to every line of the block, and of tasks that start in it.

    Do not nest them: the end of the inner block removes the id.
    """
    return _SetTaskField(_connection, connection_id)


class _SetTaskField:
    """Sets what each line of a task has, inside a block.

    It does not keep the value before: the token for it would be one more for each session.
    """

    __slots__ = ("_field", "_value")

    def __init__(self, field: ContextVar[_TaskField], value: int | str) -> None:
        self._field = field
        self._value = value

    def __enter__(self) -> None:
        self._field.set(self._value)

    def __exit__(self, *_: object) -> None:
        self._field.set(None)
