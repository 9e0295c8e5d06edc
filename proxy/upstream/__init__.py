"""Reaching Postgres: address, credential, connect, TLS, login, and what went wrong.

Reading order, which is also the import order: diagnosis, missing_databases, password_file, phases,
retry, scram; address_lookup; name_lookup; connector; login; dialer; upstreams.
"""
