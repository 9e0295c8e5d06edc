"""Databricks: tokens, hosts and identities from the workspace API. The only importer of its SDK.

Reading order, which is also the import order: sdk_import, http_adapter, login_variables;
credential, listing, resources, single_flight, sdk_http; login_settings, outage; sdk_client,
sdk_errors; client, freshness; minter, token_source; registry.
"""
