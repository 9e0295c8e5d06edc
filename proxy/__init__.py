"""A sidecar that logs ordinary Postgres clients in to Databricks Lakebase."""

__version__ = "0.1.0"
