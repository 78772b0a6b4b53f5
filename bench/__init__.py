"""Benchmarks: what the gateway costs beside nginx and beside the engine alone. They import nothing of the gateway."""
