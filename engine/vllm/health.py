#!/usr/bin/env python3
"""Healthy once the model is loaded: only then does vLLM answer 200 here. Anything else raises, so status 1."""

import urllib.request

urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=4)
