"""Keys: the pages on which an operator finds, makes, changes, rotates and disables keys, and manages prompts."""

import re
from contextlib import suppress
from dataclasses import asdict
from typing import Any
from urllib.parse import urlencode

from starlette.responses import Response

from gateway.console import forms
from gateway.console.ask import Ask
from gateway.console.door import PATH
from gateway.console.forms import Form
from gateway.console.pages import Pages, redirect
from gateway.errors import BadRequest, GatewayBusy, NotFound, StackError
from gateway.keys.book import Keybook
from gateway.keys.configured import defaults
from gateway.keys.entries import Entry, KeyFields, NewKeyFields
from gateway.keys.limit_fields import LimitFields
from gateway.limits.rules import quotas_used
from gateway.prompts.book import Promptbook, Template, Use
from gateway.recent.captures import Captures
from gateway.settings import Settings
from gateway.shared_memory import BusyError
from gateway.usage.rows import UsageBook

PAGE = 50  # keys or prompts on a page
CHOICES = 200  # prompts in the list from which a key's prompt is chosen; if there are more, the name is typed
DAY = 86_400  # seconds
GRACES = {"0": "at once", "3600": "after an hour", "86400": "after a day", "604800": "after a week"}
_CURSOR = re.compile(r"(-?[0-9]{1,18})\.([0-9A-Za-z]{1,16})")  # any time, because a damaged key may have it


class KeyPages:
    """Show and change keys. Runs in the console's process."""

    def __init__(
        self,
        settings: Settings,
        book: Keybook,
        prompts: Promptbook,
        usage: UsageBook,
        captures: Captures,
        pages: Pages,
    ) -> None:
        self._settings = settings
        self._book = book
        self._prompts = prompts
        self._usage = usage
        self._captures = captures
        self._pages = pages

    def listing(self, ask: Ask) -> Response:
        """Return a page of keys, the newest first."""
        search, cursor = ask.query.get("q", "").strip()[:200], ask.query.get("before", "")
        match = _CURSOR.fullmatch(cursor)
        before = (int(match[1]), match[2]) if match else None
        found = self._book.page(search, before, PAGE)
        last = found.last and "{}.{}".format(*found.last)
        following = last and f"{PATH}/keys?{urlencode({'q': search, 'before': last})}"
        return self._pages.page("keys", ask.visitor, found=found, search=search, following=following, first=not cursor)

    def new(self, ask: Ask) -> Response:
        """Return the form for a new key."""
        return self._form(ask, {})

    def create(self, ask: Ask) -> Response:
        """Make a key, and show its secret."""
        try:
            asked = forms.understood(forms.key_fields(ask.form), NewKeyFields)
            entry, text = self._book.create(asked)
        except BadRequest as exc:
            return self._form(ask, ask.form, exc)
        return self._pages.page("secret", ask.visitor, 201, entry=entry, secret=text, rotated=False)

    def show(self, ask: Ask) -> Response:
        """Return one key, with the forms that change it."""
        return self._show(ask)

    def change(self, ask: Ask) -> Response:
        """Change what the form says of a key."""
        entry = self._book.show(ask.path["key_id"])
        try:
            self._book.change(entry.id, forms.understood(forms.key_fields(ask.form, entry), KeyFields))
        except BadRequest as exc:
            return self._show(ask, exc, ask.form)
        return _to_key(entry, "changed")

    def switch(self, ask: Ask) -> Response:
        """Disable a key, or enable it again."""
        disabled = ask.form.get("disabled") == "yes"
        entry = self._book.change(ask.path["key_id"], KeyFields(disabled=disabled))
        return _to_key(entry, "disabled" if disabled else "enabled")

    def rotate(self, ask: Ask) -> Response:
        """Make a new secret, and show it."""
        grace = ask.form.get("grace", "")
        if grace not in GRACES:
            raise BadRequest("grace: it must be one of the given durations.", param="grace")
        try:
            entry, text = self._book.rotate(ask.path["key_id"], int(grace))
        except BadRequest as exc:
            return self._show(ask, exc)
        return self._pages.page("secret", ask.visitor, 201, entry=entry, secret=text, rotated=GRACES[grace])

    def delete(self, ask: Ask) -> Response:
        """Delete a key for good, if its id was typed in. It may be damaged."""
        key_id = ask.path["key_id"]
        self._book.name(key_id)  # there is such a key
        if ask.form.get("typed", "").strip() != key_id:
            return self._show(ask, BadRequest(f"To delete this key, type its id: {key_id}"))
        self._book.delete(key_id)
        return redirect(f"{PATH}/keys")

    def use_prompt(self, ask: Ask) -> Response:
        """Have a key use a prompt, or none."""
        entry, name = self._book.show(ask.path["key_id"]), ask.form.get("prompt", "").strip()
        try:
            if name:
                self._prompts.use("key", entry.id, forms.understood({"name": name}, Use))
            else:
                with suppress(NotFound):  # it uses none
                    self._prompts.stop("key", entry.id)
        except (BadRequest, NotFound) as exc:
            return self._show(ask, exc)
        return _to_key(entry, "changed")

    def capture(self, ask: Ask) -> Response:
        """Begin or end to capture the bodies of a key's requests."""
        entry, begin = self._book.show(ask.path["key_id"]), ask.form.get("capture") == "yes"
        try:
            (self._captures.start if begin else self._captures.stop)(entry.id)
        except BusyError as exc:
            raise GatewayBusy("The gateway is too busy. Try again shortly.") from exc
        return _to_key(entry, "captured" if begin else "forgotten")

    # -- the limits of all keys without their own -----------------------------------------------------------------

    def limits(self, ask: Ask) -> Response:
        """Return the default limits."""
        return self._limits(ask, self._book.defaults().model_dump())

    def set_limits(self, ask: Ask) -> Response:
        """Change the default limits."""
        try:
            self._book.set_defaults(forms.understood(forms.limits(ask.form), LimitFields))
        except BadRequest as exc:
            return self._limits(ask, ask.form, exc)
        return redirect(f"{PATH}/limits?done=changed")

    def _limits(self, ask: Ask, values: dict[str, Any], error: StackError | None = None) -> Response:
        status = error.status if error else 200
        configured = asdict(defaults(self._settings))
        return self._pages.page(
            "limits", ask.visitor, status, values=values, names=forms.LIMITS, configured=configured,
            error=error, done=ask.query.get("done"),
        )  # fmt: skip

    # -- prompts --------------------------------------------------------------------------------------------------

    def prompts(self, ask: Ask) -> Response:
        """Return a page of prompts by name, and the form for a new version."""
        return self._prompt_page(ask, {"name": ask.query.get("name", "")[:64]})

    def set_prompt(self, ask: Ask) -> Response:
        """Make the next version of a prompt."""
        try:
            named = forms.understood({"name": ask.form.get("name", "").strip()}, Use)
            text = ask.form.get("template", "").replace("\r\n", "\n")  # browsers send these; nobody typed them
            self._prompts.set(named.name, forms.understood({"template": text}, Template).template)
        except BadRequest as exc:
            return self._prompt_page(ask, ask.form, exc)
        return redirect(f"{PATH}/prompts?" + urlencode({"name": named.name, "done": "set"}))

    def _prompt_page(self, ask: Ask, values: dict[str, Any], error: StackError | None = None) -> Response:
        after = ask.query.get("after", "")[:64]
        found, more = self._prompts.page(after, PAGE)
        if "template" not in values:
            shown = self._prompts.latest(values.get("name", ""))
            values = {**values, "template": shown.template if shown else ""}
        status = error.status if error else 200
        following = f"{PATH}/prompts?{urlencode({'after': found[-1].name})}" if more else None
        return self._pages.page(
            "prompts", ask.visitor, status, prompts=found, values=values, error=error, done=ask.query.get("done"),
            following=following, first=not after,
        )  # fmt: skip

    # -- what the pages of one key have in common -----------------------------------------------------------------

    def _form(self, ask: Ask, values: Form, error: StackError | None = None) -> Response:
        status = error.status if error else 200
        return self._pages.page("new_key", ask.visitor, status, values=values, names=forms.LIMITS, error=error)

    def _show(self, ask: Ask, error: StackError | None = None, typed: Form | None = None) -> Response:
        try:
            entry = self._book.show(ask.path["key_id"])
        except BadRequest as exc:  # its row is damaged, so it can only be deleted
            return self._pages.page(
                "damaged_key", ask.visitor, exc.status, key_id=ask.path["key_id"], why=exc, error=error
            )
        values = typed if typed is not None else forms.shown(entry)
        uses, names = self._prompts.used_by("key", entry.id), self._prompts.names(CHOICES + 1)
        in_force = asdict(entry.limits.over(self._book.defaults().over(defaults(self._settings))))
        return self._pages.page(
            "key", ask.visitor, error.status if error else 200, entry=entry, values=values, names=forms.LIMITS,
            in_force=in_force, used=quotas_used(self._usage, entry.id), uses=uses,
            prompts=names if len(names) <= CHOICES else None, graces=GRACES, error=error,
            captured=self._captures.left(entry.id), done=ask.query.get("done"),
        )  # fmt: skip


def _to_key(entry: Entry, done: str) -> Response:
    return redirect(f"{PATH}/keys/{entry.id}?done={done}")
