"""What `make up` concludes from the containers that it waits for. A program in the place of docker tells of them."""

import pytest

from tests.support.clone import Tree, write_program

# At each look, Docker has restarted the gateway once more than at the one before, if the test says so.
DOCKER = """
case "$*" in
  "ps "*) echo 0123abcd ;;
  *OOMKilled*) echo "$KILLED" ;;
  "inspect "*)
    looks=$(($(cat looks) + 1))
    echo $looks >looks
    echo "gateway running 0 $((6 + looks * EACH)) starting 0123abcd"
    echo "engine running 0 2 starting 4567cdef" ;;
  "events "*) printf "%s" "$EVENTS" ;;
  "logs "*) printf "%s" "$LOGGED" ;;
esac
"""
SCRIPT = """
. scripts/lib/say.sh
. scripts/lib/containers.sh
resolved() { echo it; }
for _ in 1 2 3 4 5 6; do look; stop_if_dead engine; stop_if_dead gateway; done
echo waits
"""
MEMORY = (
    "stack: The gateway stops again and again, because it needs more memory than it may use: "
    "raise STACK_MEMORY or lower STACK_WORKERS, then run this again.\n"
)


def wait_for_them(tree: Tree, *, each: int = 1, killed: str = "false", events: str = "", logged: str = "") -> str:
    (tree.path / "bin").mkdir(exist_ok=True)
    write_program(tree.path / "bin/docker", DOCKER)
    (tree.path / "looks").write_text("0")
    said = {"EACH": str(each), "KILLED": killed, "EVENTS": events, "LOGGED": logged}
    return tree.run("bash", "-euc", f'PATH="$PWD/bin:$PATH"; {SCRIPT}', **said).stdout


@pytest.mark.parametrize("logged", ["No such file", ""])
def test_a_gateway_that_dies_some_time_after_each_start_is_not_waited_for(tree: Tree, logged: str) -> None:
    """No look comes at the moment at which Docker says "restarting"."""
    said = f"stack: The gateway stops again and again: {logged or 'it has logged nothing'} ('make logs' shows more).\n"
    assert wait_for_them(tree, logged=logged) == said
    assert (tree.path / "looks").read_text() == "4\n"


def test_a_gateway_that_was_restarted_before_this_run_is_waited_for(tree: Tree) -> None:
    assert wait_for_them(tree, each=0) == "waits\n"


@pytest.mark.parametrize("how", [{"killed": "true"}, {"events": "oom"}])
def test_a_gateway_whose_memory_does_not_suffice_is_told_to_get_more(tree: Tree, how: dict[str, str]) -> None:
    """Newer versions of Docker forget the kill at the next start, and tell of it among the events."""
    assert wait_for_them(tree, **how) == MEMORY  # type: ignore[arg-type]
