"""Machine: check what the gateway stands on: its disk, the last backup of its store, and the certificate that its
callers see."""

import shutil
import socket
import ssl
import time

from gateway.cli import backup as backups
from gateway.cli.doctor.check import Check
from gateway.settings import Settings

DAY = 86_400
LEAST_FREE = 10**9  # bytes
BACKUP_AGE = 7 * DAY
# A certificate is renewed when a third of its life is left (Let's Encrypt: 30 of 90 days, Caddy's own: 4 of 12 hours)
LEAST_LEFT, LEAST_SHARE = 14 * DAY, 0.2
TIMEOUT = 10.0


def disk(settings: Settings) -> Check:
    """Check that the data directory has room."""
    free = shutil.disk_usage(settings.stack_data_dir).free
    finding = f"{free / 1e9:.1f} GB are free where keys and usage are kept"
    if free < LEAST_FREE:
        advice = "free some space where Docker keeps its volumes ('docker system df' shows what Docker uses)"
        return Check("failed", "disk", finding, advice)
    return Check("ok", "disk", finding)


def backup(settings: Settings, kept: int) -> Check:
    """Check that the last backup is recent. `kept` is the number of keys that would be lost."""
    at = backups.last(settings)
    if at is None and settings.store_url:
        return Check(
            "skipped", "backup", "'scripts/stack backup' was never used; whether PostgreSQL has backups is unknown"
        )
    age = None if at is None else time.time() - at
    told = "there was never a backup" if age is None else f"the last backup is {_days(age)} old"
    if kept and (age is None or age > BACKUP_AGE):
        advice = "run 'scripts/stack backup FILE' every day, and keep the files on another machine"
        return Check("failed", "backup", f"{told}, and the store has {kept} key(s)", advice)
    return Check("ok", "backup", told + ("" if kept else "; the store has no keys"))


def certificate(name: str, at: str) -> Check:
    """Check that the server at `at` shows a certificate for the name that is not about to expire. Which authority has
    signed it is the callers' affair: each knows another one."""
    host, _, port = at.rpartition(":")
    try:
        address = host.strip("[]"), int(port)
        blind = ssl.create_default_context()
        blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(address, TIMEOUT) as raw, blind.wrap_socket(raw, server_hostname=name) as tls:
            shown = ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"")
        strict = ssl.create_default_context(cadata=shown)  # trusts this certificate, so that only name and time count
        strict.verify_flags = ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        with socket.create_connection(address, TIMEOUT) as raw, strict.wrap_socket(raw, server_hostname=name) as tls:
            found = tls.getpeercert() or {}
    except ssl.SSLCertVerificationError as exc:
        advice = "renew it, or correct STACK_TLS_NAME, then run 'make up'"
        return Check(
            "failed", "certificate", f"the certificate at {at} is refused for {name}: {exc.verify_message}", advice
        )
    except (OSError, ValueError) as exc:
        return Check(
            "failed", "certificate", f"{at} speaks no TLS: {exc}", "correct the address, or start what serves it"
        )
    begins, ends = (ssl.cert_time_to_seconds(str(found[it])) for it in ("notBefore", "notAfter"))
    left = ends - time.time()
    told = f"the certificate for {name} ends in {_days(left)}"
    if left < min(LEAST_LEFT, LEAST_SHARE * (ends - begins)):
        return Check(
            "failed", "certificate", told, "renew it; if Caddy should do that, 'make logs' says why it does not"
        )
    return Check("ok", "certificate", told)


def _days(seconds: float) -> str:
    return f"{seconds / DAY:.0f} days" if seconds > 2 * DAY else f"{seconds / 3600:.1f} hours"
