"""An embedded Lakebase for demo and tests.

Files import in this order only: cluster, tokens, certificates, faults, endpoints, api, workspace,
streams, front, scram, login, arrival, backend, connection, gateway, lakebase. Read lakebase first.
"""
