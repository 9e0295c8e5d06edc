"""Measures the proxy beside PgBouncer and beside a direct TLS connection, in one run.

For: ratios that hold on the machine they were taken on. Not for: absolute numbers to quote, and
not for tests; nothing here passes or fails. What is compared is always measured in the same round,
one contender after the other, because a machine's speed drifts more than the contenders differ.
"""
