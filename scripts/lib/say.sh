# shellcheck shell=bash
# How the scripts speak: one line for what they do, one sentence when they stop.

say() { printf '==> %s\n' "$*"; }

die() {
  printf 'stack: %s\n' "$*" >&2
  exit 1
}
