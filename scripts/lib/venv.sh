# shellcheck shell=bash
# The virtual environment .venv, holding exactly what requirements/dev.txt pins.

need_venv() {
  local stamp=.venv/installed-from lock
  lock=$(cksum <requirements/dev.txt)
  [ "$(cat "$stamp" 2>/dev/null)" = "$lock" ] && .venv/bin/python -c '' 2>/dev/null && return

  local python
  python=$(new_enough_python) ||
    die "Python 3.11 or newer is needed for tests and checks: install it (on Debian and Ubuntu 'apt-get install python3 python3-venv'), then run this again."
  say "making the virtual environment .venv with $python"
  "$python" -m venv --clear .venv >/dev/null ||
    die "$python has no venv module: install it (on Debian and Ubuntu 'apt-get install python3-venv'), then run this again."
  say "installing requirements/dev.txt into it"
  .venv/bin/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/dev.txt ||
    die "The packages could not be installed: is the Python package index that pip is set up for reachable from here?"
  printf '%s\n' "$lock" >"$stamp"
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
