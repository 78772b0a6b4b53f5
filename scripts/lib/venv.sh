# shellcheck shell=bash
# The virtual environments: .venv has exactly the packages of requirements/dev.txt, .venv-tiny has the tiny engine, and
# .venv-clients has the client libraries and programs whose set-up pages the tests run.

need_venv() { make_venv .venv requirements/dev.txt --no-compile; }

# --no-deps: see scripts/lock.
need_tiny_venv() {
  make_venv .venv-tiny requirements/tiny.txt --no-deps
  .venv-tiny/bin/python -c 'import xllamacpp' 2>/dev/null ||
    die "llama.cpp cannot be loaded: install libgomp (on Debian and Ubuntu 'apt-get install libgomp1'), then run this again."
}

# --no-compile, because the pages import only a small part of the packages: it halves the time and saves 80 MB.
need_clients_venv() { make_venv .venv-clients requirements/clients.txt --no-compile; }

# Makes directory $1 an environment with exactly the packages of the lock $2. Further arguments go to pip.
make_venv() {
  local directory=$1 lock=$2 stamp=$1/installed-from sum python
  shift 2
  sum=$(cksum <"$lock")
  [ "$(cat "$stamp" 2>/dev/null)" = "$sum" ] && "$directory/bin/python" -c '' 2>/dev/null && return
  # Python's venv would delete the packages in the linked directory, and then refuse the link.
  [ ! -L "$directory" ] ||
    die "$directory is a symbolic link to an environment that does not have the packages of $lock: remove the link, then run this again."

  python=$(new_enough_python) ||
    die "Python 3.11 or newer is needed: install it (from Debian 12 and Ubuntu 24.04 on 'apt-get install python3 python3-venv'; older ones have an older Python, so there for example 'uv python install 3.13', see https://docs.astral.sh/uv/), then run this again."
  say "creating the virtual environment $directory with $python"
  "$python" -m venv --clear "$directory" >/dev/null ||
    die "$python has no venv module: install it (on Debian and Ubuntu 'apt-get install ${python##*/}-venv'), then run this again."
  say "installing $lock into it"
  "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes "$@" --requirement "$lock" ||
    die "The packages could not be installed. Check that this machine reaches the Python package index of pip's configuration, then run this again."
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
