"""A TCP, unix or TLS connection, for either side. asyncio begins here.

Nothing here knows the Postgres protocol. Reading order, which is also the import order:
sockets, key_exchange, tls, graceful_close, stream.
"""
