"""Upstream: know the engines: how they are asked, what they accept, and what their errors mean."""
