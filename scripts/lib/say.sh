# shellcheck shell=bash
# The output of the scripts: one line for each step, and one message when they stop.

say() { printf '==> %s\n' "$*"; }

die() {
  printf 'stack: %s\n' "$*" >&2
  exit 1
}
