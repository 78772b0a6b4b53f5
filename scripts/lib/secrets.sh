# shellcheck shell=bash
# The files of secrets. A program reads them when it starts, and Compose does not see that one has changed.

# Prints a line for each service that reads such files all the time that it runs: its name and its secrets. The token of the model
# hub is not among them, because the provisioner starts with each `make up`.
secret_readers() { printf '%s\n' "gateway stack_api_keys stack_admin_keys stack_store_url" "caddy tls_certificate tls_key" "alertmanager alert_webhook"; }

# Starts each such service anew if one of its files has changed since it started. Nothing of a secret is compared or kept, but the
# time of its file's last change. An orphan may have the port that the new container publishes.
renew_secret_readers() {
  local reader name started changed
  while read -ra reader; do
    started=$(started_at "${reader[0]}")
    [ -n "$started" ] || continue
    changed=""
    for name in "${reader[@]:1}"; do ! changed_since "$started" "$(secret_file "$name")" || changed+="${changed:+, }$(secret_file "$name")"; done
    [ -n "$changed" ] || continue
    say "starting ${reader[0]} anew, because it read $changed before the last change"
    docker compose up --detach --no-deps --force-recreate --remove-orphans "${reader[0]}" </dev/null ||
      die "Docker could not start ${reader[0]}: see the message above."
  done < <(secret_readers)
}

# Whether the file $2, or what it links to, has changed since $1. Its ctime also tells of an older file that was moved there.
changed_since() { [ -f "$2" ] && [ -n "$(find "$2" -newerct "$1" 2>/dev/null)$(find -L "$2" -newerct "$1" 2>/dev/null)" ]; }
