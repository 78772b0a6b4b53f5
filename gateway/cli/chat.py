"""Ask the gateway on this machine, and print the answer as it arrives: `python -m gateway.cli.chat "question"`.

In the container it needs no settings, because it reads the gateway's own. `make chat` runs it there.
"""

import argparse
import asyncio
import os
import signal
import sys
import threading

from gateway.addresses import split_address
from gateway.cli.output import written
from gateway.config import load as load_config
from gateway.llm import LLM, LLMConfig, LLMError
from gateway.settings import SettingsError, load


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gateway.cli.chat", description="Ask the gateway a question.")
    parser.add_argument("question", nargs="+", help="the question; several words are joined")
    parser.add_argument("--model", help="a name from /v1/models (default: the gateway's)")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input ends")
    args = parser.parse_args()
    if args.until_eof:
        threading.Thread(target=_end_with_input, daemon=True).start()
    with written():
        _ask(" ".join(args.question), args.model)


def _end_with_input() -> None:
    """End this process, and with it the request, at the end of standard input: the caller has gone."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGINT)


def _ask(question: str, model: str | None) -> None:
    try:
        settings = load()
        port = split_address(settings.stack_bind)[1]
        config = LLMConfig(
            f"http://127.0.0.1:{port}/v1",
            model or load_config(settings).default_model,
            settings.llm_timeout,
            settings.accepted_keys()[0],
        )
        with LLM(config) as llm:
            asyncio.run(_print_answer(llm, question))
    except (LLMError, SettingsError) as exc:
        sys.exit(str(exc))


async def _print_answer(llm: LLM, question: str) -> None:
    async for chunk in llm.astream([{"role": "user", "content": question}]):
        for choice in chunk.get("choices", ()):
            print(choice.get("delta", {}).get("content") or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
