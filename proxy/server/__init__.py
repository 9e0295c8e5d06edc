"""One serving process: built, started, reloaded, drained.

Reading order, which is also the import order: lifecycle, router_factory, snapshot, app,
first_tokens, process.
"""
