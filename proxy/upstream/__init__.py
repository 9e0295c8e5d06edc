"""Everything about reaching Lakebase: as whom, with what, where, and what went wrong.

Reading order, which is also the import order: diagnosis, retry, scram; resources,
shared, threads; workspace; credentials, targets; connector; dialer.
"""
