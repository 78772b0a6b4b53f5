# shellcheck shell=bash
# The GPU memory of several models on vLLM. Each model's vLLM takes a share of every GPU when it starts, and keeps it, so the
# shares are decided before anything starts: in proportion to what each model needs, or as VLLM_GPU_SHARES says. With
# VLLM_SLEEP=on the models take turns, and each gets what the others leave when they sleep.
# shellcheck disable=SC2154 # models: lib/models.sh; gpus, weights and others: lib/preflight.sh; context: lib/context.sh

unknown_length=8192 # tokens that are counted for a further model, if it is unknown how many it can read
asleep_room=2 # GB of each GPU that a vLLM keeps when it sleeps
# shellcheck disable=SC2034 # lib/models.sh
start_wait=300 # seconds for STACK_RESUME_WAIT if the models take turns: for so long the others sleep so that a dead vLLM can start

# Whether vLLM runs once for each of several models.
shares_gpus() { [ "$engine" = vllm ] && served_apart; }

# Sets `sleeps` if the models take turns.
choose_turns() {
  local given
  sleeps="" given=$(setting VLLM_SLEEP)
  case ${given:-off} in
    off) ;;
    on) if shares_gpus; then need_waker && sleeps=yes; else say "VLLM_SLEEP=on does nothing here: it is for several models (LLM_MODELS) on vLLM"; fi ;;
    *) die "VLLM_SLEEP=$given is not known: use on or off." ;;
  esac
}

# Stops if a file of the operator's describes the engines, and does not tell the gateway to wake them.
need_waker() {
  local file
  file=$(config_directory)/stack.yaml
  [ ! -r "$file" ] || grep -qE '^[^#]*\bgpu:' "$file" ||
    die "With VLLM_SLEEP=on the gateway has to wake the models, and $file does not say that their engines share a GPU: give each of them the same gpu there (README, 'More models than fit')."
}

# Sets `facts`, given_shares, and gpu_part, the part of each GPU's memory for all models together.
know_models() {
  facts=$(list_facts)
  gpu_part=$(argument gpu-memory-utilization)
  given_shares=$(setting VLLM_GPU_SHARES) given_shares=${given_shares// /}
  [ -z "$given_shares" ] || check_given_shares
  [ -z "$sleeps" ] || share_in_turn
}

# Sets given_shares to what each model may have while the others sleep.
share_in_turn() {
  [ -z "$given_shares" ] ||
    die "VLLM_GPU_SHARES=$given_shares divides the GPU, and with VLLM_SLEEP=on the models take turns: remove one of the two settings."
  given_shares=$(awk -v part="$gpu_part" -v smallest="$(smallest_gpu)" -v models=${#models[@]} -v keeps=$asleep_room 'BEGIN {
    share = int(1000 * (part - (smallest + 0 ? keeps * (models - 1) / smallest : 0))) / 1000
    for (text = share = share > 0 ? share : 0; --models; ) text = text "," share
    print text
  }')
}

# Prints a line for each model: its GB of weights, the kB of a token, and the most tokens, the first two - if unknown. Call it
# in a subshell, because it sets the variables of the checks.
list_facts() {
  local most=$no_bound # the first model gets whatever number the user sets
  for model in "${models[@]}"; do
    size_model
    [[ $(listed 6) != [0-9]* ]] || most=$(listed 6)
    echo "${weights:--} ${token_kb:--} $most"
    most=$unknown_length
  done
}

shares_example="set VLLM_GPU_SHARES to one part of the GPU's memory for each model, in the order of LLM_MODELS, such as 0.6,0.3"

check_given_shares() {
  [ "$(awk -F , '{ print NF }' <<<"$given_shares")" = ${#models[@]} ] ||
    die "VLLM_GPU_SHARES=$given_shares is not one share for each of the ${#models[@]} models of LLM_MODELS: $shares_example."
  awk -F , '{ for (i = 1; i <= NF; i++) { if ($i !~ /^[0-9]*\.?[0-9]+$/ || $i <= 0) exit 1; sum += $i }; exit sum > 1.0001 }' <<<"$given_shares" ||
    die "VLLM_GPU_SHARES=$given_shares is not a list of numbers above 0 that add up to at most 1: $shares_example."
}

# Prints for each model the GB that it needs on each GPU if a conversation has $1 tokens, and its share of the GPU's memory, each
# - if unknown.
divide() {
  awk -v tokens="$1" -v given="$given_shares" -v part="$gpu_part" -v over="$(argument tensor-parallel-size)" -v room="$gpu_room" '
    !NF { next }
    $1 == "-" { need[NR] = "-"; unknown = 1; next }
    { sum += need[NR] = ($1 + (tokens < $3 ? tokens : $3) * $2 / 1e6) / over + room }
    END {
      split(given, share, ",")
      for (i = 1; i in need; i++) {
        if (given == "") share[i] = unknown ? "-" : int(1000 * part * need[i] / sum) / 1000
        print need[i] == "-" ? "-" : sprintf("%.1f", need[i]), share[i] == "" ? "-" : share[i]
      }
    }' <<<"$facts"
}

# Whether all models fit if a conversation has $1 tokens: each into its share, or all together if no shares are given.
all_fit() {
  [ "$gpus" = 0 ] || divide "$1" | awk -v given="$given_shares" -v part="$gpu_part" -v smallest="$(smallest_gpu)" '
    { sum += $1; if ($1 + 0 > $2 * smallest) over = 1 }
    END { exit given == "" ? sum > part * smallest : over }'
}

# Prints the GB of memory of the smallest GPU, or 0 if the driver does not answer.
smallest_gpu() {
  local mebibytes
  mebibytes=$(gpu_memory 2>/dev/null | sort -n | head -n 1) || mebibytes=0
  calculate "${mebibytes:-0} * 1.048576 / 1000"
}

# Sets `shares`, the share of each model at the chosen context.
share_gpus() {
  local need share
  shares=()
  while read -r need share; do shares+=("$share"); done < <(divide "${context:-0}")
}

# Checks that each model has a share.
need_shares() {
  local index listing=""
  for index in "${!models[@]}"; do
    [ "${shares[index]}" != - ] ||
      die "The models of LLM_MODELS share the GPU, and the size of $(unknown_models) is unknown: $shares_example."
    listing+="${listing:+, }${models[index]} ${shares[index]}"
  done
  echo "GPU shares: $listing ($([ -n "$sleeps" ] && echo "VLLM_SLEEP=on: they take turns" || echo "VLLM_GPU_SHARES=$(setting VLLM_GPU_SHARES)"))"
}

# Prints the names of the models whose size is unknown.
unknown_models() {
  local index=0 weights rest names=""
  while read -r weights rest; do
    [ "$weights" != - ] || names+="${names:+, }${models[index]}"
    index=$((index + 1))
  done <<<"$facts"
  echo "$names"
}

# Prints the GB of the machine's memory for the weights of those that sleep. While two change places, it has those of all.
asleep_weights() { if [ -n "$sleeps" ]; then awk '{ sum += $1 } END { print sum }' <<<"$facts"; else echo 0; fi; }

# Checks that all models fit. The message names each with the GB that it needs.
need_shared_memory() {
  local model index=0 need share have over own needs listing="" sum=0
  unreserved && return
  gpus_answer || return 0
  have=$(smallest_gpu) over=$(argument tensor-parallel-size)
  while read -r need share; do
    model=${models[index]} index=$((index + 1))
    listing+="${listing:+, }$model ${need/#-/unknown}"
    [ "$need" != - ] || continue
    listing+=" GB"
    sum=$(calculate "$sum + $need")
    own=$(calculate "${share/#-/0} * $have")
    if [ -z "$given_shares" ] || enough "$own" "$need"; then continue; fi
    needs="$model needs about $need GB on each of $over GPU(s), with ${context:-0} tokens of context and $gpu_room GB to work in, and"
    [ -z "$sleeps" ] ||
      die "$needs may take $own GB while the others sleep ($gpu_part of the smallest, VLLM_GPU_MEMORY_UTILIZATION, less $asleep_room GB for each that sleeps): $(shorter_for_all)take one of them out, take smaller ones, or spread them over more GPUs (VLLM_GPU_COUNT)."
    die "$needs its share in VLLM_GPU_SHARES, $share, is $own GB: $(shorter_for_all)give it a larger share, or take a smaller model."
  done < <(divide "${context:-0}")
  if [ -n "$sleeps" ]; then
    echo "GPU memory: $listing needed on each of $over GPU(s) while the others sleep, $(calculate "${given_shares%%,*} * $have") GB available"
    return
  fi
  have=$(calculate "$have * $([ -z "$given_shares" ] && echo "$gpu_part" || echo 1)")
  enough "$have" "$sum" ||
    die "The models of LLM_MODELS need about $sum GB on each of $over GPU(s) ($listing, each with up to ${context:-0} tokens of context and $gpu_room GB to work in), and vLLM may take $have GB ($gpu_part of the smallest, VLLM_GPU_MEMORY_UTILIZATION): $(shorter_for_all)let them take turns (VLLM_SLEEP=on), take one of them out, take smaller ones, or spread them over more GPUs (VLLM_GPU_COUNT)."
  echo "GPU memory: about $sum GB needed on each of $over GPU(s) ($listing), $have GB available"
}

# Prints the largest usual context below the chosen one with which all models would fit, in front of the other choices.
shorter_for_all() {
  local tokens
  for tokens in $usual_contexts; do
    if [ "$tokens" -lt "${context:-0}" ] && all_fit "$tokens"; then
      echo "set LLM_CONTEXT=$tokens, or "
      return
    fi
  done
}

# Prints the value of the setting $1 for the model with index $2, or $3. A list has one for each model, in their order.
own_setting() {
  local values
  IFS=, read -ra values <<<"$(setting "$1")"
  echo "${values[$2]:-$3}"
}

# Stops the engines that are about to be removed, or started with another share, before any other begins to load: vLLM counts the
# free memory of the GPU while it loads. Then starts the engines alone: if Compose did it together with the rest, it would
# recreate the gateway too, which depends on the first one.
renew_engines() {
  local hashes id service hash ids=() names=()
  [ "$engine" = vllm ] || return 0
  hashes=$(docker compose config --hash '*')
  while read -r id service hash; do
    case $service in
      engine | engine-*) grep -qxF "$service $hash" <<<"$hashes" || { ids+=("$id") && names+=("$service"); } ;;
    esac
  done < <(docker ps --filter "label=com.docker.compose.project=$(resolved name)" --format '{{.ID}} {{.Label "com.docker.compose.service"}} {{.Label "com.docker.compose.config-hash"}}' | sort -k 2)
  [ ${#ids[@]} -gt 0 ] && { shares_gpus || [ ${#ids[@]} -gt 1 ]; } || return 0
  say "stopping ${names[*]}: their settings or shares of the GPU have changed, or their models were removed; their running answers end"
  docker stop "${ids[@]}" >/dev/null
  docker compose up --detach --build --no-deps "${services[@]}" || die "Docker could not start the engines: see the message above."
}
