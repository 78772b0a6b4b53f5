# shellcheck shell=bash
# The output of the scripts: one line for each step, and one message when they stop.

# The user's locale would change what programs write: awk a comma in 1.5, which the next awk takes for two numbers, and
# in Turkish tr another i. Texts stay what they are: the scripts pass bytes on, and Python reads UTF-8 in this locale
# (PEP 540).
export LC_ALL=C

say() { printf '==> %s\n' "$*"; }

# Prints the script's own first comment, which says how it is used, and exits. The working directory is the clone.
usage() {
  sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "scripts/${0##*/}" >&2
  exit 2
}

# Stops if the script got arguments. A `--help` must not start or stop anything.
take_no_arguments() { [ $# = 0 ] || usage; }

die() {
  printf 'stack: %s\n' "$*" >&2
  exit 1
}
