"""One client connection, from accept to close.

Reading order, which is also the import order: memory_trim, end_reason, slots, listen_sockets,
cancel, direction, fast_path, relay, drain, starting_client, session_log, session_trace,
private_listener, session, listener.
"""
