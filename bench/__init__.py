"""Measures the proxy beside PgBouncer and beside a direct TLS connection, in one run.

For: ratios, which hold on the machine they were measured on. Not for: absolute numbers to quote,
and not for tests; nothing here passes or fails. Systems that are compared are measured in the same
round, one directly after the other, because a machine's speed drifts more than the systems differ.
"""
