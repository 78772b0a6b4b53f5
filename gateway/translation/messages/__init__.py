"""Messages: Anthropic's API, `/v1/messages` and `/v1/messages/count_tokens`, as a face over chat completions.

`read` makes a chat body of a request, and its `writer` makes Anthropic's answer of a chat answer. `envelope` writes
errors, `headers` the headers that clients read, and `counted` the answer of count_tokens. `NAMES` has this API's name
of each field of a chat body.
"""

from gateway.translation.messages.envelope import counted, envelope, headers
from gateway.translation.messages.fields import NAMES
from gateway.translation.messages.reader import Asked, read
from gateway.translation.messages.writer import Writer

__all__ = ["NAMES", "Asked", "Writer", "counted", "envelope", "headers", "read"]
