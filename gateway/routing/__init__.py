"""Routing: decide which engine may answer, and in which order engines are asked."""
