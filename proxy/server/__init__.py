"""One serving process: built, started, reloaded, drained.

Reading order, which is also the import order: lifecycle, router_factory, snapshot, file_limit, app,
first_tokens, process.
"""
