"""Dialects: one file for each engine, with everything in which that engine differs from the others.

A dialect is data, and the few functions that only this engine needs. Nothing here opens a connection.

Decision: the package is on the ground floor, beside `endpoints`. Because: the settings take an engine's default URL and
model from its file, and the settings are below `upstream`. Measured: nothing. It costs a Protocol: an engine's
functions ask an `asking.Engine`, and know no Upstream.
"""

from collections.abc import Mapping
from types import MappingProxyType

from gateway.dialects.dialect import Dialect
from gateway.dialects.llamacpp import LLAMACPP
from gateway.dialects.ollama import OLLAMA
from gateway.dialects.vllm import VLLM

# In the order of the columns in docs/parameters.md. The first is the default of LLM_BACKEND.
ALL = (OLLAMA, VLLM, LLAMACPP)

DIALECTS: Mapping[str, Dialect] = MappingProxyType({it.name: it for it in ALL})
