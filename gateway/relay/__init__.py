"""Relay: one answer, from its first byte to its last, whatever number of engines it takes."""
