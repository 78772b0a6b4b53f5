# shellcheck shell=bash
# .env: the choices of `make up` and the user's settings. Only Compose reads the file, here too, so quotes, comments, `export`,
# `$` and line ends mean what they mean to Compose. These functions check .env and rewrite single lines.

# The settings whose values are secrets. A `$` in a secret is hardly ever meant as a variable.
secrets="STACK_API_KEYS STACK_ADMIN_KEYS STACK_STORE_URL LLM_API_KEY OTEL_EXPORTER_OTLP_HEADERS"

# Stops at a file that Compose cannot read, at a name that nothing reads there (otherwise a setting with a typo would have no
# effect), and at a secret that Compose reads differently from how it is written.
check_dotenv() {
  [ -e .env ] || return 0
  local values known unknown
  [ -e .env.example ] || die ".env.example, which lists all settings, is missing: copy it into this directory again, then run this again."
  values=$(dotenv_values .env) || exit
  known=$(sed -nE 's/^#([A-Z][A-Z0-9_]*)=.*/\1/p' .env.example)
  unknown=$(sed -nE 's/^ *"((STACK|LLM|OLLAMA|VLLM|LLAMA|HF|OTEL|PROMETHEUS|ALERTMANAGER|GRAFANA|CADDY|CHAT)_[A-Za-z0-9_]*)": .*/\1/p' <<<"$values" |
    grep -vxF "$known" | head -n 1) || true
  [ -z "$unknown" ] ||
    die ".env sets $unknown, which nothing reads: did you mean $(closest "$unknown" "$known")? (.env.example lists every name.)"
  unknown=$(sed -nE 's/^ *"(ENGINE|MONITORING|TLS|CHAT|WITH)": .*/\1/p' <<<"$values" | head -n 1) || true
  [ -z "$unknown" ] ||
    die ".env sets $unknown, which is a choice for one command and has no effect there: remove the line, and run '$unknown=… make up', which records the choice."
  ! grep -qF '$' .env || need_whole_secrets "$values" || exit
}

# Compares each secret with the text in .env, as if `$` had no meaning. $1 are the values that Compose reads. In a shell of its own,
# which also removes the copy if it is interrupted.
need_whole_secrets() (
  mark=$'\x01'
  copy=$(mktemp) # 0600
  trap 'rm -f "$copy"' EXIT
  tr '$' "$mark" <.env >"$copy"
  plain=$(dotenv_values "$copy" 2>/dev/null) || plain=$1
  for name in $secrets; do
    value=$(value_of "$name" <<<"$1")
    written=$(value_of "$name" <<<"$plain")
    [ "$value" = "${written//$mark/\$}" ] && continue # within single quotes, or not a name after it
    written=${written//$mark$mark/\$} written=${written//\\$mark/\$} written=${written//$mark/\$}
    [ "$value" = "$written" ] ||
      die "$name in .env contains a \$, which begins the name of a variable (${#written} characters are written, and Compose reads ${#value}): write \$\$ for each \$, or put single quotes around the value."
  done
)

# The value that .env gives to $1, or nothing.
dotenv() { [ ! -e .env ] || dotenv_values .env | value_of "$1"; }

# The value of $1 for Compose: the shell's, if $1 is set there, otherwise .env's.
setting() { value_of "$1" <<<"${settings:-$(settings_now)}"; }

# Prints the default of the setting $1.
default_of() { sed -n "s/^#$1=//p" .env.example; }

# Prints all settings. A script that reads several of them keeps the result in `settings`, because each call of Compose takes a
# tenth of a second. `record` forgets it.
settings_now() {
  compose_config "x-settings: {$(sed -nE 's/^#([A-Z][A-Z0-9_]*)=.*/\1: "${\1-}"/p' .env.example | tr '\n' ,)}"
}

# All values of the file $1, as Compose reads such files: JSON, each in a line `"NAME": "value"`.
dotenv_values() {
  local file
  file=$(sed -e "s/'/''/g" -e 's/\$/$$/g' <<<"$1") # a path may have either, and they mean something to YAML and to Compose
  compose_config "services: {it: {image: it, env_file: ['$file']}}" |
    sed -n '/^ *"environment": {$/,/^ *}/ { /^ *"[^"]*": ["n]/p; }'
}

# What Compose makes of the text $1 as the only compose file.
compose_config() {
  local said
  said=$(docker compose --project-name it --project-directory . --file - config --format json <<<"$1" 2>&1) ||
    die "Compose cannot read .env (${said##*$'\n'}): correct that line, then run this again."
  printf '%s\n' "$said"
}

# The first value of $1 in the JSON on standard input, without its escapes. Compose writes a `$` as `$$`.
value_of() {
  awk -v name="$1" '
    !done && match($0, "^ *\"" name "\": ") {
      done = 1 # reads on, because a closed pipe would stop the writer
      text = substr($0, RLENGTH + 1)
      sub(/,$/, "", text)
      if (text == "null") next
      if (text ~ /^"/) text = substr(text, 2, length(text) - 2)
      while (i++ < length(text)) {
        one = substr(text, i, 1)
        if (one == "\\") {
          one = substr(text, ++i, 1)
          if (one == "n") one = "\n"
          if (one == "t") one = "\t"
          if (one == "u") { one = character[substr(text, i + 1, 4)]; i += 4 }
        } else if (one == "$" && substr(text, i + 1, 1) == "$") i++
        value = value one
      }
      print value
    }
    BEGIN { character["003c"] = "<"; character["003e"] = ">"; character["0026"] = "&"; character["0001"] = "\001" }'
}

# Prints the name in the list $2 that needs the fewest edits to become $1.
closest() {
  awk -v wanted="$1" '
    function least(a, b) { return a < b ? a : b }
    function edits(a, b,   i, j, d) {
      for (i = 0; i <= length(a); i++) d[i, 0] = i
      for (j = 0; j <= length(b); j++) d[0, j] = j
      for (i = 1; i <= length(a); i++)
        for (j = 1; j <= length(b); j++)
          d[i, j] = least(d[i-1, j-1] + (substr(a, i, 1) != substr(b, j, 1)), 1 + least(d[i-1, j], d[i, j-1]))
      return d[length(a), length(b)]
    }
    { n = edits(wanted, $1); if (best == "" || n < fewest) { fewest = n; best = $1 } }
    END { print best }' <<<"$2"
}

# Sets $1 to $2 in .env, if the value differs. Rewrites the line or appends one, and keeps all other bytes. The file is complete
# at any moment. Its mode is 0600, because it may hold keys.
record() {
  local file before after
  [ -e .env ] || printf '# Written by make up. .env.example lists everything that can stand here.\n' >.env
  [ "$(cat .env)" = "${recorded_text-unknown}" ] || { recorded_values=$(dotenv_values .env) && recorded_text=$(cat .env); } || exit
  before=$recorded_values
  [ "$(value_of "$1" <<<"$before")" != "$2" ] || return 0
  file=$(readlink -f .env)
  new=$(mktemp "$file.XXXXXX") # 0600, and in the same directory, so that mv replaces the file in one step
  trap 'rm -f "$new"' EXIT # not local, because the trap may run after this function
  NAME=$1 VALUE=$(in_quotes "$2") awk '
    $0 ~ "^[ \t]*(export[ \t]+)?" ENVIRON["NAME"] "[ \t]*[=:]" { if (!done) print ENVIRON["NAME"] "=" ENVIRON["VALUE"]; done = 1; next }
    { print }
    END { if (!done) print ENVIRON["NAME"] "=" ENVIRON["VALUE"] }' "$file" >"$new"
  after=$(dotenv_values "$new") || exit
  [ "$(value_of "$1" <<<"$after")" = "$2" ] && [ "$(others "$1" <<<"$before")" = "$(others "$1" <<<"$after")" ] ||
    die "The line for $1 in .env could not be changed alone: put $1=$(in_quotes "$2") into it, then run this again."
  mv "$new" "$file"
  trap - EXIT
  settings="" recorded_values=$after recorded_text=$(cat .env)
}

# The lines of all names but $1.
others() { grep -v "^ *\"$1\": " | sed 's/,$//'; }

# Prints $1 as a value for .env, in single quotes if one of its characters could have a meaning there.
in_quotes() {
  case $1 in
    *[!A-Za-z0-9_./:@,+=-]*) printf "'%s'" "$1" ;;
    *) printf '%s' "$1" ;;
  esac
}
