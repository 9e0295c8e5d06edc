"""The shard map that is kept in a Postgres database: the catalogue, for all proxies together.

Reading order, which is also the import order. What both sides have: errors, model, transactions,
schema, store, shard_store, bounds. The map in a proxy: packed_rows, mapping_table, table_builder,
cache, catalogue_reader, notifications, map_state, lookups, snapshot_file, map_source, feed,
snapshot_keeper, followed_map. Opening a session: shard_hosts, shard_upstreams, parking, admission,
admitting_opener. Changing the map: operation, op_log, mapping_rows, held_connection,
kept_connections, locks, fence, other_writers, copy_command, operation_steps, operations,
mapping_operations, mapping_status, reassign, move, split, merge, shard_status, shard_operations,
alter_shard, role_operations, file_operation. Where catalogue and shards differ: differences,
repair_plan, rebuild_plan, verify, plan_rows, planned_operation, repair, attach, detach, rebuild,
relocate, pending_elsewhere. All of them: operation_kinds.

Not for: the meaning of keys and bounds (`routing`), or dialling (`upstream`).

Invariant: nothing that was read from the catalogue is put into SQL or a log unchecked.
"""
