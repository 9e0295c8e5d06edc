"""What operators see: logs, metrics, and the admin address with health, status and metrics.

Words that label a metric belong to the code that produces them, and are passed in as closed lists.

Invariant: no secret is shown.
"""
