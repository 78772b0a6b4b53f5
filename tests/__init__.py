"""The tests. They run in the same environment, whatever the shell that starts them has set."""

import os
import time

# What the stack, and the programs and libraries in it, read from the environment. scripts/test hands a few names on.
READ_BY_THE_STACK = (
    "STACK_", "LLM_", "LLAMA_", "COMPOSE_", "OLLAMA_", "VLLM_", "HF_", "PROVISION_", "ENGINE", "OTEL_", "MONITORING",
    "PROMETHEUS_", "ALERTMANAGER_", "GRAFANA_", "TLS", "CADDY_", "CHAT",
)  # fmt: skip
READ_BY_LIBRARIES = (
    "GUNICORN_", "UVICORN_", "FORWARDED_ALLOW_IPS", "WEB_CONCURRENCY", "PG", "OPENAI_", "ANTHROPIC_",
    "LC_", "LANG", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PYTHONPATH", "PYTHONHASHSEED", "PYTHONOPTIMIZE",
    "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE", "PYTHONUTF8", "PYTHONIOENCODING", "MAKE", "MFLAGS", "BASH_ENV", "ENV",
    "CDPATH",
)  # fmt: skip
FOR_THE_TESTS = ("OLLAMA_IMAGE", "VLLM_IMAGE")


def forget_the_shell() -> None:
    """Keep only what the machine needs in this process's environment: paths, proxies, certificates."""
    for name in set(os.environ) - set(FOR_THE_TESTS):
        if name.startswith(READ_BY_THE_STACK + READ_BY_LIBRARIES):
            del os.environ[name]
    os.environ |= {"LC_ALL": "C.UTF-8", "TZ": "UTC"}
    time.tzset()
    os.umask(0o022)
    for name in ("no_proxy", "NO_PROXY"):  # a proxy is for what is beyond this machine
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))


forget_the_shell()
