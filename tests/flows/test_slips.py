"""A slip in the base URL of a client of Responses or Messages is told the right path, in the form that the client
reads. tests/flows/test_edges.py has the other paths."""

from tests.support.processes import GatewayProcess

SINGLE, BEFORE = "in a single /v1", "end before /v1"
RESPONSES = {
    "POST /responses": "/v1/responses",
    "POST /v1/v1/responses": "/v1/responses",
    "POST /v1//responses": "/v1/responses",
    "POST /v1/responses/": "/v1/responses",
    "POST /v1/responses/responses": "/v1/responses",
    "POST /v1/chat/completions/responses": "/v1/responses",
    "POST /api/v1/responses": "/v1/responses",
    "POST /responses/input_tokens": "/v1/responses/input_tokens",
    "GET /responses/resp_1": "/v1/responses/resp_1",
    "DELETE /v1/v1/responses/resp_1": "/v1/responses/resp_1",
    "GET /v1/v1/responses/resp_1/input_items": "/v1/responses/resp_1/input_items",
}
# Most clients of Anthropic's API add /v1 to the base URL themselves. Vercel's does not.
MESSAGES = {
    "POST /messages": ("/v1/messages", SINGLE),
    "POST /messages/count_tokens": ("/v1/messages/count_tokens", SINGLE),
    "POST /v1/v1/messages": ("/v1/messages", BEFORE),
    "POST /v1//messages": ("/v1/messages", BEFORE),
    "POST //v1/messages": ("/v1/messages", BEFORE),
    "POST /v1/messages/": ("/v1/messages", BEFORE),
    "POST /anthropic/v1/messages": ("/v1/messages", BEFORE),
    "POST /api/v1/messages": ("/v1/messages", BEFORE),
    "POST /v1/v1/messages/count_tokens": ("/v1/messages/count_tokens", BEFORE),
}


def test_a_slip_in_the_base_url_of_a_responses_client_names_the_right_path(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        for slip, path in RESPONSES.items():
            method, wrong = slip.split()
            answer = client.request(method, gateway.url + wrong)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "not_found"), slip
            assert f"Did you mean {path}?" in error["message"], slip
            assert SINGLE in error["message"], slip


def test_a_slip_in_the_base_url_of_a_messages_client_is_told_in_anthropics_form(gateway: GatewayProcess) -> None:
    """Vercel's client shows any other form as a bare "Not Found"."""
    with gateway.client() as client:
        for slip, (path, advice) in MESSAGES.items():
            method, wrong = slip.split()
            answer = client.request(method, gateway.url + wrong)
            told = answer.json()
            assert (answer.status_code, told["type"], told["error"]["type"]) == (404, "error", "not_found_error"), slip
            assert answer.headers["request-id"] == told["request_id"] == answer.headers["x-request-id"]
            assert f"Did you mean {path}?" in told["error"]["message"], slip
            assert advice in told["error"]["message"], slip
        other = client.post("/v1/threads/thread_1/messages").json()
    assert other["error"]["code"] == "not_found"  # a path of OpenAI's Assistants
