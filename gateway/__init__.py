"""Put an OpenAI-compatible endpoint in front of one or several inference engines."""

__version__ = "0.1.0"
