"""The Lakebase emulator, for demo and tests.

It emulates the workspace API and the gateway in front of real PostgreSQL. Files import in this
order only: server_account, cluster, tokens, certificates, faults, endpoints, resources, api,
held_port, workspace, streams, gateway_state, scram, login, first_packet, backend, session,
connection, gateway, lakebase. Read lakebase first.
"""
