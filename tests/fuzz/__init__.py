"""A seeded mutation fuzzer for the startup machines, and its corpus of kept inputs."""
