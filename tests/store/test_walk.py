"""A newcomer's walk: a key from the command to its end, with what the documentation shows and nothing else."""

from pathlib import Path

import openai
import pytest

from tests.support.command import Command
from tests.support.processes import MESSAGES, FakeEngine, GatewayProcess, running_gateway, wait_for


def ask(gateway: GatewayProcess, key: str) -> int:
    """The status that OpenAI's own client gets for a question."""
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key=key, max_retries=0) as client:
        try:
            client.chat.completions.create(model="fake-model", messages=MESSAGES)  # type: ignore[arg-type]
        except openai.APIStatusError as exc:
            return exc.status_code
    return 200


def test_a_key_from_its_making_to_its_end(engine: FakeEngine, tmp_path: Path) -> None:
    settings = {"STACK_DATA_DIR": str(tmp_path / "data")}
    stack = Command(**settings)
    with running_gateway(tmp_path / "log", engine.url, **settings) as gateway:
        made = stack.json("keys", "create", "billing", "--owner", "Ann", "--requests-per-minute", "3")
        key_id, first = made["key"]["id"], made["secret"]

        assert [ask(gateway, first) for _ in range(3)] == [200] * 3
        with (
            openai.OpenAI(base_url=gateway.url + "/v1", api_key=first, max_retries=0) as client,
            pytest.raises(openai.RateLimitError) as caught,
        ):
            client.chat.completions.create(model="fake-model", messages=MESSAGES)  # type: ignore[arg-type]
        assert caught.value.code == "rate_limit_exceeded"
        assert float(caught.value.response.headers["retry-after"]) > 0

        def used() -> list[tuple[str, int, int]]:
            rows = stack.json("usage", "--by", "key", "--key", key_id)
            return [(it["name"], it["tokens_in"], it["tokens_out"]) for it in rows]

        wait_for(lambda: used() == [("billing", 3 * 7, 3 * 3)], message=str(used()))
        assert "billing" in stack("usage")

        stack("limits", key_id, "--requests-per-minute", "1000")
        second = stack.json("keys", "rotate", key_id, "--grace", "1h")["secret"]
        wait_for(lambda: ask(gateway, second) == 200, deadline=5)
        wait_for(lambda: ask(gateway, first) == 200, deadline=5)  # each worker hears of the new limit by itself

        stack("keys", "disable", key_id)
        for key in (first, second):
            wait_for(lambda it=key: ask(gateway, it) == 401, deadline=5)  # type: ignore[misc]
