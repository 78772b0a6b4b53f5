#!/usr/bin/env python3
"""Exit 0 if llama.cpp has loaded its model: only then it answers 200 here. Anything else raises, so the status is 1."""

import urllib.request

urllib.request.urlopen("http://127.0.0.1:8080/health", timeout=3)
