"""One serving process: built, started, reloaded, drained.

Reading order, which is also the import order: lifecycle, map_service, router_factory, snapshot,
file_limit, catalogue_service, metric_labels, catalogue_maps, app, serving, catalogue_reading,
first_tokens, process.
"""
