# shellcheck shell=bash
# .env: what `make up` decided and what the user set. Compose reads it; here it is checked and single lines are rewritten.

# Stops at a name that nothing reads: a setting with a typo would otherwise be a setting without effect.
check_dotenv() {
  [ -e .env ] || return 0
  local known unknown
  known=$(sed -nE 's/^#([A-Z][A-Z0-9_]*)=.*/\1/p' .env.example)
  unknown=$(sed -nE 's/^ *(export )? *((STACK|LLM|OLLAMA|VLLM|HF)_[A-Za-z0-9_]*) *=.*/\2/p' .env |
    grep -vxF "$known" | head -n 1) || return 0
  die ".env sets $unknown, which nothing reads: did you mean $(closest "$unknown" "$known")? (.env.example lists every name.)"
}

# The name in the list $2 that takes the fewest edits to become $1.
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

# The value .env gives to $1, or nothing.
dotenv() {
  [ -e .env ] || return 0
  sed -nE "s/^ *(export )?$1=//p" .env | tail -n 1 | sed -E "s/^(['\"])(.*)\1\$/\2/"
}

# Sets $1 to $2 in .env: rewrites that line or appends one, and keeps everything else. Mode 0600: it may hold keys.
record() {
  local new
  [ -e .env ] || printf '# Written by make up. .env.example lists everything that can stand here.\n' >.env
  new=$(mktemp .env.XXXXXX) # 0600, and in the same directory, so that mv replaces the file in one step
  NAME=$1 VALUE=$2 awk '
    $0 ~ "^ *(export )?" ENVIRON["NAME"] "=" { if (!done) print ENVIRON["NAME"] "=" ENVIRON["VALUE"]; done = 1; next }
    { print }
    END { if (!done) print ENVIRON["NAME"] "=" ENVIRON["VALUE"] }' .env >"$new"
  mv "$new" .env
}
