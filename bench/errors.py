"""What keeps a benchmark from running, in words for the person who started it."""


class BenchError(Exception):
    """Something is missing, or a program that is measured did not do its part."""
