"""An embedded Lakebase for demo and tests.

Files import in this order only: cluster, tokens, certificates, faults, endpoints, api, workspace,
streams, gateway_state, scram, login, first_packet, backend, connection, gateway, lakebase. Read
lakebase first.
"""
