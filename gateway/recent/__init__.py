"""Recent: what happened in the last minutes, in memory that all workers share."""
