"""Views: every page that the console's process makes, by name."""

import logging
from collections.abc import Callable

from starlette.responses import Response

from gateway.console.ask import Ask
from gateway.console.keys import KeyPages
from gateway.console.now import NowPages
from gateway.console.pages import Pages
from gateway.console.requests import RequestPages
from gateway.console.usage import UsagePages
from gateway.errors import BUG, InternalError, StackError, forget

log = logging.getLogger("stack")

View = Callable[[Ask], Response]


class Views:
    """Make pages. Any thread may do so."""

    def __init__(self, now: NowPages, keys: KeyPages, usage: UsagePages, requests: RequestPages, pages: Pages) -> None:
        self._pages = pages
        self._all: dict[str, View] = {
            "now": now.show,
            "now.json": now.json,
            "usage": usage.show,
            "usage.csv": usage.csv,
            "own": usage.own,
            "own.csv": usage.own_csv,
            "keys": keys.listing,
            "keys.create": keys.create,
            "keys.new": keys.new,
            "key": keys.show,
            "key.change": keys.change,
            "key.switch": keys.switch,
            "key.rotate": keys.rotate,
            "key.delete": keys.delete,
            "key.prompt": keys.use_prompt,
            "key.capture": keys.capture,
            "limits": keys.limits,
            "limits.set": keys.set_limits,
            "prompts": keys.prompts,
            "prompts.set": keys.set_prompt,
            "requests": requests.listing,
            "request": requests.show,
            "try": lambda ask: pages.page("try", ask.visitor, models=ask.live["models"]),
        }

    def make(self, name: str, ask: Ask) -> Response:
        """Return that page; or what is wrong, on a page."""
        try:
            return self._all[name](ask)
        except StackError as exc:
            return self._failed(ask, exc)
        except Exception:
            log.exception("a bug in the console")
            return self._failed(ask, InternalError(BUG))

    def _failed(self, ask: Ask, error: StackError) -> Response:
        forget(error)
        return self._pages.page("error", ask.visitor, error.status, error=error)
