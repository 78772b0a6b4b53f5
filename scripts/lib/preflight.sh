# shellcheck shell=bash
# Preflight: whether this machine can carry the engine and the model that were chosen. Nothing is changed. Each check
# prints what it found, or ends with one sentence that says what to do.

gpu_room=2  # GB on each GPU beside the weights: the context of a few conversations, and what a computation needs
ram_room=1  # GB of memory beside Ollama's weights
vllm_ram=4  # GB of memory for vLLM itself, and
worker_ram=2 # GB for each GPU's process

# Every check that applies to the engine, the most fundamental first.
# shellcheck disable=SC2154 # engine: lib/stack.sh
preflight_checks() {
  echo need_new_docker need_port need_secret_files
  case $engine in
    ollama) echo need_ram need_disk ;;
    vllm) echo need_gpu need_gpu_runtime need_gpu_memory need_ram need_token need_disk ;;
  esac
}

# Sets what the checks are about: model, weights (GB, or nothing where that can't even be estimated), and how it is known.
# shellcheck disable=SC2154 # merged: lib/stack.sh
weigh_model() {
  model=$(resolved LLM_MODEL)
  weights=$(listed 3) source="known size"
  if [ -z "$weights" ] || [ "$weights" = - ]; then
    weights=$(estimate) source="estimated from its name"
  fi
  present=$(present)
  # Not count: with chosen GPUs there are ids instead; with neither nothing is reserved, and nothing looked at.
  gpus=$(resolved count)
  [ -n "$gpus" ] || gpus=$(sed -n '/^ *device_ids:/,/^ *[a-z_]*:/ s/^ *- .*/x/p' <<<"$merged" | grep -c x) || true
}

# Column $1 of the model's line in engine/models.tsv: its own, or one that its name begins like.
listed() {
  awk -F '\t' -v engine="$engine" -v model="${model%:latest}" -v column="$1" '
    $1 != engine { next }
    $2 == model { exact = $column }
    $2 ~ /\*$/ && index(model, substr($2, 1, length($2) - 1)) == 1 { alike = $column }
    END { print exact != "" ? exact : alike }' engine/models.tsv
}

# GB from the number of parameters in the name ("8b", "135M", "8x7b") and the bytes each takes: two as vLLM loads them,
# 0.7 as Ollama packs them, unless the name says otherwise.
estimate() {
  awk -v engine="$engine" -v name="$(tr '[:upper:]' '[:lower:]' <<<"$model")" 'BEGIN {
    bytes = engine == "ollama" ? 0.7 : 2
    if (name ~ /awq|gptq|int4|fp4|4bit|w4a16|q4/) bytes = 0.7
    else if (name ~ /fp8|int8|8bit|w8a8|q8|q6|q5/) bytes = 1.1
    else if (name ~ /[:-](b?f|fp)16/) bytes = 2
    words = split(name, word, "[:/_-]+")
    for (i = 1; i <= words; i++)
      if (word[i] ~ /^([0-9]+x)?[0-9]+(\.[0-9]+)?[bm]$/) {
        times = 1; size = word[i]
        if (split(size, part, "x") == 2) { times = part[1]; size = part[2] }
        printf "%.1f\n", times * size * (size ~ /m$/ ? 0.001 : 1) * bytes
        exit
      }
  }'
}

# What an earlier run left of the model on the volume: a number of bytes, or "all". The provisioner itself knows.
present() {
  local project
  project=$(sed -n 's/^name: //p' <<<"$merged")
  if docker volume inspect "${project}_$engine" >/dev/null 2>&1 && has_image "$project-provision"; then
    docker run --rm --network none --env LLM_MODEL="$model" --volume "${project}_$engine:/models:ro" \
      --entrypoint /opt/engine/provision "$project-provision" --present 2>/dev/null && return
  fi
  echo 0
}

need_new_docker() {
  local version
  version=$(docker version --format '{{.Server.Version}}')
  awk -F. '{ exit !($1 > 20 || ($1 == 20 && $2 >= 10)) }' <<<"$version" ||
    die "Docker 20.10 or newer is needed ($version is here): update it (https://docs.docker.com/engine/install/), then run this again."
  echo "Docker $version, Compose $(docker compose version --short)"
}

need_port() {
  need_free_port
  # shellcheck disable=SC2154 # port: lib/address.sh
  echo "port $port is free, or the stack's own"
}

need_secret_files() {
  need_secret_file stack_api_keys STACK_API_KEYS_FILE
  need_secret_file stack_admin_keys STACK_ADMIN_KEYS_FILE
  need_secret_file stack_store_url STACK_STORE_URL_FILE
  need_secret_file hf_token HF_TOKEN_FILE
  echo "every file that a setting names is there"
}

need_gpu() {
  local memory there
  unreserved && return
  command -v nvidia-smi >/dev/null ||
    die "vLLM needs an NVIDIA GPU, and no driver is here (there is no nvidia-smi): install the driver (https://docs.nvidia.com/datacenter/tesla/driver-installation-guide/), or run 'ENGINE=ollama make up', which needs no GPU."
  memory=$(gpu_memory) ||
    die "The NVIDIA driver does not answer (nvidia-smi says: ${memory%%$'\n'*}): install it again or restart the machine, then run this again."
  there=$(grep -c . <<<"$memory")
  [ "$there" -ge "$gpus" ] ||
    die "vLLM is to get $gpus GPUs (VLLM_GPU_COUNT), and this machine has $there: set VLLM_GPU_COUNT=$there."
  echo "GPUs: $there here, $gpus for vLLM"
}

# Docker hands GPUs out through NVIDIA's container toolkit: a runtime of its own, CDI, or the hook that --gpus looks for.
need_gpu_runtime() {
  unreserved && return
  docker info --format '{{json .}}' | grep -qE '"nvidia"|nvidia\.com/gpu' || command -v nvidia-container-runtime-hook >/dev/null ||
    die "Docker can't hand out GPUs: install the NVIDIA Container Toolkit (https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/install-guide.html), run 'sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker', then run this again."
  echo "Docker can hand out GPUs"
}

need_gpu_memory() {
  local smallest part have need over
  unreserved && return
  weighed || return 0
  smallest=$(gpu_memory 2>/dev/null | sort -n | head -n 1) || return 0 # need_gpu has said why
  part=$(sed -nE 's/^ *- --gpu-memory-utilization=//p' <<<"$merged")
  over=$(sed -nE 's/^ *- --tensor-parallel-size=//p' <<<"$merged")
  have=$(calculate "$smallest * 1.048576 / 1000 * $part")
  need=$(calculate "$weights / $over + $gpu_room")
  enough "$have" "$need" ||
    die "$model needs about $need GB on each of $over GPU(s) ($weights GB of weights, $source, and $gpu_room GB to work in), and vLLM may take $have GB ($part of the smallest, VLLM_GPU_MEMORY_UTILIZATION): $(smaller "$(calculate "($have - $gpu_room) * $over")"), or spread it over more GPUs (VLLM_GPU_COUNT)."
  echo "GPU memory: about $need GB needed on each of $over GPU(s) for $model ($source), $have GB there"
}

need_ram() {
  local have need spare
  weighed || return 0
  have=$(calculate "$(docker info --format '{{.MemTotal}}') / 1e9")
  need=$(calculate "$weights + $ram_room")
  [ "$engine" = ollama ] || need=$(calculate "$vllm_ram + $worker_ram * $gpus")
  if ! enough "$have" "$need"; then
    [ "$engine" = ollama ] ||
      die "vLLM needs about $need GB of memory for itself (estimated, for $gpus GPU(s)), and Docker has $have GB: add memory, or run 'ENGINE=ollama make up' with a small model."
    spare=$(calculate "$have - $ram_room")
    die "$model needs about $need GB of memory ($weights GB of weights, $source, and $ram_room GB to work in), and Docker has $have GB: $(smaller "$spare"), or give Docker more memory."
  fi
  echo "memory: about $need GB needed for $engine with $model ($source), $have GB there"
}

need_token() {
  local file
  file=$(secret_file hf_token)
  if [ "$(listed 4)" = token ] && [ "$present" != all ] && [ ! -s "$file" ]; then
    die "$model is handed out only to those its owner has let in: request access at https://huggingface.co/$model and put the file of a token into HF_TOKEN_FILE, or set LLM_MODEL=Qwen/Qwen3-8B, which needs none."
  fi
  echo "model hub: no token is missing for $model, as far as is known"
}

need_disk() {
  local root have need
  if [ "$present" = all ]; then
    echo "disk: $model is here already"
    return
  fi
  weighed || return 0
  root=$(docker info --format '{{.DockerRootDir}}')
  if ! [ -d "$root" ]; then
    echo "disk: Docker keeps its volumes in a machine of its own, whose disk was not looked at; $model takes about $weights GB ($source)"
    return
  fi
  have=$(calculate "$(df -Pk "$root" | awk 'NR == 2 { print $4 }') * 1024 / 1e9")
  need=$(calculate "$weights - $present / 1e9")
  enough "$have" "$need" ||
    die "$model needs about $need GB of disk ($source), and $have GB are free where Docker keeps its volumes ($root): make room there ('docker system df' shows what Docker itself holds), or $(smaller "$have")."
  echo "disk: about $need GB needed for $model ($source), $have GB free in $root"
}

# Whether the model's size is known; says so where it isn't.
weighed() {
  [ -n "$weights" ] && return
  echo "the size of $model is not known, and its name does not say it: what it needs was not looked at"
  return 1
}

unreserved() {
  [ "$gpus" -gt 0 ] && return 1
  echo "no GPU is reserved: none was looked for"
}

# The memory of each GPU in MiB, one a line; what nvidia-smi says otherwise.
gpu_memory() { nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>&1; }

# "set LLM_MODEL to a smaller one, such as …": the largest that is known to weigh at most $1 GB and asks for no token.
smaller() {
  awk -F '\t' -v engine="$engine" -v most="$1" '
    $1 == engine && $3 + 0 > best + 0 && $3 + 0 <= most + 0 && $4 != "token" { best = $3; name = $2 }
    END { print "set LLM_MODEL to a smaller one" (name ? ", such as " name " (" best " GB)" : "") }' engine/models.tsv
}

calculate() { awk "BEGIN { printf \"%.1f\", $1 }"; }
enough() { awk -v have="$1" -v need="$2" 'BEGIN { exit !(have + 0 >= need + 0) }'; }
