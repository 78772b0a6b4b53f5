"""Keys: decide who calls: the form of keys, their storage, and authentication."""
