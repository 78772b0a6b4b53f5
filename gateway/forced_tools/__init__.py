"""Forced tools: make an answer obey `tool_choice`, `parallel_tool_calls` and `strict` if its engine does not."""
