"""The shard map that is kept in a Postgres database: the catalogue, for all proxies together.

`model` has the rows, `schema` the two schemas and their migrations, `store` reads the catalogue,
`shard_store` reads and writes what a shard knows of itself. Not for: the meaning of keys and bounds
(`routing`), or dialling (`upstream`).

Invariant: nothing that was read from the catalogue is put into SQL or a log unchecked.
"""
