# shellcheck shell=bash
# Images: those that are here, those a registry has, and whether one answers at all.

probe_seconds=10 # a registry that has not said a word by then counts as none

has_image() { docker image inspect "$1" >/dev/null 2>&1; }

# Whether image $1 is here or a registry begins to serve it. Ends the program where one answers with a refusal.
within_reach() {
  has_image "$1" && return
  [ "$(registry_of "$1")" = "${silent_registry:-}" ] && return 1
  say "asking the registry for $1"
  answers "$1" && return
  silent_registry=$(registry_of "$1")
  return 1
}

# Brings image $1, which is within reach, here.
pull() { has_image "$1" || docker pull "$1" || die "$1 could not be pulled: see the message above, then run this again."; }

# Both. Returns 1 where no registry answers.
fetch() { within_reach "$1" && pull "$1"; }

# Sees to it that the base of our own images is here, and exports its name: PYTHON_IMAGE's, or one built on this machine.
# shellcheck disable=SC2154 # base_image: lib/docker.sh
bring_python_image() {
  PYTHON_IMAGE=$(resolved PYTHON_IMAGE)
  if [ "$PYTHON_IMAGE" = "$base_image" ] || ! fetch "$PYTHON_IMAGE"; then
    scripts/base-image
    PYTHON_IMAGE=$base_image
  fi
  export PYTHON_IMAGE
}

# Whether the registry begins to serve image $1 within probe_seconds. The pull that finds out is given up then: a
# second one, whose progress bars can be seen, takes over what it had begun.
answers() {
  local work pull status=0 tries=$((probe_seconds * 5)) refusal
  work=$(mktemp -d)
  docker pull "$1" >"$work/said" 2>"$work/refused" &
  pull=$!
  while kill -0 "$pull" 2>/dev/null && [ ! -s "$work/said" ] && [ $((tries -= 1)) -ge 0 ]; do sleep 0.2; done
  kill "$pull" 2>/dev/null || true
  wait "$pull" 2>/dev/null || true
  [ -s "$work/said" ] || status=1
  refusal=$(tail -n 1 "$work/refused")
  rm -rf "$work"
  case $refusal in
    *"manifest unknown"* | *"pull access denied"* | *unauthorized:* | *toomanyrequests* | *"no matching manifest"*)
      die "The registry does not hand out $1 (${refusal#Error response from daemon: }): correct the name, or 'docker login', then run this again." ;;
  esac
  return $status
}

# registry.example:5000/team/image:tag → registry.example:5000; python:3 and ollama/ollama:1 → docker.io
registry_of() {
  local first=${1%%/*}
  case "$1 $first" in
    */*" "*[.:]* | */*" localhost") echo "$first" ;;
    *) echo docker.io ;;
  esac
}
