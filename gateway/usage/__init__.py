"""Usage: record what each request used, first in a journal and then as a row in the store."""
