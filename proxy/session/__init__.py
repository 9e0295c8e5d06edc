"""One client connection from accept to close.

Reading order, which is also the import order: leftovers, cancel, relay, live, session,
listener.
"""
