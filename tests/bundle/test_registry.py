"""Registries: a slow one is waited for, a refusal is final, and a silent one counts as unreachable."""

import gzip
import hashlib
import io
import json
import shlex
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.clone import Tree, refuses, write_program

SLOWLY = 3.0  # seconds for the one layer: longer than the tests' probe


@dataclass
class Registry(ThreadingHTTPServer):
    """Serves one image of one small file, under any name with the tag 1."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifest: bytes = b""

    def __post_init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w") as tar:
            content = uuid4().bytes
            entry = tarfile.TarInfo("file")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [digest(plain.getvalue())]},
        }
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        described = {
            "schemaVersion": 2,
            "mediaType": kind,
            "config": self.add(json.dumps(config).encode(), "application/vnd.docker.container.image.v1+json"),
            "layers": [self.add(gzip.compress(plain.getvalue()), "application/vnd.docker.image.rootfs.diff.tar.gzip")],
        }
        self.manifest = json.dumps(described).encode()

    def add(self, blob: bytes, kind: str) -> dict[str, str | int]:
        self.blobs[digest(blob)] = blob
        return {"mediaType": kind, "size": len(blob), "digest": digest(blob)}

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        what, name = self.path.rsplit("/", 2)[1:]
        if what == "blobs":
            blob = self.server.blobs[name]
            if blob.startswith(b"\x1f\x8b"):
                time.sleep(SLOWLY)
            self.answer(200, blob, "application/octet-stream", name)
        elif what == "manifests" and (name in ("1", digest(self.server.manifest))):
            kind = "application/vnd.docker.distribution.manifest.v2+json"
            self.answer(200, self.server.manifest, kind, digest(self.server.manifest))
        elif what == "manifests":
            unknown = b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}'
            self.answer(404, unknown, "application/json", digest(unknown))
        else:
            self.answer(200, b"{}", "application/json", digest(b"{}"))

    do_HEAD = do_GET  # noqa: N815 - the base class's name

    def answer(self, status: int, body: bytes, kind: str, name: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Docker-Content-Digest", name)
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        threading.Thread(target=registry.serve_forever, daemon=True).start()
        yield registry
        registry.shutdown()


def fetch(tree: Tree, image: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What `make up` does for an image it needs, with a second's patience."""
    script = '. scripts/lib/say.sh; . scripts/lib/images.sh; probe_seconds=1; fetch "$0" || echo "nobody answers"'
    return tree.run("bash", "-euo", "pipefail", "-c", script, image, **env)


def test_a_slow_registry_is_waited_for(tree: Tree, registry: Registry) -> None:
    image = f"{registry.address}/team/image:1"
    ran = fetch(tree, image)
    try:
        assert ran.returncode == 0, ran.stdout
        assert "nobody answers" not in ran.stdout
        assert tree.run("docker", "image", "inspect", image).returncode == 0
    finally:
        tree.run("docker", "rmi", "--force", image)


def test_an_image_that_is_here_is_not_asked_for(tree: Tree, python_image: str) -> None:
    assert fetch(tree, python_image).stdout == ""


def test_a_registry_that_refuses_the_image_is_reported_with_its_reason(tree: Tree, registry: Registry) -> None:
    ran = fetch(tree, f"{registry.address}/team/image:2")
    assert ran.returncode == 1
    assert f"stack: The registry refuses {registry.address}/team/image:2" in ran.stdout
    assert "manifest unknown" in ran.stdout


RESOLVE = 'failed to resolve reference "docker.io/a/b:1": '
REGISTRY = "https://registry-1.docker.io/v2/"
WRONG_NAMES = [
    "manifest for a/b:1 not found: manifest unknown: manifest unknown",
    "pull access denied for a/b, repository does not exist or may require 'docker login': denied: requested access",
    f"{RESOLVE}docker.io/a/b:1: not found",
]
REFUSALS = [
    "toomanyrequests: You have reached your unauthenticated pull rate limit. https://www.docker.com/increase-rate-limit",
    f"{RESOLVE}unexpected status from HEAD request to {REGISTRY}a/b/manifests/1: 429 Too Many Requests",
    f"{RESOLVE}unexpected status from HEAD request to {REGISTRY}a/b/manifests/1: 403 Forbidden",
    'Head "https://ghcr.io/v2/a/b/manifests/1": denied',
    f'Get "{REGISTRY}": tls: failed to verify certificate: x509: certificate signed by unknown authority',
    f'{RESOLVE}failed to do request: Head "{REGISTRY}": x509: certificate signed by unknown authority',
]
SILENCES = [
    f'Get "{REGISTRY}": dial tcp: lookup registry-1.docker.io on 192.0.2.53:53: no such host',
    f'{RESOLVE}failed to do request: Head "{REGISTRY}": dial tcp 192.0.2.1:443: connect: connection refused',
]


def says(programs: Path, complaint: str) -> dict[str, str]:
    """An environment with a Docker that can pull nothing."""
    real = shutil.which("docker")
    told = shlex.quote(f"Error response from daemon: {complaint}")
    write_program(
        programs / "docker",
        f'case "$*" in "pull "*) echo {told} >&2; exit 1 ;; "image inspect a/"*) exit 1 ;; esac\nexec {real} "$@"\n',
    )
    return {"PATH": str(programs), "OLLAMA_IMAGE": "a/b:1", "PYTHON_IMAGE": "a/b:1"}


def test_a_refusal_is_told_from_silence_in_the_words_of_both_of_dockers_image_stores(
    tree: Tree, programs: Path
) -> None:
    for complaint in WRONG_NAMES + REFUSALS:
        ran = fetch(tree, "a/b:1", **says(programs, complaint))
        assert f"stack: The registry refuses a/b:1 ({complaint}): " in ran.stdout
        assert ran.returncode == 1
    for complaint in SILENCES:
        assert "nobody answers" in fetch(tree, "a/b:1", **says(programs, complaint)).stdout


def test_a_refusal_does_not_make_the_stack_take_the_tiny_engine(tree: Tree, programs: Path) -> None:
    refuses(tree, f"The registry refuses a/b:1 ({WRONG_NAMES[2]}): correct", **says(programs, WRONG_NAMES[2]))


def test_a_registry_that_does_not_answer_is_told_with_dockers_words(tree: Tree, programs: Path) -> None:
    refuses(tree, f"No registry answers for a/b:1 ({SILENCES[0]}): ", ENGINE="ollama", **says(programs, SILENCES[0]))


BRING = """
for it in say docker images; do . scripts/lib/$it.sh; done
resolved() { echo "$PYTHON_IMAGE"; }
can_build_base() { true; }
bring_python_image
echo "$PYTHON_IMAGE"
"""


def test_only_a_wrong_name_keeps_the_base_image_from_being_built(tree: Tree, programs: Path) -> None:
    """The image that is built here does the same as the one of the registry."""
    write_program(tree.path / "scripts/base-image", 'echo "built, because $1"\n')
    for complaint in WRONG_NAMES + REFUSALS + SILENCES:
        ran = tree.run("bash", "-euo", "pipefail", "-c", BRING, **says(programs, complaint))
        if complaint in WRONG_NAMES:
            assert (ran.returncode, f"refuses a/b:1 ({complaint}): correct the name" in ran.stdout) == (1, True)
        else:
            assert ran.stdout.splitlines()[1:] == [f"built, because {complaint}", "stack-base:trixie"], ran.stdout


def test_the_base_image_is_built_for_no_reason_of_a_registry_that_answered(tree: Tree, registry: Registry) -> None:
    write_program(tree.path / "scripts/base-image", 'echo "built, because $1"\n')
    image = f"{registry.address}/team/engine:1"
    bring = f"for it in say docker images; do . scripts/lib/$it.sh; done; within_reach {image}" + BRING
    ran = tree.run("bash", "-euo", "pipefail", "-c", bring, PYTHON_IMAGE="stack-base:trixie")
    tree.run("docker", "rmi", "--force", image)
    assert ran.stdout.splitlines()[1:] == ["built, because ", "stack-base:trixie"], ran.stdout


@pytest.mark.parametrize("host", ["black_hole", "closed_port"])
def test_an_unreachable_registry_is_reported(tree: Tree, host: str, request: pytest.FixtureRequest) -> None:
    address: str = request.getfixturevalue(host)
    began = time.monotonic()
    assert "nobody answers" in fetch(tree, f"{address}/team/image:1").stdout
    assert time.monotonic() - began < 50


@pytest.mark.parametrize(
    ("image", "registry"),
    [
        ("python:3.13", "docker.io"),
        ("ollama/ollama:1", "docker.io"),
        ("localhost/a:1", "localhost"),
        ("quay.example/a/b:1", "quay.example"),
        ("127.0.0.1:5000/a:1", "127.0.0.1:5000"),
    ],
)
def test_the_registry_of_an_image(tree: Tree, image: str, registry: str) -> None:
    assert tree.run("bash", "-c", '. scripts/lib/images.sh; registry_of "$0"', image).stdout.strip() == registry
