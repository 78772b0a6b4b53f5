"""The scripts read .env as Compose does, in whatever form a line is written, and change no other line than theirs."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.clone import Tree, clean_environment, clone, refuses, write_program
from tests.support.machine import Machine

# Ways to write a line; what all of them say is NAME=value.
FORMS = {
    "plain": "{name}={value}\n",
    "a comment behind": "{name}={value} # mine\n",
    "a space behind": "{name}={value}   \n",
    "CRLF": "{name}={value}\r\n",
    "CRLF and a comment": "{name}={value} # mine\r\n",
    "double quotes": '{name}="{value}"\n',
    "single quotes and a comment": "{name}='{value}' # mine\n",
    "double quotes, a comment and CRLF": '{name}="{value}"  # mine\r\n',
    "exported": "export {name}={value}\n",
    "spaces around": "  export  {name} = {value}\n",
    "a colon": "{name}: {value}\n",
    "twice": "{name}=first\n{name}={value}\n",
    "a variable": "MINE={value}\n{name}=${{MINE}}\n",
    "a default": "{name}=${{NOT_SET:-{value}}}\n",
    "behind a long value": 'MINE="one\n{name}=two\nthree"\n{name}={value}\n',
    "a byte order mark": "\ufeff{name}={value}\n",
    "no end of line": "{name}={value}",
}


def of_compose(tree: Tree, *path: str, **env: str) -> str:
    """What Compose itself makes of the tree's settings."""
    config = json.loads(tree.run("docker", "compose", "config", "--format", "json", **env).stdout)
    for name in path:
        config = config[name]
    return str(config)


READER = 'for it in say dotenv; do . scripts/lib/$it.sh; done; "$@"'


def reader(tree: Tree, text: str, *words: str) -> str:
    """What a function of the scripts' reader says to a .env with this text."""
    tree.dotenv.write_bytes(text.encode())
    said = tree.run("bash", "-euc", READER, "reader", *words).stdout
    tree.dotenv.unlink()
    return said


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_value_is_what_compose_reads(tree: Tree, form: str) -> None:
    text = form.format(name="LLM_MODEL", value="org/some-1B")
    assert reader(tree, text, "setting", "LLM_MODEL") == "org/some-1B\n"
    assert reader(tree, text, "dotenv", "LLM_MODEL") == "org/some-1B\n"
    tree.dotenv.write_bytes(text.encode())
    assert of_compose(tree, "services", "gateway", "environment", "LLM_MODEL") == "org/some-1B"
    tree.dotenv.unlink()


@pytest.mark.parametrize("form", ["a comment behind", "CRLF", "double quotes, a comment and CRLF"])
def test_the_engine_and_the_model_are_those_that_compose_reads(tree: Tree, machine: Machine, form: str) -> None:
    line = FORMS[form]
    text = line.format(name="LLM_MODEL", value="org/some-1B")
    text += line.format(name="COMPOSE_FILE", value="compose.yaml:compose.gpu.yaml")
    tree.dotenv.write_bytes(text.encode())
    ran = tree.run("scripts/doctor", **machine.environment)
    tree.dotenv.unlink()
    assert "for the engine vllm with org/some-1B\n" in ran.stdout, ran.stdout
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_typo_is_found_in_every_form(tree: Tree, form: str) -> None:
    said = reader(tree, form.format(name="STACK_WORKRES", value="3"), "check_dotenv")
    assert "sets STACK_WORKRES, which nothing reads: did you mean STACK_WORKERS?" in said


@pytest.mark.parametrize("name", ["ENGINE", "MONITORING", "TLS", "CHAT", "WITH"])
def test_a_choice_for_one_command_is_not_taken_for_a_setting(tree: Tree, name: str) -> None:
    said = reader(tree, f"{name}=on\n", "check_dotenv")
    assert f".env sets {name}, which is a choice for one command" in said
    assert f"run '{name}=… make up'" in said


@pytest.mark.parametrize(
    "text",
    [
        "# STACK_WORKRES=3\n",
        "MINE='\nSTACK_WORKRES=3\n'\n",
        "MINE=1 # STACK_WORKRES=3\n",
        "MY_STACK_WORKRES=3\n",
    ],
)
def test_lines_that_are_no_setting_to_compose_are_not_reported(tree: Tree, text: str) -> None:
    assert reader(tree, text, "check_dotenv") == ""


@pytest.mark.parametrize("text", ["A B=1\n", 'STACK_WORKERS="3\n', "STACK_WORKERS 3=\n"])
def test_a_file_that_compose_can_not_read(tree: Tree, text: str) -> None:
    tree.dotenv.write_text(text)
    refuses(tree, "Compose cannot read .env", "correct that line")
    tree.dotenv.unlink()


SECRETS = ["STACK_API_KEYS", "STACK_ADMIN_KEYS", "STACK_STORE_URL", "LLM_API_KEY", "OTEL_EXPORTER_OTLP_HEADERS"]


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("value", ["sk-0123$abc456789012345", '"sk-0123$abc456"', "sk-${abc}456", "sk-$HOME", "a\\$b"])
def test_a_secret_that_a_dollar_sign_changes_is_named(tree: Tree, name: str, value: str) -> None:
    said = reader(tree, f"{name}={value} # mine\n", "check_dotenv")
    assert f"{name} in .env contains a $" in said
    assert "write $$ for each $, or put single quotes around the value" in said


def test_a_secret_that_a_dollar_sign_changes_stops_make_up(tree: Tree) -> None:
    tree.dotenv.write_text("STACK_API_KEYS=sk-0123$abc456789012345\n")
    refuses(tree, "STACK_API_KEYS in .env contains a $", "(23 characters are written, and Compose reads 7)")
    tree.dotenv.unlink()


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("sk-01$$23$$45", "sk-01$23$45"),
        ("'sk-01$23$x$$'", "sk-01$23$x$$"),
        ("sk-01$5", "sk-01$5"),
        ("sk-01$", "sk-01$"),
        ('"sk-01\\$x"', "sk-01$x"),
        ("sk-01#23}", "sk-01#23}"),
        ("sk-<\\&>'\"", "sk-<\\&>'\""),
    ],
)
def test_a_secret_without_a_variable_passes(tree: Tree, value: str, read: str) -> None:
    text = f"STACK_API_KEYS={value} # mine\n"
    assert reader(tree, text, "check_dotenv") == ""
    assert reader(tree, text, "setting", "STACK_API_KEYS") == read + "\n"
    tree.dotenv.write_text(text)
    keys = of_compose(tree, "services", "gateway", "environment", "STACK_API_KEYS")
    tree.dotenv.unlink()
    assert keys == read.replace("$", "$$")  # as Compose writes it


@pytest.mark.parametrize("step", ["check_dotenv", "answers registry.example/image"])
def test_an_interrupted_step_leaves_nothing_in_tmp(tree: Tree, programs: Path, tmp_path: Path, step: str) -> None:
    """Neither a copy of .env, with its keys, nor what a registry has said."""
    tree.dotenv.write_text("STACK_API_KEYS=sk-a$b\n")
    kept, asked = tmp_path / "tmp", tmp_path / "asked"
    kept.mkdir()
    os.mkfifo(asked)
    # The first question is about .env itself.
    write_program(
        programs / "docker",
        f'[ "$1" = pull ] || grep -q {kept} || {{ echo \'"environment": {{\'; exit; }}\necho >{asked}; exec sleep 60\n',
    )
    script = f". scripts/lib/say.sh; . scripts/lib/dotenv.sh; . scripts/lib/images.sh; {step}"
    env = clean_environment(PATH=str(programs), TMPDIR=str(kept))
    with subprocess.Popen(["bash", "-euc", script], cwd=tree.path, env=env, start_new_session=True) as process:
        asked.read_text()
        assert list(kept.iterdir())
        os.killpg(process.pid, signal.SIGINT)
    with suppress(ProcessLookupError):  # Bash has its background processes ignore the first signal
        os.killpg(process.pid, signal.SIGKILL)
    tree.dotenv.unlink()
    assert list(kept.iterdir()) == []


def record(tree: Tree, text: str, value: str) -> tuple[str, str]:
    """What `make up` makes of .env where it writes down the files of the engine, and what it says."""
    tree.dotenv.write_bytes(text.encode())
    ran = tree.run("bash", "-euc", READER, "reader", "record", "COMPOSE_FILE", value)
    after = tree.dotenv.read_bytes().decode()
    assert {it.name for it in tree.path.glob(".env*")} == {".env", ".env.example"}
    tree.dotenv.unlink()
    return after, ran.stdout


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_value_that_is_there_already_is_not_written_again(tree: Tree, form: str) -> None:
    text = form.format(name="COMPOSE_FILE", value="compose.yaml:mine.yaml")
    assert record(tree, text, "compose.yaml:mine.yaml") == (text, "")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("A=1 # x\r\n export COMPOSE_FILE = a # c\r\nZ='\n'", "A=1 # x\r\nCOMPOSE_FILE=new.yaml\nZ='\n'\n"),
        ("COMPOSE_FILE=a\nCOMPOSE_FILE=b\n", "COMPOSE_FILE=new.yaml\n"),
        ("MY_COMPOSE_FILE=a\n#COMPOSE_FILE=b\n", "MY_COMPOSE_FILE=a\n#COMPOSE_FILE=b\nCOMPOSE_FILE=new.yaml\n"),
        ("A=1", "A=1\nCOMPOSE_FILE=new.yaml\n"),
        ("", "COMPOSE_FILE=new.yaml\n"),
    ],
)
def test_a_recorded_setting_changes_only_its_own_line(tree: Tree, before: str, after: str) -> None:
    assert record(tree, before, "new.yaml") == (after, "")


def test_a_dotenv_whose_line_cannot_be_changed_alone_stays_unchanged(tree: Tree) -> None:
    before = 'MINE="one\nCOMPOSE_FILE=two"\nA=1\n'
    after, said = record(tree, before, "new.yaml")
    assert after == before
    assert "put COMPOSE_FILE=new.yaml into it" in said


def test_a_value_is_recorded_so_that_compose_reads_it(tree: Tree) -> None:
    after, said = record(tree, "A=1\n", "compose.yaml:my own.yaml #1 $x")
    assert (after, said) == ("A=1\nCOMPOSE_FILE='compose.yaml:my own.yaml #1 $x'\n", "")


def test_the_path_of_the_clone_may_have_quotes_and_dollar_signs(tmp_path: Path) -> None:
    tree = clone(tmp_path / 'Ann\'s $5 "clone"')
    assert record(tree, "A=1\n", "new.yaml") == ("A=1\nCOMPOSE_FILE=new.yaml\n", "")
    unchanged = 'MINE="one\nCOMPOSE_FILE=two"\n'
    after, said = record(tree, unchanged, "new.yaml")
    assert (after, "put COMPOSE_FILE=new.yaml into it" in said) == (unchanged, True)


def test_a_dotenv_that_is_a_link_stays_one(tree: Tree) -> None:
    shared = tree.path.parent / "shared.env"
    shared.write_text("A=1\n")
    tree.dotenv.symlink_to(shared)
    tree.run("bash", "-euc", READER, "reader", "record", "COMPOSE_FILE", "new.yaml")
    assert tree.dotenv.is_symlink()
    assert shared.read_text() == "A=1\nCOMPOSE_FILE=new.yaml\n"
    tree.dotenv.unlink()
