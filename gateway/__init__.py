"""The gateway: an OpenAI-compatible endpoint in front of one inference engine."""

__version__ = "0.1.0"
