# shellcheck shell=bash
# The stack's engine, and the configuration that Compose makes from all settings.

# Prints the compose files of the stack with engine $1.
compose_files() {
  case $1 in
    ollama) echo compose.yaml ;;
    vllm) echo compose.yaml:compose.gpu.yaml ;;
    tiny) echo compose.yaml:compose.tiny.yaml ;;
    outside) echo compose.yaml:compose.outside.yaml ;;
    *) die "ENGINE=$1 is not known: use ollama, vllm, tiny or outside." ;;
  esac
}

# Prints the compose files of an earlier choice, perhaps with the user's own overrides, or nothing.
recorded_files() { if [ -n "${COMPOSE_FILE+set}" ]; then echo "$COMPOSE_FILE"; else setting COMPOSE_FILE; fi; }

# Prints the engine of the compose files $1, or nothing if there are none.
engine_of() {
  case $1 in
    *compose.gpu.yaml*) echo vllm ;;
    *compose.tiny.yaml*) echo tiny ;;
    *compose.outside.yaml*) echo outside ;;
    ?*) echo ollama ;;
  esac
}

# Prints the compose files $1 with the services of further models, if `make up` has written them in this run (lib/models.sh).
with_services() {
  local file=.models/compose.yaml files=:$1:
  files=${files//:$file:/:}
  files=${files#:} files=${files%:}
  echo "$files${apart:+:$file}"
}

# Sets the engine, the user's choice of it (empty if there was none), and the address; see use_engine.
choose_engine() {
  local address files
  # shellcheck disable=SC2034 # setting in lib/dotenv.sh
  settings=$(settings_now) || exit
  address=$(setting STACK_PUBLISH)
  files=$(recorded_files)
  [ -z "$address" ] || split_address "$address" # before Compose refuses it with a message of its own
  # shellcheck disable=SC2034 # scripts/up
  chosen=${ENGINE:-$(engine_of "$files")}
  engine=${chosen:-ollama}
  [ "$engine" != outside ] || need_base_url
  need_size STACK_MEMORY
  need_size VLLM_SHM_SIZE
  use_engine "$engine"
  split_address "$(resolved STACK_PUBLISH)"
}

# Whether one service serves all models.
one_for_all() { case $engine in ollama | outside) return 0 ;; *) return 1 ;; esac; }

# Stops at a value of the setting $1 that Docker does not take for a number of bytes.
need_size() {
  local size
  size=$(setting "$1")
  [[ $size =~ ^([0-9]+(\.[0-9]+)?\ ?([kKmMgGtTpP][iI]?)?[bB]?)?$ ]] ||
    die "$1=$size is not a size of memory: use for example $1=$(default_of "$1")."
}

# Stops if the gateway's container could not reach the engine outside at LLM_BASE_URL.
need_base_url() {
  local url
  url=$(setting LLM_BASE_URL)
  case $url in
    "") die "ENGINE=outside needs the address of the engine: set LLM_BASE_URL, for Ollama on this machine to http://host.docker.internal:11434." ;;
    *://localhost | *://localhost[:/]* | *://127.* | *://0.0.0.0* | *://"["::*)
      die "LLM_BASE_URL=$url would be the gateway's own container: for an engine on this machine, set LLM_BASE_URL=http://host.docker.internal:PORT, with the engine's port." ;;
    http://?* | https://?*) ;;
    *) die "LLM_BASE_URL=$url is not the address of an engine: use for example http://host.docker.internal:11434." ;;
  esac
  need_model
}

# Stops if nothing names a model of the engine outside. The default is a name of Ollama's.
need_model() {
  local kind directory
  kind=$(setting LLM_BACKEND) directory=$(setting STACK_CONFIG_DIR)
  case $kind in "" | ollama) return ;; esac
  [ -n "$(setting LLM_MODEL)$(setting LLM_MODELS)" ] || [ -e "${directory:-config}/stack.yaml" ] ||
    die "ENGINE=outside with LLM_BACKEND=$kind needs the name of a model: set LLM_MODEL to one that the engine has."
}

# Prints those of the compose files $1 that are the user's own, each once and behind a colon.
own_files() {
  local file files own=""
  IFS=: read -ra files <<<"$1"
  for file in ${files[@]+"${files[@]}"}; do
    file=${file#"$PWD/"} file=${file#./}
    case $file in
      "" | compose.yaml | compose.gpu.yaml | compose.tiny.yaml | compose.outside.yaml | .models/compose.yaml) continue ;;
      compose.monitoring.yaml | compose.tls.yaml | compose.chat.yaml | compose.chat-tls.yaml) continue ;;
    esac
    case $own: in *":$file:"*) ;; *) own=$own:$file ;; esac
  done
  echo "$own"
}

# Prints the override that Compose reads by itself if COMPOSE_FILE is not set, or nothing.
override_file() {
  local file
  for file in compose.override.yml compose.override.yaml docker-compose.override.yml docker-compose.override.yaml; do
    [ ! -e "$file" ] || { echo "$file" && return; }
  done
}

# From here on, `docker compose` in this script uses the stack with engine $1. The user's own files come after the stack's, which
# they override.
use_engine() {
  local files recorded
  recorded=$(recorded_files)
  files=$(compose_files "$1") || exit
  files=$(with_parts "$files" "$recorded") || exit
  COMPOSE_FILE=$(with_services "$files$(own_files "$recorded:$(override_file)")")
  export COMPOSE_FILE
  merged=$(docker compose config --format json 2>&1) ||
    die "Compose does not accept the settings (${merged##*$'\n'}): correct that in .env or the shell, then run this again."
}

# Stops if the gateway would not start with the settings. Its image, which must be there, checks them in a container that reaches
# nothing and takes nobody's place, and in which the name of Caddy's network means nothing. The profile leaves out the other services:
# Compose would create their networks and volumes, and the one for progress, and `make doctor` may ask about an engine that this
# stack does not have.
need_settings() {
  local files others said
  IFS=: read -ra files <<<"$COMPOSE_FILE:-"
  others=$(docker compose config --services | sed '/^gateway$/d; s/.*/"&": {profiles: [unused]}, /' | tr -d '\n')
  said=$(docker compose "${files[@]/#/--file=}" --progress quiet run --rm --no-deps -T --env STACK_PROXY_NETWORK= gateway --check 2>&1 \
    <<<"services: {${others}gateway: {pull_policy: never, network_mode: none, volumes: [{type: tmpfs, target: /run/progress}], networks: !reset null, ports: !reset [], depends_on: !reset null}}") ||
    die "The gateway would not start with the settings as they are now (${said//$'\n'/; }): correct that in .env, the shell or config/, then run 'make up'."
}

# Prints the first value of $1 in the merged configuration: the shell, .env and the files' defaults.
resolved() { value_of "$1" <<<"$merged"; }

# Checks the file of the secret $1, which the setting $2 names and the user $3 of a container must be able to read. $4 is the
# command for that. Docker's own message about a missing file does not name the setting.
need_secret_file() {
  local file
  file=$(secret_file "$1")
  [ -n "$file" ] || return 0
  [ -e "$file" ] ||
    die "$2 names $file, which does not exist: correct the line in .env, or remove it."
  readable "$file" "$3" ||
    die "$2 names $file, which the container's user ($3) may not read: '${4:-chmod a+r} $file', then run this again."
}

# Whether the user $2 of a container may read the file $1, or enter the directory $1. On Docker Desktop any user may read any
# file.
readable() {
  local all=4 own=400 group=40
  [ -d "$1" ] && all=1 own=100 group=10
  [ "$(uname -s)" != Linux ] ||
    [ -n "$(find -L "$1" -prune \( -perm -$all -o -user "$2" -perm -$own -o -group "$2" -perm -$group \))" ]
}

# The directory on this machine that the gateway sees as /etc/stack.
config_directory() { grep -B 2 '"target": "/etc/stack"' <<<"$merged" | value_of source; }

# The file on this machine that the secret $1 comes from.
secret_file() { sed -n "/^  \"secrets\": {/,\$ { /^    \"$1\": {/,/}/p; }" <<<"$merged" | value_of file; }
