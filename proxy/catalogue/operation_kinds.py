"""Every kind of operation, by the word in its row."""

from collections.abc import Mapping
from typing import Final

from proxy.catalogue.alter_shard import AlterShard
from proxy.catalogue.file_operation import AddFile
from proxy.catalogue.mapping_operations import AddMapping, DeleteMapping
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.merge import Merge
from proxy.catalogue.move import Move
from proxy.catalogue.operation import Operation
from proxy.catalogue.reassign import Reassign
from proxy.catalogue.role_operations import GrantSession, RevokeSession
from proxy.catalogue.shard_operations import AddShard, RemoveShard
from proxy.catalogue.shard_status import TakeShardOffline, TakeShardOnline
from proxy.catalogue.split import Split

KINDS: Final[Mapping[str, type[Operation]]] = {
    kind.kind: kind
    for kind in (
        AddFile,
        AddMapping,
        AddShard,
        AlterShard,
        DeleteMapping,
        GrantSession,
        Merge,
        Move,
        Reassign,
        RemoveShard,
        RevokeSession,
        Split,
        TakeOffline,
        TakeOnline,
        TakeShardOffline,
        TakeShardOnline,
    )
}
