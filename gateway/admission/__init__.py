"""Admission: decide which request is next at an engine. The queue is in memory that workers share, or in PostgreSQL."""
