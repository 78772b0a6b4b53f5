# shellcheck shell=bash
# The models of LLM_MODELS: which of the engine's services serves each, and the two files that tell Compose and the gateway.
# Ollama, or the engine outside, serves all of them. Otherwise each further model has a service of its own, which is the first one's with another name.

services_file=.models/compose.yaml
list_header="# Written by make up from LLM_MODELS."
tiny_models="SmolLM2-135M-Instruct all-MiniLM-L6-v2" # those in the tiny engine's image

# Sets `models`, the names in LLM_MODELS or the one of LLM_MODEL, and `services`, the service of each. Compose gets the first as
# LLM_MODEL from here on.
# shellcheck disable=SC2154 # engine, chosen: lib/stack.sh
name_models() {
  local given name
  given=$(setting LLM_MODELS)
  models=() services=()
  for name in ${given//,/ }; do
    case $name in *[!A-Za-z0-9._:/@-]*) die "LLM_MODELS has '$name', which is not the name of a model: separate the names by commas." ;; esac
    [[ " ${models[*]-} " != *" $name "* ]] || continue
    if [ "$engine" = tiny ] && [[ " $tiny_models " != *" $name "* ]]; then
      [ -z "$chosen" ] || die "LLM_MODELS names $name, and the tiny engine has only ${tiny_models// / and }: correct the line."
      say "the tiny engine does not have $name"
      continue
    fi
    models+=("$name")
  done
  if [ ${#models[@]} = 0 ]; then
    several=
    models=("$(resolved LLM_MODEL)") services=(engine)
    return
  fi
  several=yes
  [ "$engine" != tiny ] || [ "${models[0]}" = "${tiny_models%% *}" ] ||
    die "LLM_MODELS begins with ${models[0]}, and the tiny engine's default model is ${tiny_models%% *}: put that one first."
  export LLM_MODEL=${models[0]}
  use_engine "$engine"
  place_models
}

# Gives each model a service.
place_models() {
  local name service
  services=(engine)
  for name in "${models[@]:1}"; do
    service=engine
    one_for_all || service=$(service_of "$name")
    [ "$service" = engine ] || [[ " ${services[*]} " != *" $service "* ]] ||
      die "The names in LLM_MODELS are too much alike: $name would have the same service, $service, as another one."
    services+=("$service")
  done
}

# Org/Some.Model → engine-org-some-model
service_of() { printf 'engine-%s' "$(tr '[:upper:]' '[:lower:]' <<<"$1" | sed -E 's/[^a-z0-9]+/-/g; s/^-|-$//g' | cut -c 1-50)"; }

# Whether a service serves further models.
served_apart() { [ ${#models[@]} -gt 1 ] && ! one_for_all; }

# Writes both files as LLM_MODELS says, or removes those of an earlier choice, and adds the services to the stack. `relisted` says
# whether the gateway's list has changed.
write_models() {
  local list before
  if served_apart; then
    mkdir -p "${services_file%/*}"
    write_services >"$services_file.new" && mv "$services_file.new" "$services_file"
    # shellcheck disable=SC2034 # with_services in lib/stack.sh
    apart=yes
    use_engine "$engine"
  else
    rm -f "$services_file"
  fi
  list=$(config_directory)/models.yaml
  before=$(cat "$list" 2>/dev/null) || true
  [ ! -e "$list" ] || [[ $(head -n 1 "$list") == "$list_header"* ]] ||
    die "$list was not written by 'make up', which keeps the list of LLM_MODELS there: rename your file."
  if [ -n "$several" ]; then
    list_models | write_list "$list"
  elif [ -e "$list" ]; then
    rm -f "$list" || die "$list, a list of models from an earlier 'make up', cannot be removed: remove it."
  fi
  relisted=
  [ "$(cat "$list" 2>/dev/null)" = "$before" ] || relisted=yes
}

# Prints a line of the gateway's list for each model.
list_models() {
  local index
  for index in "${!models[@]}"; do
    printf '  - { model: "%s", engine: "%s"%s }\n' "${models[index]}" "${services[index]}" "${sleeps:+, gpu: gpu}"
  done
}

# Prints the compose file with a service for each further model. On vLLM, the first model's service gets its share too. If the
# models take turns, the gateway waits for a dead vLLM for as long as its start takes.
# shellcheck disable=SC2154 # sleeps, start_wait: lib/shares.sh
write_services() {
  local block index
  block=$(docker compose config engine | awk '/^[^ ]/ { inside = /^services:/; own = 0 } /^  [^ ]/ { own = inside && /^  engine:/; next } own') ||
    die "Compose does not print the engine's service: see the message above."
  printf '%s The service of each further model. A change here is lost.\nservices:\n' "$list_header"
  [ -z "$sleeps" ] || [ -n "$(setting STACK_RESUME_WAIT)" ] ||
    printf '  gateway: { environment: { STACK_RESUME_WAIT: "%s" } }\n' "$start_wait"
  for index in "${!models[@]}"; do
    if [ "$index" -gt 0 ]; then
      printf '  %s:\n' "${services[index]}"
      service_block "$index" <<<"$block"
    elif [ "$engine" = vllm ]; then
      printf '  engine:\n'
      service_block 0 <<<"$block" | awk '/^    [^ ]/ { inside = /^    (command|environment):/ } inside'
    fi
  done
}

# Prints the service on standard input as the one of the model with index $1.
# shellcheck disable=SC2154 # shares, lengths: lib/shares.sh, lib/context.sh
service_block() {
  local tools="" reasoning="" all=""
  if [ "$engine" = vllm ]; then
    tools=$(own_setting VLLM_TOOL_PARSER "$1" auto) reasoning=$(own_setting VLLM_REASONING_PARSER "$1" none)
  fi
  [ -z "$sleeps" ] || all=$(tr ' ' , <<<"${models[*]}")
  ALL=$all MODEL=${models[$1]} INDEX=$1 SHARE=${shares[$1]-} LENGTH=${lengths[$1]-} TOOLS=$tools REASONING=$reasoning awk '
    function set(name, value) { if ($1 == name ":") sub(/:.*/, ": \"" value "\"") }
    function pass(option, value) { if (value != "" && index($2, option "=") == 1) sub(/=.*/, "=" value) }
    {
      set("LLM_MODEL", ENVIRON["MODEL"])
      set("TOOL_PARSER", ENVIRON["TOOLS"])
      set("REASONING_PARSER", ENVIRON["REASONING"])
      if (ENVIRON["INDEX"] > 0) set("EXTRA_ARGS", "") # for the first model only
      pass("--gpu-memory-utilization", ENVIRON["SHARE"])
      pass("--max-model-len", ENVIRON["LENGTH"])
      print
      if (ENVIRON["ALL"] != "" && $1 == "command:") print "      - --enable-sleep-mode"
      if (ENVIRON["ALL"] != "" && $1 == "LLM_MODEL:") print "      LLM_MODELS: \"" ENVIRON["ALL"] "\""
    }'
}

# Replaces the gateway's list of models, $1, by the lines on standard input.
write_list() {
  local text
  text="$list_header A change here is lost.
models:
$(cat)"
  [ "$(cat "$1" 2>/dev/null)" != "$text" ] || return 0
  { printf '%s\n' "$text" >"$1.new" && chmod a+r "$1.new" && mv "$1.new" "$1"; } ||
    die "$1, the gateway's list of models, cannot be written: make its directory writable, then run this again."
}

# Has a running gateway read its list and stack.yaml again, if one of them has changed. Its streams go on, and so do the requests that
# wait.
reload_models() {
  local started
  started=$(started_at gateway)
  [ -n "$started" ] || return 0
  [ -n "$relisted" ] || reconfigured_since "$started" || return 0
  docker compose kill --signal HUP gateway >/dev/null 2>&1 || true
}

# Whether stack.yaml was written, made or removed since the time $1. Nothing here knows of a reload since then,
# and one more does no harm.
reconfigured_since() {
  local directory
  directory=$(config_directory)
  if [ -e "$directory/stack.yaml" ]; then
    [ -n "$(find -L "$directory/stack.yaml" -newerct "$1" 2>/dev/null)" ]
  else
    [ -n "$(find -L "$directory" -prune -newermt "$1" 2>/dev/null)" ]
  fi
}

# Prints the default model. stack.yaml replaces the settings that name models, and the gateway has read it.
default_model() {
  local model=""
  [ ! -e "$(config_directory)/stack.yaml" ] || model=$(get /health | sed -n 's/.*"model": *"\([^"]*\)".*/\1/p')
  echo "${model:-$(resolved LLM_MODEL)}"
}
