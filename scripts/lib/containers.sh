# shellcheck shell=bash
# The stack's containers, for `make up`: since when each runs, what it does, and whether it stops again and again.

# Sets `containers` to a line for each of the stack: its service, state, exit status, number of restarts, health and id. Compose
# would take ten times as long, and this is repeated every second.
look() {
  local ids
  ids=$(docker ps --all --quiet --filter "label=com.docker.compose.project=$(resolved name)" --filter label=com.docker.compose.oneoff=False)
  # With .State.Health, Docker would stop at a container without a health check.
  # shellcheck disable=SC2086 # each id is a word; a container may be gone by now
  containers=$(docker inspect --format '{{index .Config.Labels "com.docker.compose.service"}} {{.State.Status}} {{.State.ExitCode}} {{.RestartCount}} {{with index .State "Health"}}{{.Status}}{{else}}-{{end}} {{.Id}}' $ids 2>/dev/null) || true
  [ -n "${first_look+set}" ] || first_look=$containers first_moment=$(date +%s)
}

# Prints the field with number $2 of the line of the service $1, and perhaps the one with number $3, or nothing if it has no
# container.
about() { awk -v service="$1" -v one="$2" -v two="${3:-}" '$1 == service { print $one (two ? " " $two : "") }' <<<"$containers"; }

# Prints the time at which the container of the service $1 was started, to the second, or nothing if none runs.
started_at() {
  local id time
  id=$(docker compose ps --quiet --status running "$1" 2>/dev/null | head -n 1) || return 0
  [ -n "$id" ] && time=$(docker inspect --format '{{.State.StartedAt}}' "$id" 2>/dev/null) || return 0
  time=${time%%[.Z]*}
  echo "${time/T/ } UTC"
}

# A service that has ended, or that Docker restarts again and again, will not become ready. Docker says "restarting" only for the
# moment between an end and the next start, so the restarts since the first look are counted too.
stop_if_dead() {
  local said
  case $(about "$1" 2 4) in
    exited* | dead* | restarting\ [2-9]* | restarting\ 1?*) ;;
    *) [ "$(restarts_of "$1")" -ge 3 ] || return 0 ;;
  esac
  [ "$1" != gateway ] || ! lacked_memory gateway ||
    die "The gateway stops again and again, because it needs more memory than it may use: raise STACK_MEMORY or lower STACK_WORKERS, then run this again."
  said=$(last_line "$1")
  die "The $1 stops again and again: ${said:-it has logged nothing} ('make logs' shows more)."
}

# Prints how often Docker has restarted a container of the service $1 since the first look.
restarts_of() {
  printf '%s\n' "$first_look" now "$containers" | awk -v service="$1" '
    NF == 1 { now = 1 }
    !now { before[$6] = $4 }
    now && $1 == service && $4 - before[$6] > most { most = $4 - before[$6] }
    END { print most + 0 }'
}

# Whether the kernel has killed a process of the service $1 for its memory. Newer versions of Docker forget it at the next start.
lacked_memory() {
  local id
  id=$(about "$1" 6)
  [ "$(docker inspect --format '{{.State.OOMKilled}}' "$id" 2>/dev/null)" = true ] ||
    [ -n "$(docker events --since "$first_moment" --until "$(date +%s)" --filter "container=$id" --filter event=oom 2>/dev/null)" ]
}

last_line() { docker logs --tail 1 "$(about "$1" 6)" 2>&1; }
