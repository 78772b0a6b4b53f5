# shellcheck shell=bash
# shellcheck disable=SC2154 # engine, merged: lib/stack.sh; weights, model, gpus, rooms: lib/preflight.sh
# The context window: how many tokens the engine gets for each conversation, the memory that they need, and how many would fit.

# A coding agent's first request has 7,000 (Codex) to 12,500 tokens (Claude Code), and its later ones have several times as
# many. With less than the least, even a chat is soon cut.
agents_context=32768
usual_contexts="$agents_context 16384 8192 4096"
least_context=4096
shortest_context=256 # the gateway takes no smaller LLM_CONTEXT
no_bound=999999999

# Sets the variables of the checks for the model with index $1: context (tokens of one conversation; empty: the engine decides),
# slots (conversations that have memory at the same time), context_gb (GB for all slots), and on vLLM gpu_share, the model's part
# of each GPU's memory, and `lengths`, what each further model gets as --max-model-len. If neither the user nor an engine's own
# setting says a number, and the model's size is known, chooses the largest usual one that fits, as LLM_CONTEXT_CHOSEN. The first
# model decides for all, except that all models on vLLM have to fit.
weigh_context() {
  need_numbers
  slots=1 gpu_share=$(argument gpu-memory-utilization) lengths[$1]=""
  case $engine in
    ollama) slots=$(resolved OLLAMA_NUM_PARALLEL) slots=${slots:-1} ;;
    tiny) slots=4 ;;
  esac
  if [ "$1" = 0 ] && [ "$engine" != tiny ] && ! context_is_set; then
    LLM_CONTEXT_CHOSEN=$([ -z "$weights" ] || choose_context)
    export LLM_CONTEXT_CHOSEN # also if it is empty, so that the choice for an earlier model has no effect
    use_engine "$engine"
  fi
  context=$(resolved LLM_CONTEXT)
  [ "$engine" != tiny ] || weigh_tiny_context
  if [ "$1" -gt 0 ] && [ -n "$context" ] && [[ $(listed 6) == [0-9]* ]] && [ "$context" -gt "$(listed 6)" ]; then
    context=$(listed 6)
  fi
  case $context in *[!0-9]*) die "LLM_CONTEXT=$context is not a number of tokens: use for example LLM_CONTEXT=$agents_context." ;; esac
  context_gb=$(calculate "${context:-0} * ${token_kb:-0} * $slots / 1e6")
  shares_gpus || return 0
  [ "$1" -gt 0 ] || share_gpus
  gpu_share=${shares[$1]/#-/0}
  # With more tokens than it can read, vLLM would not start. "auto" is as many as the model can read and its share holds.
  [ "$1" = 0 ] || lengths[$1]=$([[ $(listed 6) == [0-9]* ]] && echo "$context" || echo auto)
}

# Stops at a number with which the engine would stop again and again.
need_numbers() {
  local share
  case $engine in
    tiny) need_number LLAMA_ARG_THREADS 512 2 ;;
    vllm)
      need_number VLLM_TENSOR_PARALLEL_SIZE 1024 1
      need_number VLLM_MAX_NUM_SEQS 999999999 256
      need_number VLLM_MAX_NUM_QUEUED_REQS 999999999 512
      share=$(setting VLLM_GPU_MEMORY_UTILIZATION)
      [[ $share =~ ^(|0?\.0*[1-9][0-9]*|1(\.0*)?)$ ]] ||
        die "VLLM_GPU_MEMORY_UTILIZATION=$share is not a number above 0 and up to 1: use for example VLLM_GPU_MEMORY_UTILIZATION=0.90." ;;
  esac
}

# Stops if the setting $1 is not empty, and not a whole number from 1 to $2. $3 is an example.
need_number() {
  local value
  value=$(setting "$1")
  [ -n "$value" ] || return 0
  [[ $value =~ ^[0-9]{1,9}$ ]] && [ "$((10#$value))" -ge 1 ] && [ "$((10#$value))" -le "$2" ] ||
    die "$1=$value is not a whole number from 1 to $2: use for example $1=$3."
}

# Sets context for the tiny engine. Its own setting is the sum of all slots.
weigh_tiny_context() {
  local all
  all=$(resolved LLAMA_ARG_CTX_SIZE)
  case $all in
    "") context=${context:-4096} ;;
    *[!0-9]* | ??????????*) die "LLAMA_ARG_CTX_SIZE=$all is not a number of tokens: use for example LLAMA_ARG_CTX_SIZE=16384." ;;
    *) context=$((10#$all / slots)) ;;
  esac
  [ -z "$all" ] || [ "$context" -ge $shortest_context ] ||
    die "LLAMA_ARG_CTX_SIZE=$all is too small, because $slots slots share it and each needs $shortest_context tokens: use for example LLAMA_ARG_CTX_SIZE=16384."
}

# Whether the user has chosen a number, for all engines or for this one.
context_is_set() {
  [ -n "$(setting LLM_CONTEXT)" ] && return
  case $engine in
    ollama) [ -n "$(setting OLLAMA_CONTEXT_LENGTH)" ] ;;
    vllm) [ -n "$(setting VLLM_MAX_MODEL_LEN)" ] ;;
  esac
}

# Estimates the kB that a token needs: 48 times the square root of the billions of parameters, which is close to what large
# models with grouped heads need (8B: 136, known: 131 and 147; 32B: 272, known: 262). A mixture of experts shares its heads.
estimate_token() {
  local billions
  billions=$(parameters | awk '{ print $2 }')
  [ -z "$billions" ] || awk -v size="$billions" 'BEGIN { printf "%.0f\n", 48 * sqrt(size) }'
}

# Prints the largest of the usual numbers for which the model can be read and the memory suffices. With Ollama, the programs of
# this machine keep a quarter of the memory. vLLM stops at a number that its model cannot read, so an unknown model gets 8192.
choose_context() {
  local most limit tokens
  limit=$(listed 6)
  case $engine:${limit:--} in vllm:-) limit=8192 ;; esac
  shares_gpus || most=$(fitting "$([ "$engine" = vllm ] || echo 0.75)")
  for tokens in $usual_contexts; do
    if { if shares_gpus; then all_fit "$tokens"; else [ "$tokens" -le "$most" ]; fi; } && { [ "${limit:--}" = - ] || [ "$tokens" -le "$limit" ]; }; then
      echo "$tokens"
      return
    fi
  done
  [ "${limit:--}" != - ] && [ "$limit" -lt $least_context ] && echo "$limit" || echo $least_context
}

# Prints how many tokens (a multiple of 1024) each slot could have in the memory that the model leaves, or in the part $1 of all
# memory. An embedding model, one whose need is unknown, and vLLM without a reservation of GPUs have no bound.
fitting() {
  local spare
  case $engine:${token_kb:-0}:$gpus in *:0:* | vllm:*:0) echo $no_bound; return ;; esac
  if [ "$engine" = vllm ]; then
    spare=$(spare_on_gpus)
  else
    spare=$(calculate "$memory_gb * ${1:-1} - $weights - $ram_room")
  fi
  awk "BEGIN { tokens = int($spare * 1e6 / $token_kb / $slots / 1024) * 1024; printf \"%.0f\n\", (tokens > 0 ? tokens : 0) }"
}

# Prints the GB that weights and computation leave on all of vLLM's GPUs together, or 0 if the driver does not answer.
spare_on_gpus() {
  local smallest over
  smallest=$(gpu_memory 2>/dev/null | sort -n | head -n 1) || smallest=0
  over=$(argument tensor-parallel-size)
  calculate "(${smallest:-0} * 1.048576 / 1000 * $gpu_share - $gpu_room) * $over - $weights"
}

need_context() {
  local limit fit
  if [ -z "$context" ]; then
    not_checked "context: $engine decides how many tokens a conversation of $model may have, because the model's size is unknown (LLM_CONTEXT)"
    return
  fi
  if [ "${lengths[number]}" = auto ]; then
    echo "context: as many tokens as $model can read and its share of the GPU holds"
    return
  fi
  limit=$(listed 6)
  if [ "${limit:--}" != - ] && [ "$context" -gt "$limit" ]; then
    [ "$engine" != vllm ] ||
      die "LLM_CONTEXT=$context is more than $model can read, and vLLM would not start: set it to at most $limit (or VLLM_MAX_MODEL_LEN, if that is set)."
    echo "context: $limit tokens, the most that $model can read ($context were asked for)"
    return
  fi
  if [ "$token_kb" = 0 ]; then
    echo "context: $context tokens of each text, for which $model needs no memory between requests"
    return
  fi
  if [ -z "$weights" ] || [ -z "$token_kb" ]; then
    not_checked "context: $context tokens; the memory for them is unknown, because the size of $model is unknown"
    return
  fi
  if [ "$engine" = vllm ] && [ "$gpus" -gt 0 ] && ! gpus_answer >/dev/null; then
    not_checked "context: $context tokens; whether they fit is unknown, because the NVIDIA driver does not say how much memory there is"
    return
  fi
  fit=$(fitting)
  [ "${limit:--}" = - ] || [ "$fit" -le "$limit" ] || fit=$limit
  echo "context: $context tokens for each of $slots conversation(s) at a time, $context_gb GB of memory ($context_source)$([ "$fit" = $no_bound ] || echo "; up to $fit tokens would fit")$(context_hint "$fit")"
}

# Says what the chosen number means for coding agents, if it is too small for them. $1 is the number that would fit.
context_hint() {
  [ "$context" -lt 16384 ] || return 0
  printf '. Coding agents need 16384 or more'
  if [ "$engine" = tiny ]; then
    echo ": take another engine for them"
  elif [ "$1" -ge 16384 ]; then
    echo ": set LLM_CONTEXT=16384, if the model can read as many"
  else
    echo " (LLM_CONTEXT), so take a smaller model for them, or one that can read more"
  fi
}

# Prints what to set if the context does not fit: a smaller one if any would, in front of the other choices.
shorter() {
  local fit
  fit=$(fitting)
  [ "$fit" -lt 1024 ] || echo "set LLM_CONTEXT=$fit or less, or "
}
