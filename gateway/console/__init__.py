"""Console: the pages at /console, for operators and for the owners of keys."""
