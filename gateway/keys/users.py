"""Users: which person a request is for, of the many that use one key through a front end such as Open WebUI.

The front end signs a JSON Web Token with a secret of the key (HS256). The name in it, `sub`, may be an e-mail address.
A pseudonym takes its place everywhere: a digest of the name and the key's id, so that no two keys share one.
"""

from collections.abc import Mapping
from dataclasses import replace

import jwt

from gateway import headers as names
from gateway.errors import InvalidUser
from gateway.keys.known import Key
from gateway.keys.secret import pseudonym

SKEW = 60  # seconds by which the clocks of the front end and the gateway may differ
LONGEST = 4096  # bytes of a token
NAME = 255  # characters of a user's name
_HEADER = "X-OpenWebUI-User-Jwt"
_ABSENT = (
    f"This key tells its users apart, so each request needs the header {_HEADER}: a JSON Web Token that names the user "
    "in 'sub', signed with the key's signing secret (HS256). In Open WebUI, set ENABLE_FORWARD_USER_INFO_HEADERS=true "
    "and FORWARD_USER_INFO_HEADER_JWT_SECRET."
)


def identified(key: Key, headers: Mapping[bytes, bytes]) -> Key:
    """Return the key with the user that the request is for. Without a signing secret it has none, whatever the headers
    say. Raises InvalidUser."""
    if key.signing is None:
        return key
    token = headers.get(names.USER)
    if token is None:
        raise InvalidUser(_ABSENT)
    return replace(key, user=pseudonym(key.id, _name(token, key.signing)))


def _name(token: bytes, secret: str) -> str:
    """Return the name in a token. Raises InvalidUser."""
    if len(token) > LONGEST:
        raise InvalidUser(f"The token in {_HEADER} is longer than {LONGEST} bytes. Sign a token with fewer claims.")
    try:
        # The algorithm is ours to choose, and not the token's.
        claims = jwt.decode(token, secret, ["HS256"], leeway=SKEW, options={"require": ["sub", "exp"]})
    except jwt.ExpiredSignatureError:
        raise InvalidUser(
            f"The token in {_HEADER} has expired. Sign a new one for each request, and compare the clocks of the front "
            "end and the gateway."
        ) from None
    except jwt.ImmatureSignatureError:
        raise InvalidUser(
            f"The token in {_HEADER} is from the future. Compare the clocks of the front end and the gateway."
        ) from None
    except jwt.InvalidSignatureError:
        raise InvalidUser(
            f"The token in {_HEADER} is not signed with the signing secret of this key. Give the front end that "
            "secret, or make a new one with `stack keys users`."
        ) from None
    except (jwt.InvalidTokenError, ValueError, TypeError, ArithmeticError, RecursionError) as exc:
        why = str(exc) if isinstance(exc, jwt.InvalidTokenError) else "it cannot be read"
        raise InvalidUser(
            f"The token in {_HEADER} is not valid: {why[:200]}. It must be a JSON Web Token with 'sub' and 'exp', "
            "signed with the key's signing secret (HS256)."
        ) from None
    name = claims["sub"]
    if not 0 < len(name) <= NAME:
        raise InvalidUser(f"'sub' of the token in {_HEADER} must have 1 to {NAME} characters.")
    return str(name)
