"""Faults: what can go wrong with an engine, a caller or the machine, and what callers get then."""
