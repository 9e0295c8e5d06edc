"""One client connection from accept to close.

Reading order, which is also the import order: cancel, relay, live, session, listener.
"""
