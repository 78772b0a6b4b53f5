# shellcheck shell=bash
# The virtual environments: .venv holds exactly what requirements/dev.txt pins, .venv-tiny the tiny engine.

need_venv() { make_venv .venv requirements/dev.txt; }

# --no-deps: see scripts/lock.
need_tiny_venv() {
  make_venv .venv-tiny requirements/tiny.txt --no-deps
  .venv-tiny/bin/python -c 'import xllamacpp' 2>/dev/null ||
    die "llama.cpp can't be loaded: install libgomp (on Debian and Ubuntu 'apt-get install libgomp1'), then run this again."
}

# Sees to it that directory $1 is an environment with what the lock $2 pins, and nothing else; the rest is for pip.
make_venv() {
  local directory=$1 lock=$2 stamp=$1/installed-from sum python
  shift 2
  sum=$(cksum <"$lock")
  [ "$(cat "$stamp" 2>/dev/null)" = "$sum" ] && "$directory/bin/python" -c '' 2>/dev/null && return

  python=$(new_enough_python) ||
    die "Python 3.11 or newer is needed for this: install it (on Debian and Ubuntu 'apt-get install python3 python3-venv'), then run this again."
  say "making the virtual environment $directory with $python"
  "$python" -m venv --clear "$directory" >/dev/null ||
    die "$python has no venv module: install it (on Debian and Ubuntu 'apt-get install python3-venv'), then run this again."
  say "installing $lock into it"
  "$directory/bin/pip" install --quiet --disable-pip-version-check --require-hashes "$@" --requirement "$lock" ||
    die "The packages could not be installed: is the Python package index that pip is set up for reachable from here?"
  printf '%s\n' "$sum" >"$stamp"
}

new_enough_python() {
  local python
  for python in python3 python3.14 python3.13 python3.12 python3.11; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    command -v "$python"
    return
  done
  return 1
}
