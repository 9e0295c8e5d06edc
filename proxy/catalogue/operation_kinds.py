"""Every kind of operation, by the word in its row."""

from collections.abc import Mapping
from typing import Final

from proxy.catalogue.alter_shard import AlterShard
from proxy.catalogue.attach import Attach
from proxy.catalogue.detach import Detach
from proxy.catalogue.file_operation import AddFile
from proxy.catalogue.mapping_operations import AddMapping, DeleteMapping
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.merge import Merge
from proxy.catalogue.move import Move
from proxy.catalogue.operation import Operation
from proxy.catalogue.reassign import Reassign
from proxy.catalogue.rebuild import Rebuild
from proxy.catalogue.relocate import Relocate
from proxy.catalogue.repair import Repair
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
        Attach,
        DeleteMapping,
        Detach,
        GrantSession,
        Merge,
        Move,
        Reassign,
        Rebuild,
        Relocate,
        RemoveShard,
        Repair,
        RevokeSession,
        Split,
        TakeOffline,
        TakeOnline,
        TakeShardOffline,
        TakeShardOnline,
    )
}
