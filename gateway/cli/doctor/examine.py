"""Examine: run all checks of a deployment in their order, for `stack doctor`."""

import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import httpx

from gateway.addresses import split_address
from gateway.cli.console import opened
from gateway.cli.doctor import machine, walls
from gateway.cli.doctor.check import Check
from gateway.cli.doctor.probes import Canary, Probes
from gateway.config import load as load_config
from gateway.keys.book import Keybook
from gateway.keys.entries import NewKeyFields
from gateway.keys.limit_fields import LimitFields
from gateway.settings import Settings, SettingsError, load

LASTS = 3600  # seconds until the key expires, if this command is killed before it deletes it
NAME = "make doctor"
MANY = 10**9
AWAY = "start the engine outside, and let it listen at an address that containers reach"
LACKING = "set LLM_MODEL to a model that the engine outside has, or fetch this one there, then run 'make up'"
UNBOUND = LimitFields(
    requests_per_minute=MANY, tokens_per_minute=MANY, concurrent=MANY, tokens_per_day=MANY, tokens_per_month=MANY
)


def doctor() -> None:
    """Check this deployment, with what scripts/doctor tells on standard input. Use `make doctor`."""
    facts = walls.read(sys.stdin)
    try:
        settings = load()
        for check in _checks(facts, settings):
            sys.stdout.write(check.line())
            sys.stdout.flush()
    except SettingsError as exc:
        sys.stdout.write(Check("failed", "settings", str(exc), "correct that, then run 'make up'").line())
    sys.stdout.write("end\n")


def _checks(facts: walls.Facts, settings: Settings) -> Iterator[Check]:
    yield walls.services(facts)
    yield walls.published(facts, settings)
    yield walls.keys(facts, settings)
    yield from walls.engines(facts)
    config = load_config(settings)
    cure = "see 'make logs', then run 'make up'"
    if away := walls.outside(facts, [it.base_url for it in config.engines.values()]):
        yield away
        cure = AWAY
    yield machine.disk(settings)
    if facts.certificate:
        yield machine.certificate(*facts.certificate)
    else:
        yield Check(
            "skipped", "certificate", "the stack serves plain HTTP; --tls NAME:PORT checks a server in front of it"
        )
    yield from _with_key(settings, config.default_model, cure)


def _with_key(settings: Settings, model: str, cure: str) -> Iterator[Check]:
    """Write a key to the store, and call the gateway with it. The key is deleted at the end. `cure` is what to do about
    an engine that is not ready."""
    fields = NewKeyFields(name=NAME, expires_at=int(time.time()) + LASTS, limits=UNBOUND)
    try:
        with opened() as (store, _):
            book = Keybook(store)
            kept = len([it for it in book.list() if it.name != NAME])
            entry, secret = book.create(fields)
            yield Check("ok", "store", "a key was written, and is deleted at the end")
            yield machine.backup(settings, kept)
            try:
                yield from _called(settings, model, secret, cure)
            finally:
                book.delete(entry.id)
    except SystemExit as exc:  # the sentence with which `opened` ends a command
        advice = "let the gateway's user (10001) write there, or start the database"
        yield Check("failed", "store", str(exc.code), advice)


def _called(settings: Settings, model: str, key: str, cure: str) -> Iterator[Check]:
    url = f"http://127.0.0.1:{split_address(settings.stack_bind)[1]}"
    ready = _ready(url, cure)
    yield ready
    if ready.state != "ok":
        yield Check("skipped", "capabilities", "nothing was asked, because the engine is not ready")
        return
    canary = Canary(f"canary-{secrets.token_hex(8)}", key, f"doctor-{secrets.token_hex(8)}")
    with closing(Probes(url + "/v1", model, canary, settings.llm_timeout)) as probes:
        yield from probes.all()
    sys.stdout.write(f"canary\t{canary.mark}\t{canary.key}\t{canary.request_id}\n")


def _ready(url: str, cure: str) -> Check:
    try:
        answer = httpx.get(url + "/readyz", timeout=30, trust_env=False)
        body = answer.json()
    except (httpx.HTTPError, ValueError) as exc:
        return Check("failed", "ready", f"the gateway does not answer /readyz: {exc}", "see 'make logs'")
    states = ", ".join(f"{name} {state}" for name, state in body["engines"].items())
    if answer.status_code != 200:
        said = str(body["error"]["message"])
        if cure == AWAY and "does not have the model" in said:
            cure = LACKING
        return Check("failed", "ready", said, cure)
    told = f"{states}; store {body['store']}"
    if body["store"] != "ok":
        return Check("failed", "ready", told, "see 'make logs', which says what is wrong with the store")
    return Check("ok", "ready", told)
