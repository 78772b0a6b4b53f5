"""Translation: other APIs in terms of chat completions. A face reads requests into chat bodies and writes answers."""
