"""One client connection from accept to close.

Reading order, which is also the import order: memory_trim, end_reason, cancel, direction,
relay, drain, session, listener.
"""
