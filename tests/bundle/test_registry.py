"""Registries: a slow one is waited for, a refusal is final, and a silent one counts as unreachable."""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import uuid4

import pytest

from tests.support.clone import Tree

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


def fetch(tree: Tree, image: str) -> subprocess.CompletedProcess[str]:
    """What `make up` does for an image it needs, with a second's patience."""
    script = '. scripts/lib/say.sh; . scripts/lib/images.sh; probe_seconds=1; fetch "$0" || echo "nobody answers"'
    return tree.run("bash", "-euo", "pipefail", "-c", script, image)


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
