from typing import Protocol

from proxy.native.activity import Activity
from proxy.native.tls import TLSConnection

class Owner(Protocol):
    def overflow(self, rest: bytes) -> None: ...
    def lane_ended(self, error: Exception | None) -> None: ...

class Lanes:
    def __len__(self) -> int: ...
    def fileno(self) -> int: ...
    def run_ready(self) -> None: ...
    def close(self) -> None: ...

class Lane:
    carried_bytes: int
    paused: bool
    def __init__(
        self,
        lanes: Lanes,
        source: int,
        sink: int,
        *,
        source_tls: TLSConnection | None,
        sink_tls: TLSConnection | None,
        activity: Activity,
        from_upstream: bool,
        owner: Owner,
        paused: bool,
    ) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...
