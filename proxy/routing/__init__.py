"""Pure policy: which shard.

From a StartupMessage and the configuration to a target, or a refusal. No I/O, no clock, no log:
whoever holds a `Router` may call it anywhere. Reading order, which is also the import order:
keys, shard_map, map_rows, map_builder, key_sources, router.
"""
