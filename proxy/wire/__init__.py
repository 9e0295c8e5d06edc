"""The Postgres protocol, sans-IO: bytes in, typed events and bytes to send out.

No module here uses a socket, a clock or a log. Reading order, which is also the import order:
secret, violations, messages, startup, options, framing, activity, client_startup,
upstream_message, upstream_startup, simple_query.

Reference: PostgreSQL documentation, chapter "Frontend/Backend Protocol".
"""
