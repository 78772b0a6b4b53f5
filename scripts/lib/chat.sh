# shellcheck shell=bash
# shellcheck disable=SC2154 # models: lib/models.sh
# The chat window's secrets: a key of its own, which tells its users apart, the signing secret of that key, and the secret of
# Open WebUI's sessions. They are in a file that Open WebUI reads at its start (compose.chat.yaml).
chat_file=.secrets/chat

# Makes the file, unless it has a key that the gateway knows. The gateway starts first, because it keeps the keys.
give_chat_a_key() {
  local key made session
  has_part chat || return 0
  docker compose up --detach --build gateway || die "Docker could not start the gateway: see the message above."
  until docker compose exec -T gateway stack keys list --json >/dev/null 2>&1; do
    look
    stop_if_dead gateway
    sleep 1
  done
  key=$(chat_secret OPENAI_API_KEY) key=${key#sk-stack-}
  [ -z "$key" ] || ! docker compose exec -T gateway stack keys show "${key%%-*}" >/dev/null 2>&1 || return 0
  say "creating a key for the chat window, and its secrets in $chat_file"
  made=$(docker compose exec -T gateway stack keys create "chat window" --users --json) ||
    die "The gateway could not create a key for the chat window: see the message above."
  session=$(chat_secret WEBUI_SECRET_KEY)
  write_secret "$chat_file" <<TEXT
OPENAI_API_KEY=$(value_of secret <<<"$made")
FORWARD_USER_INFO_HEADER_JWT_SECRET=$(value_of signing_secret <<<"$made")
WEBUI_SECRET_KEY=${session:-$(random_hex)}
TEXT
  docker compose rm --force --stop chat >/dev/null 2>&1 || true # it read the file at its start
}

chat_secret() { [ ! -s "$chat_file" ] || sed -n "s/^$1=//p" "$chat_file"; }

# Records a small model of LLM_MODELS for the chat window's own questions, if there is one and .env has no line for it.
name_task_model() {
  local name small='[:-]([0-9]+m|(0\.[0-9]+|1(\.[0-9]+)?|2)b)($|[:-])' other='embed|rerank|whisper|bge|minilm|paraphrase'
  has_part chat && ! { [ -e .env ] && dotenv_values .env | grep -q '^ *"CHAT_TASK_MODEL": '; } || return 0
  for name in "${models[@]:1}"; do
    tr '[:upper:]' '[:lower:]' <<<"$name" | grep -E "$small" | grep -qvE "$other" || continue
    record CHAT_TASK_MODEL "$name"
    return
  done
}
