"""The error that ends a benchmark run, with a text for the person who started it."""


class BenchError(Exception):
    """Something is missing, or a measured program failed."""
