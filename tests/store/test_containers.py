"""The containers of these tests go with the process that started them."""

import subprocess
import sys
from uuid import uuid4

from tests.support.containers import BASE, docker
from tests.support.processes import ROOT, wait_for

PROGRAM = """
import sys
from tests.support.containers import container
with container(sys.argv[1], sys.argv[2], "sleep", "600"):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_container_goes_with_a_test_that_is_killed() -> None:
    name = f"stack-test-{uuid4().hex[:8]}"
    command = [sys.executable, "-c", PROGRAM, name, BASE]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    wait_for(lambda: not docker("ps", "--all", "--quiet", "--filter", f"name={name}"))
