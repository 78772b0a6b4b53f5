# shellcheck shell=bash
# Images: which ones this machine has, which ones a registry has, and whether a registry answers.

probe_seconds=10 # a registry that has not answered by then counts as unreachable

# Prints about how many GB the image of the setting $1 takes on the disk, or 0 if it is small. Rounded up from what users of the
# images have reported.
image_gb() {
  case $1 in
    VLLM_IMAGE) echo 30 ;;
    OLLAMA_IMAGE | CHAT_IMAGE) echo 6 ;;
    GRAFANA_IMAGE) echo 1 ;;
    *) echo 0 ;;
  esac
}

has_image() { docker image inspect "$1" >/dev/null 2>&1; }

# Whether this machine has image $1 or a registry begins to serve it. Stops if a registry refuses it. Otherwise `unanswered` is
# what Docker said last.
within_reach() {
  has_image "$1" && return
  [ "$(registry_of "$1")" = "${silent_registry:-}" ] && return 1
  say "asking the registry for $1"
  answers "$1" && return
  unanswered=$reply
  silent_registry=$(registry_of "$1")
  return 1
}

# Pulls image $1, unless this machine has it.
pull() { has_image "$1" || docker pull "$1" || die "$1 could not be pulled: see the message above, then run this again."; }

# Pulls image $1 if a registry answers, and returns 1 otherwise.
fetch() { within_reach "$1" && pull "$1"; }

# Gets the base of the stack's own images, and exports its name: PYTHON_IMAGE, or an image built on this machine. The latter can
# replace the former, so only a wrong name stops here.
# shellcheck disable=SC2154 # base_image: lib/docker.sh
bring_python_image() {
  local replaceable=""
  PYTHON_IMAGE=$(resolved PYTHON_IMAGE)
  ! can_build_base || replaceable=yes
  if [ "$PYTHON_IMAGE" = "$base_image" ]; then
    scripts/base-image
  elif ! fetch "$PYTHON_IMAGE"; then
    scripts/base-image "$unanswered"
    PYTHON_IMAGE=$base_image
  fi
  export PYTHON_IMAGE
}

# Whether the registry begins to serve image $1 within probe_seconds. The pull that finds this out is then stopped. A second
# pull, with visible progress bars, continues it. Sets reply to what Docker said last.
answers() {
  local pull status=0 tries=$((probe_seconds * 5)) refusal wrong="" advice="correct the name, or 'docker login'"
  work=$(mktemp -d) # not local, because the trap runs after this function
  trap 'rm -rf "$work"' EXIT
  docker pull "$1" >"$work/said" 2>"$work/refused" &
  pull=$!
  while kill -0 "$pull" 2>/dev/null && [ ! -s "$work/said" ] && [ $((tries -= 1)) -ge 0 ]; do sleep 0.2; done
  kill "$pull" 2>/dev/null || true
  wait "$pull" 2>/dev/null || true
  [ -s "$work/said" ] || status=1
  refusal=$(tail -n 1 "$work/refused") refusal=${refusal#Error response from daemon: }
  rm -rf "$work"
  trap - EXIT
  reply=${refusal:-no answer within $probe_seconds seconds}
  # Docker's two image stores, its own and containerd's, say the same thing in different words.
  case $refusal in
    *"manifest unknown"* | *": not found" | *"access denied"* | *"no matching manifest"*) wrong=yes ;;
    *unauthorized:* | *"401 Unauthorized"* | *"403 Forbidden"* | *": denied"*) ;;
    *toomanyrequests* | *"429 Too Many"*) advice="wait, or 'docker login'" ;;
    *x509:*) advice="have Docker trust the registry's certificate" ;;
    *) return $status ;;
  esac
  [ -n "$wrong" ] || [ -z "${replaceable:-}" ] || return 1
  die "The registry refuses $1 ($refusal): $advice, then run this again."
}

# registry.example:5000/team/image:tag → registry.example:5000; python:3 and ollama/ollama:1 → docker.io
registry_of() {
  local first=${1%%/*}
  case "$1 $first" in
    */*" "*[.:]* | */*" localhost") echo "$first" ;;
    *) echo docker.io ;;
  esac
}
