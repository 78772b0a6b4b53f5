# shellcheck shell=bash
# Debian's programs that tests and benchmarks need beside the virtual environments.

PATH=$PATH:/usr/sbin # where Debian keeps nginx, and not in every user's PATH

# Installs the given programs if they are missing: nginx, wrk, chromium, certutil, promtool with prometheus.
need_tools() {
  local tool packages=()
  for tool; do
    command -v "$tool" >/dev/null && continue
    case $tool in
      nginx) packages+=(nginx-light) ;;
      promtool) packages+=(prometheus) ;;
      certutil) packages+=(libnss3-tools) ;;
      *) packages+=("$tool") ;;
    esac
  done
  [ ${#packages[@]} -gt 0 ] || return 0
  [ -e /etc/debian_version ] && [ "$(id -u)" = 0 ] ||
    die "${packages[*]} is missing: install it (on Debian and Ubuntu 'apt-get install ${packages[*]}'), then run this again."
  install_packages "${packages[@]}"
}

# Debian's packages of nginx and Prometheus start a server. A policy-rc.d that exits with 101 ("not allowed") prevents that.
install_packages() (
  policy=/usr/sbin/policy-rc.d
  say "installing ${*} (no server is started)"
  if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -qq --no-install-recommends "$@" >/dev/null
)
