# shellcheck shell=bash
# Which engine the stack has, and what Compose makes of all settings together.

# The files that make up the stack with engine $1.
compose_files() {
  case $1 in
    ollama) echo compose.yaml ;;
    vllm) echo compose.yaml:compose.gpu.yaml ;;
    tiny) echo compose.yaml:compose.tiny.yaml ;;
    *) die "ENGINE=$1 is not known: use ollama, vllm or tiny." ;;
  esac
}

# The files that Compose uses without further word: an earlier choice, perhaps with the user's own overrides, or nothing.
recorded_files() { echo "${COMPOSE_FILE:-$(dotenv COMPOSE_FILE)}"; }

# The engine of the files $1, or nothing for none.
engine_of() {
  case $1 in
    *compose.gpu.yaml*) echo vllm ;;
    *compose.tiny.yaml*) echo tiny ;;
    ?*) echo ollama ;;
  esac
}

# Sets the engine, the words in which it was chosen (none: nobody chose), and the address; see use_engine.
choose_engine() {
  local address=${STACK_PUBLISH:-$(dotenv STACK_PUBLISH)}
  [ -z "$address" ] || split_address "$address" # Compose would refuse it too, in its own words
  # shellcheck disable=SC2034 # scripts/up
  chosen=${ENGINE:-$(engine_of "$(recorded_files)")}
  engine=${chosen:-ollama}
  use_engine "$engine"
  split_address "$(resolved STACK_PUBLISH)"
}

# From here on `docker compose` in this script speaks of the stack with engine $1.
use_engine() {
  local files
  files=$(recorded_files)
  [ "$(engine_of "$files")" = "$1" ] || files=$(compose_files "$1")
  export COMPOSE_FILE=$files
  merged=$(docker compose config 2>&1) || die "Compose does not accept the settings: $merged."
}

# The first value of $1 in the merged configuration: what the shell, .env and the files' defaults come to.
resolved() {
  sed -nE "s/^ *$1: //p" <<<"$merged" | head -n 1 | sed -E "s/^(['\"])(.*)\1\$/\2/; s/\\\$\\\$/\\\$/g; s/^null\$//"
}

# Docker's own words for a secret's missing file do not name the setting.
need_secret_file() {
  local file
  file=$(secret_file "$1")
  [ -z "$file" ] || [ -e "$file" ] ||
    die "$2 names $file, which does not exist: correct it in .env, or take the line out."
}

# The file on this machine that the secret $1 comes from.
secret_file() { sed -n "/^secrets:/,\$ { /^  $1:/,/file:/ s/^ *file: //p; }" <<<"$merged" | head -n 1; }
