# shellcheck shell=bash
# Debian's programs that tests and benchmarks need beside the virtual environments.

PATH=$PATH:/usr/sbin # where Debian keeps nginx, and not in every user's PATH

os_release=/etc/os-release

# Installs the given programs if they are missing: nginx, wrk, chromium, certutil, promtool with prometheus. In the place of
# chromium, any browser that tests/support/browser.py finds will do.
need_tools() {
  local tool packages=()
  for tool; do
    if [ "$tool" = chromium ]; then has_browser && continue; else command -v "$tool" >/dev/null && continue; fi
    case $tool in
      chromium) ! grep -qx 'ID="*ubuntu"*' "$os_release" 2>/dev/null ||
        die "Chromium is missing, and Ubuntu's archive has it only as a snap: install Google Chrome (https://www.google.com/chrome/), then run this again."
        packages+=(chromium) ;;
      nginx) packages+=(nginx-light) ;;
      promtool) packages+=(prometheus) ;;
      certutil) packages+=(libnss3-tools) ;;
      *) packages+=("$tool") ;;
    esac
  done
  [ ${#packages[@]} -gt 0 ] || return 0
  [ -e /etc/debian_version ] && [ "$(id -u)" = 0 ] ||
    die "${packages[*]} is missing: install it (on Debian and Ubuntu 'apt-get install ${packages[*]}'), then run this again."
  install_packages "${packages[@]}" ||
    die "${packages[*]} could not be installed. Check that this machine reaches its distribution's archive (apt-get update), then run this again."
}

# Whether there is a browser that starts. Ubuntu's chromium-browser is a script that asks for the snap.
has_browser() {
  local name
  for name in google-chrome chromium chromium-browser; do "$name" --version >/dev/null 2>&1 && return; done
  return 1
}

# Debian's packages of nginx and Prometheus start a server. A policy-rc.d that exits with 101 ("not allowed") prevents that.
install_packages() (
  policy=/usr/sbin/policy-rc.d
  say "installing ${*} (no server is started)"
  if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy" || return
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -qq --no-install-recommends "$@" >/dev/null
)
