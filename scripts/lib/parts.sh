# shellcheck shell=bash
# The parts that may run beside the stack. Each is a compose file of its own, compose.NAME.yaml, which NAME=on adds and NAME=off
# removes, with the name in capitals: `MONITORING=on make up`. `WITH=chat,tls make up` adds several.
parts=(monitoring tls chat)

# Prints the settings that name the images of part $1. Each is the name of a service, in capitals, and _IMAGE.
images_of() {
  case $1 in
    monitoring) echo PROMETHEUS_IMAGE ALERTMANAGER_IMAGE GRAFANA_IMAGE ;;
    tls) echo CADDY_IMAGE ;;
    chat) echo CHAT_IMAGE ;;
  esac
}

# Prints a line for each address at which part $1 is published: the setting, and the services that may publish it.
published_by() {
  case $1 in
    monitoring) printf '%s\n' "GRAFANA_PUBLISH grafana" "PROMETHEUS_PUBLISH prometheus" ;;
    chat) echo "CHAT_PUBLISH chat caddy" ;;
  esac
}

# Prints the compose files $1 with each part as the user chose it. Otherwise it stays as it is in the files $2, those of the
# earlier choice. compose.chat-tls.yaml is there if the chat window is behind Caddy.
with_parts() {
  local files=:$1: with=${WITH:-} part file switch choice wanted
  read -ra wanted <<<"${with//,/ }"
  for part in ${wanted[@]+"${wanted[@]}"}; do
    case " ${parts[*]} " in *" $part "*) ;; *) die "WITH=$with: '$part' is not known: use ${parts[*]}, with commas between them." ;; esac
  done
  for part in "${parts[@]}"; do
    file=compose.$part.yaml switch=$(switch_of "$part")
    choice=${!switch:-}
    case " ${wanted[*]-} " in *" $part "*) choice=${choice:-on} ;; esac
    [ -n "$choice" ] || case :$2: in *:$file:*) choice=on ;; *) choice=off ;; esac
    files=${files//:$file:/:}
    case $choice in
      on) files=$files$file: ;;
      off) ;;
      *) die "$switch=$choice is not known: use on or off." ;;
    esac
  done
  files=${files//:compose.chat-tls.yaml:/:}
  case $files in *:compose.tls.yaml:compose.chat.yaml:*) files=${files}compose.chat-tls.yaml: ;; esac
  files=${files#:}
  echo "${files%:}"
}

switch_of() { echo "$1" | tr '[:lower:]' '[:upper:]'; }

# Whether $1 is a part of the stack.
has_part() { case :$COMPOSE_FILE: in *:compose.$1.yaml:*) return 0 ;; *) return 1 ;; esac; }

# Stops if a part was chosen and its images cannot be had. The stack itself needs none of them.
# shellcheck disable=SC2154 # unanswered: lib/images.sh
reach_parts() {
  local part name image
  for part in "${parts[@]}"; do
    has_part "$part" || continue
    for name in $(images_of "$part"); do
      image=$(image_of_part "$name")
      within_reach "$image" ||
        die "No registry answers for $image ($unanswered): load the image ('docker load'), set $name to a mirror that answers, or run '$(switch_of "$part")=off make up'."
    done
  done
}

pull_parts() {
  local part name
  for part in "${parts[@]}"; do
    ! has_part "$part" || for name in $(images_of "$part"); do pull "$(image_of_part "$name")"; done
  done
}

# Prints the image of the setting $1: the base of an image that is built here, or a service's own.
image_of_part() {
  local service image
  image=$(resolved "$1")
  if [ -n "$image" ]; then
    echo "$image"
    return
  fi
  service=$(echo "${1%_IMAGE}" | tr '[:upper:]' '[:lower:]')
  docker compose config --images "$service" | head -n 1
}
