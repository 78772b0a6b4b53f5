# shellcheck shell=bash
# Docker and its Compose plugin: checks that they are installed, usable and new enough, or stops with a message.

# Named here because the base image, the Compose plugin and the fallback use it.
base_image=stack-base:trixie

# Compose takes an empty value for the name of a file.
[ -n "${COMPOSE_FILE-unset}" ] || unset COMPOSE_FILE

need_docker() {
  command -v docker >/dev/null ||
    die "Docker is not installed: install Docker Engine or Docker Desktop (https://docs.docker.com/get-docker/), then run this again."
  need_own_files
  local complaint
  complaint=$(docker version 2>&1 >/dev/null) && return
  case $complaint in
    *"permission denied"*)
      die "You are not allowed to use the Docker daemon: run 'sudo usermod -aG docker $(id -un)', log out and in, then run this again." ;;
    *)
      die "The Docker daemon does not answer${DOCKER_HOST:+ at DOCKER_HOST=$DOCKER_HOST}: start it (Docker Desktop, or 'sudo systemctl start docker'), then run this again." ;;
  esac
}

# Stops at a .env or .secrets that this user may not read, as after `sudo make up`. Compose would call the file malformed.
need_own_files() {
  local file theirs=()
  for file in .env .secrets .models; do [ ! -e $file ] || [ -O $file ] || theirs+=("$file"); done
  for file in .env .secrets; do
    # shellcheck disable=SC2012 # stat's options differ between systems
    [ ! -e $file ] || [ -r $file ] ||
      die "$file belongs to $(ls -ld $file | awk '{ print $3 }'), and you may not read it: 'sudo chown -R $(id -un) ${theirs[*]-$file}', then run this again."
  done
}

# Compose 2.24.4 is the first with both !reset and !override, which the engines' overrides use.
need_compose() {
  if ! compose_is_new_enough; then
    ! can_build_base || install_compose
    compose_is_new_enough || refuse_compose
  fi
  need_project_name
  leave_out_deleted_override
}

refuse_compose() {
  die "Docker Compose 2.24.4 or newer is needed (${compose_version:-none} is here): install the Compose plugin (https://docs.docker.com/compose/install/linux/), then run this again."
}

compose_is_new_enough() {
  compose_version=$(docker compose version --short 2>/dev/null) || return
  awk -F. '{ sub(/^v/, "", $1); exit !($1 > 2 || ($1 == 2 && ($2 > 24 || ($2 == 24 && $3 + 0 >= 4)))) }' <<<"$compose_version"
}

# Stops if the stack has no name. Compose makes it of the Latin letters and digits in the name of the directory.
need_project_name() {
  case ${PWD##*/} in *[A-Za-z0-9]*) return ;; esac
  [ -n "${COMPOSE_PROJECT_NAME:-}" ] || [ -n "$(dotenv COMPOSE_PROJECT_NAME)" ] ||
    die "The stack has no name, because the name of its directory, ${PWD##*/}, has no Latin letter and no digit: set COMPOSE_PROJECT_NAME in .env, such as COMPOSE_PROJECT_NAME=stack."
}

# Takes an override that was deleted out of COMPOSE_FILE, in this process alone. `make up` had recorded it there (tell_override in
# scripts/up), and Compose would stop at its name.
leave_out_deleted_override() {
  local files file deleted="" rest=""
  grep -q 'override\.ya\{0,1\}ml' <<<"${COMPOSE_FILE-$(cat .env 2>/dev/null)}" || return 0
  files=$(setting COMPOSE_FILE) || exit
  IFS=: read -ra files <<<"$files"
  for file in ${files[@]+"${files[@]}"}; do
    case ${file#./} in
      compose.override.yml | compose.override.yaml | docker-compose.override.yml | docker-compose.override.yaml)
        [ -e "$file" ] || { deleted=$file && continue; } ;;
    esac
    rest=$rest${rest:+:}$file
  done
  [ -n "$deleted" ] || return 0
  say "$deleted is in COMPOSE_FILE and does not exist any more, so it is left out ('make up' removes it from .env)" >&2
  export COMPOSE_FILE=${rest:-compose.yaml}
}

# Stops if the containers of this stack's name were started from another directory. A clone has the name of its directory, so two
# clones may have the same one.
need_own_project() {
  local ids name directory
  read -ra ids <<<"$(docker compose ps --all --quiet 2>/dev/null | tr '\n' ' ')"
  [ ${#ids[@]} -gt 0 ] || return 0
  while IFS=$'\t' read -r name directory; do
    [ "$directory" -ef . ] || is_gone "$directory" || # this clone was moved, or the other one is gone
      die "The stack with the name $name was started from $directory, and not from here: run 'make down' there, or set COMPOSE_PROJECT_NAME in .env to another name, then run this again."
  done < <(docker inspect --format '{{index .Config.Labels "com.docker.compose.project"}}{{"\t"}}{{index .Config.Labels "com.docker.compose.project.working_dir"}}' "${ids[@]}" | sort -u)
}

# Whether the directory $1 does not exist. In a directory that this user may not enter, such as another user's home, it may exist.
is_gone() {
  local up=$1
  [ ! -e "$1" ] || return 1
  while [ ! -d "$up" ]; do up=$(dirname "$up"); done
  [ -x "$up" ]
}

# mmdebstrap and apt are programs of Debian, and only root can create a root file system.
can_build_base() { [ -e /etc/debian_version ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

# Debian 13's packages have the two plugins as single programs, which also run on older systems.
install_compose() {
  local plugins=${DOCKER_CONFIG:-$HOME/.docker}/cli-plugins container
  say "Docker Compose 2.24.4 or newer is missing here: installing Debian 13's into $plugins"
  "$(dirname "${BASH_SOURCE[0]}")/../base-image"
  container=$(docker create "$base_image" sh -ec '
    apt-get update -qq
    cd /tmp && apt-get download -qq docker-compose docker-buildx
    for package in *.deb; do dpkg -x "$package" /unpacked; done')
  docker start --attach "$container" >/dev/null 2>&1 || true
  mkdir -p "$plugins"
  docker cp "$container:/unpacked/usr/libexec/docker/cli-plugins/." "$plugins" >/dev/null || true
  docker rm --force "$container" >/dev/null
}
