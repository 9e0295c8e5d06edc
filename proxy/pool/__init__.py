"""Upstream sessions that serve several clients, one after the other.

For: what wraps the dialer of a target that pools. Not for: opening a session (`upstream`), or
serving a client (`session`), which does not know whether its session is fresh.
"""
