"""Responses: keep finished responses of the Responses API in the store, for the keys that made them."""
