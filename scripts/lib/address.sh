# shellcheck shell=bash
# The address at which the gateway is published: its parts, the program that holds it, and requests to it.

# '127.0.0.1:9000' → host=127.0.0.1 port=9000; '[::1]:9000' → host=[::1]. $2 is the setting, STACK_PUBLISH unless given.
split_address() {
  local setting=${2:-STACK_PUBLISH} default
  host=${1%:*} port=${1##*:}
  case $host in
    \[*:*\] | [0-9]*.*.*.*[0-9]) ;;
    *) host= ;;
  esac
  case $port in
    "" | *[!0-9]* | 0?*) host= ;;
  esac
  [ -n "$host" ] && [ "$port" -le 65535 ] && return
  default=$(default_of "$setting")
  die "$setting=$1 is not an address and a port: use for example $default, or 0.0.0.0:${default##*:} for every interface."
}

on_loopback() { case $host in 127.* | "[::1]") ;; *) return 1 ;; esac; }

# The address at which a program on this machine reaches the gateway: one that means "all" is not a destination.
reachable_host() {
  case $host in
    0.0.0.0) echo 127.0.0.1 ;;
    "[::]") echo "[::1]" ;;
    *) echo "$host" ;;
  esac
}

# Prints the address at which the running stack is published, or nothing.
published() { published_at caddy 8443 || published_at gateway 9000 || true; }

# Prints the address on this machine of port $2 of the service $1. Some versions of Compose leave out the brackets of IPv6.
published_at() { docker compose port "$1" "$2" 2>/dev/null | sed -E 's/^([^[].*:.*):([0-9]+)$/[\1]:\2/'; }

# Whether one of the given services is to be published at $port. One that crashes and is restarted holds the port only at times.
is_own_port() {
  local service container
  for service; do
    container=$(docker compose ps --quiet "$service" 2>/dev/null) || continue
    case $(docker inspect --format '{{json .HostConfig.PortBindings}}' "$container" 2>/dev/null) in
      *"\"HostPort\":\"$port\""*) return ;;
    esac
  done
  return 1
}

# Stops if $host, from the setting $1, is not an address of this machine. Docker would take the running gateway down before it says so.
# Nothing is checked if Docker runs elsewhere, or without root, or if the kernel lets a program listen at any address.
need_own_address() {
  local docker
  case $host in 0.0.0.0 | "[::]" | 127.* | "[::1]") return ;; esac
  is_own_address 127.0.0.1 && ! is_own_address "$(tr -d '[]' <<<"$host")" || return 0 # without `ip`, neither is known
  ! grep -qx 1 /proc/sys/net/ipv[46]/ip_nonlocal_bind 2>/dev/null || return 0
  docker=$(docker info --format '{{.Name}} {{.SecurityOptions}}' 2>/dev/null) || return 0
  case $docker in *rootless*) return ;; "$(uname -n) "*) ;; *) return ;; esac
  die "$1=$host:$port is not at an address of this machine ('ip address' lists them): set $1 to one of them, or to 0.0.0.0:$port for every interface, then run this again."
}

# Whether the kernel knows $1 as an address of this machine.
is_own_address() { [[ $(ip -o route get "$1" 2>/dev/null) == local\ * ]]; }

# Stops if another program holds $port. The stack itself may hold it, after an earlier `make up`. $1 is the setting, STACK_PUBLISH
# unless given, and the services that it publishes follow.
need_free_port() {
  local own="" holder
  [ $# -gt 0 ] || set -- STACK_PUBLISH caddy gateway
  need_own_address "$1"
  [ "$port" = 0 ] && return # any free one
  [ "$1" != STACK_PUBLISH ] || own=$(published)
  [ "${own##*:}" = "$port" ] || is_own_port "${@:2}" && return
  holder=$(port_holder)
  [ -z "$holder" ] ||
    die "Port $port is taken by $holder: stop that program, or put another address into .env, such as $1=$host:$((port + 1)), then run this again."
}

# Prints what listens at $host:$port: a container, a program, or nothing.
port_holder() {
  local program container
  if command -v ss >/dev/null; then
    program=$(ss -Htlnp "sport = :$port" | listener)
  elif (exec 3<>"/dev/tcp/$(reachable_host | tr -d '[]')/$port") 2>/dev/null; then
    program="another program"
  fi
  [ -n "${program:-}" ] || return 0
  container=$(docker ps --filter "publish=$port" --format '{{.Names}}' 2>/dev/null | head -n 1) || true # or no Docker
  echo "${container:+the container }${container:-$program}"
}

# From ss's lines, the first program whose address is, or includes, $host.
listener() {
  awk -v host="$host" '
    { address = $4; sub(/:[0-9]+$/, "", address); sub(/%.*/, "", address) }
    address != host && address !~ /^(0\.0\.0\.0|\[::\]|\*)$/ && host !~ /^(0\.0\.0\.0|\[::\])$/ { next }
    match($0, /"[^"]+",pid=[0-9]+/) { split(substr($0, RSTART + 1, RLENGTH), part, /",pid=/); print part[1] " (pid " part[2] + 0 ")"; exit }
    { print "another program"; exit }'
}

# Prints the status and body of GET $1 at the gateway in one line, or nothing if it does not answer. Uses Bash's own sockets,
# so this machine needs neither curl nor Python. With TLS, the gateway's container asks Caddy, which must have a certificate by
# then. Here the certificate is not verified: it may be one for which only the clients have the authority.
get() {
  if has_part tls; then
    docker compose exec -T gateway python -c "$get_by_tls" "$(resolved STACK_TLS_NAME)" "$1" 2>/dev/null || true
    return
  fi
  (
    exec 3<>"/dev/tcp/$(reachable_host | tr -d '[]')/$port" || exit 0
    printf 'GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' "$1" >&3
    local line status body=
    read -r -t 10 _ status _ <&3 || exit 0
    while IFS= read -r -t 10 line <&3 && [ "$line" != $'\r' ]; do :; done
    IFS= read -r -t 10 body <&3 || true
    echo "$status $body"
  ) 2>/dev/null || true
}

get_by_tls='
import http.client, socket, ssl, sys
name, path = sys.argv[1:]
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
connection = http.client.HTTPConnection(name, timeout=10)
connection.sock = context.wrap_socket(socket.create_connection(("caddy", 8443), 10), server_hostname=name)
connection.request("GET", path)
answer = connection.getresponse()
print(answer.status, answer.read().decode().strip())'
