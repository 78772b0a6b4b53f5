"""Prompts: put the operator's text before a caller's, and refuse a caller's text that an engine could take for it."""
