"""Store: own the database of keys, prompts, usage and stored responses, and its migrations."""
