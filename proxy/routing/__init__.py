"""Which shard a session belongs to, as pure functions.

Input: a StartupMessage and the configuration. Output: a target, or an error. There is no I/O, no
clock and no log, so a `Router` can be called from any thread. Reading order, which is also the
import order: keys, shard_map, map_rows, map_builder, key_sources, router.
"""
