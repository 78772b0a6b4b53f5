"""Grammars: what may still come of an answer whose form is prescribed, once a part of it is there."""
