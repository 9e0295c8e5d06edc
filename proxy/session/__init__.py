"""One client connection from accept to close.

Reading order, which is also the import order: leftovers, ending, cancel, direction, relay, live,
session, listener.
"""
