"""Mutated inputs for everything that reads what a user wrote; ``python -m tests.fuzz --help``."""
