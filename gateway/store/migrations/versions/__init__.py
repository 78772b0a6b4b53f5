"""The migrations of the store, in the order of their numbers.

No migration has the number 0005. It was left out by mistake. Databases remember numbers, so the others keep theirs.
"""
