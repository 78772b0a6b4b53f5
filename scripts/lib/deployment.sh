# shellcheck shell=bash
# The running deployment, for `make doctor`: what Docker knows of it goes to `stack doctor` in the gateway's container, which
# judges it and calls the gateway with a short-lived key.
# shellcheck disable=SC2154 # tls, complaint: scripts/doctor

# Prints the containers of this checkout's stack that run, or with --all every one, in the format $1.
containers() {
  local format=$1
  shift
  docker ps "$@" --filter "label=com.docker.compose.project=$(resolved name)" --format "$format"
}

is_up() { containers '{{.Label "com.docker.compose.service"}}' --all | grep -cv '^provision$' >/dev/null; }

examine_deployment() {
  local state name finding advice canary=() ended="" errors mistaken=""
  if [ -z "$(docker compose ps --quiet --status running gateway)" ]; then
    report failed stack.gateway "the gateway does not run (its last words: $(docker compose logs --no-log-prefix --tail 1 gateway 2>&1))" "see 'make logs', then run 'make up'"
    return
  fi
  (need_settings) 2>"$complaint" || { mistaken=yes && report_complaint stack.settings; }
  report_address
  report_clock
  errors=$(mktemp)
  while IFS=$'\t' read -r state name finding advice; do
    case $state in
      canary) canary=("$name" "$finding" "$advice") ;;
      end) ended=yes ;;
      *) [ "$mistaken:$name" = yes:settings ] || report "$state" "stack.$name" "$finding" "$advice" ;;
    esac
  done < <(tell | docker compose exec -T gateway stack doctor 2>"$errors")
  [ -n "$ended" ] ||
    report failed stack.checks "the checks in the gateway's container did not end ($(tail -n 1 "$errors"))" "run 'make up', which starts the gateway of this checkout, then run this again"
  rm -f "$errors"
  [ ${#canary[@]} = 0 ] || look_for "${canary[@]}"
}

# Whether the gateway answers where it is published, or Caddy does for it.
report_address() {
  local address
  address=$(published)
  [[ $address == *:[1-9]* ]] || return 0
  split_address "$address"
  case $(get /livez) in
    "200 "*) report ok stack.address "the gateway answers at $address" ;;
    *) report failed stack.address "the gateway runs, and nothing answers at $address, where it is published" "see 'make logs', and what the machine's firewall says about this port" ;;
  esac
}

# Prints what Docker knows of the running stack, one JSON object a line. gateway/cli/doctor/walls.py reads it.
tell() {
  local id service hash ids networks
  read -ra ids <<<"$(containers '{{.ID}}' | tr '\n' ' ')"
  docker inspect --format '{"container": {"service": {{json (index .Config.Labels "com.docker.compose.service")}}, "hash": {{json (index .Config.Labels "com.docker.compose.config-hash")}}, "mode": {{json .HostConfig.NetworkMode}}, "ports": {{json .NetworkSettings.Ports}}, "networks": {{json .NetworkSettings.Networks}} } }' "${ids[@]}"
  read -ra networks <<<"$(docker inspect --format '{{range $name, $_ := .NetworkSettings.Networks}}{{println $name}}{{end}}' "${ids[@]}" | sort -u | tr '\n' ' ')"
  docker network inspect --format '{"network": {"name": {{json .Name}}, "internal": {{json .Internal}}, "options": {{json .Options}} } }' "${networks[@]}"
  docker compose config --hash '*' | while read -r service hash; do printf '{"settings": "%s", "hash": "%s"}\n' "$service" "$hash"; done
  containers '{{.ID}} {{.Label "com.docker.compose.service"}}' | while read -r id service; do
    case $service in engine | engine-*) reached_by "$id" "$service" ;; esac
  done
  case $tls in
    ?*) printf '{"certificate": "%s", "at": "%s"}\n' "${tls%:*}" "$tls" ;;
    *) ! has_part tls || printf '{"certificate": "%s", "at": "caddy:8443"}\n' "$(resolved STACK_TLS_NAME)" ;;
  esac
}

# Tells the addresses of this machine that the engine $2, in the container $1, reaches. A second container tries it from the same
# network, because an engine's image may have no program for that. A closed port answers too.
reached_by() {
  local address
  read -ra address <<<"$(docker network inspect --format '{{if not .Internal}}{{range .IPAM.Config}}{{.Gateway}} {{end}}{{end}}' "${networks[@]}" | tr '\n' ' ')"
  docker run --rm --network "container:$1" --cap-drop ALL --security-opt no-new-privileges:true --read-only --entrypoint python \
    "$(docker inspect --format '{{.Image}}' "$(docker compose ps --quiet gateway)")" -c '
import json, socket, sys
for address in sys.argv[2:]:
    try:
        socket.create_connection((address, 9), 2).close()
    except ConnectionRefusedError:
        pass
    except OSError:
        continue
    print(json.dumps({"reached": address, "by": sys.argv[1]}))' "$2" ${address[@]+"${address[@]}"} </dev/null
}

# Compares the containers' clock with that of this machine. They differ if Docker runs in a virtual machine that has slept.
report_clock() {
  local before inside after drift=5
  before=$(date +%s)
  inside=$(docker compose exec -T gateway date +%s </dev/null)
  after=$(date +%s)
  if [ "$inside" -ge $((before - drift)) ] && [ "$inside" -le $((after + drift)) ]; then
    report ok stack.clock "the containers have the time of this machine"
  else
    report failed stack.clock "the containers' clock differs from this machine's by about $((inside - before)) s" "set the clock by NTP and restart Docker, whose virtual machine may have slept"
  fi
}

# Looks for the canary's mark $1 and key $2 in the logs of all containers. Its last request has the id $3, and has to be in the
# gateway's log before that log is taken for complete.
look_for() {
  local id service all="" tries=50 found=()
  while [ $((tries -= 1)) -ge 0 ]; do
    ! docker compose logs --no-log-prefix --tail 20000 gateway 2>/dev/null </dev/null | grep -cF "$3" >/dev/null || { all=yes && break; }
    sleep 0.2
  done
  while read -r id service; do
    ! docker logs --tail 20000 "$id" 2>&1 </dev/null | grep -cF -e "$1" -e "$2" >/dev/null || found+=("$service")
  done < <(containers '{{.ID}} {{.Label "com.docker.compose.service"}}')
  if [ ${#found[@]} -gt 0 ]; then
    report failed stack.canary "a prompt or a key can be read in the logs of: ${found[*]}" "set STACK_LOG_CONTENT=false, turn off what logs prompts in the engine, then run 'make up'"
  elif [ -z "$all" ]; then
    report skipped stack.canary "the gateway's log has no line of the last request (STACK_LOG_LEVEL, STACK_LOG_SAMPLE, or another logging driver), so what it would have told is unknown"
  else
    report ok stack.canary "a prompt and a key went all the way, and no log has them"
  fi
}
