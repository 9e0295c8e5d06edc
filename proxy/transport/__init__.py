"""TCP, unix socket and TLS connections, for clients and upstreams alike.

This is the lowest package that uses asyncio. No module here knows the Postgres protocol. Reading
order, which is also the import order:
sockets, key_exchange, tls, self_signed, graceful_close, stream.
"""
