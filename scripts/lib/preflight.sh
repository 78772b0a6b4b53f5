# shellcheck shell=bash
# shellcheck disable=SC2154 # context, context_gb, slots: lib/context.sh
# Preflight: checks whether this machine can run the chosen engine and model, and changes nothing. Each check prints its
# result, or why it could not be made (not_checked), or stops with a message that says what to do.

monitoring_user=65534 # of Prometheus's and Alertmanager's images: compose.monitoring.yaml
gateway_user=10001 # of the gateway's image
caddy_user=10003 # of Caddy's: tls/Dockerfile
vllm_user=2000 # of vLLM's

unchecked="not checked: " # begins the result of a check that could not be made

gpu_room=2  # GB on each GPU beside weights and context, for computation
ram_room=1  # GB of memory beside Ollama's weights and context
vllm_ram=4  # GB of memory for vLLM itself, and
worker_ram=2 # GB for each GPU's process

# Every check that applies to the engine and the model with index $1 of `models`, the most fundamental first.
# shellcheck disable=SC2154 # engine: lib/stack.sh
preflight_checks() {
  if [ "$1" -gt 0 ]; then
    case $engine in
      ollama) echo need_ram need_context need_disk ;;
      vllm) echo need_context need_token need_disk tell_tools ;;
      tiny) echo need_context ;;
    esac
    return
  fi
  echo need_new_docker need_project need_port need_image_disk need_secret_files need_config
  ! has_part monitoring && ! has_part chat || echo need_part_ports
  ! has_part tls || echo need_tls
  case $engine in
    outside) echo tell_outside ;;
    ollama) echo need_ram need_context need_disk ;;
    vllm)
      echo need_gpu need_gpu_runtime
      if shares_gpus; then echo need_shares need_shared_memory; else echo need_gpu_memory; fi
      echo need_context need_ram need_token need_disk tell_tools ;;
    tiny) echo need_context ;;
  esac
}

# Sets the variables of the checks for the model with index $1 of `models`, in the order of that list.
# shellcheck disable=SC2154 # models: lib/models.sh
weigh() {
  model=${models[$1]} number=$1
  [ "$1" -gt 0 ] || weigh_images
  [ "$engine" != outside ] || return 0
  [ "$1" = 0 ] && earlier=$images_gb || earlier=$(to_fetch)
  weigh_model
  [ "$1" -gt 0 ] || ! shares_gpus || know_models
  weigh_context "$1"
}

# Sets images, the names of the large images that have to be pulled, and images_gb, about how many GB they will take; and
# unsure and unsure_gb, the same for the images whose size is not known, or of which Docker may still have the layers.
weigh_images() {
  local part name gb image names own
  own=$(tr '[:lower:]' '[:upper:]' <<<"$engine")_IMAGE
  names=$own images="" images_gb=0 unsure="" unsure_gb=0
  for part in "${parts[@]}"; do ! has_part "$part" || names+=" $(images_of "$part")"; done
  for name in $names; do
    gb=$(image_gb "$name")
    [ "$gb" -gt 0 ] || continue
    image=$(image_of_part "$name")
    has_image "$image" && continue
    if [ "$image" != "$(default_of "$name")" ] || { [ "$name" = "$own" ] && has_image "$(resolved name)-engine"; }; then
      unsure+="${unsure:+, }$image" unsure_gb=$((unsure_gb + gb))
    else
      images+="${images:+, }$image" images_gb=$((images_gb + gb))
    fi
  done
}

# Prints the GB that the images, this model and the earlier ones of the list still need on the disk.
to_fetch() {
  if [ "$present" = all ] || [ -z "$weights" ]; then echo "$earlier"; else calculate "$earlier + $weights - $present / 1e9"; fi
}

# Sets the variables about $model, and how much of it is on this machine; and memory_gb, the memory of the machine that runs
# Docker.
# shellcheck disable=SC2154 # merged: lib/stack.sh
weigh_model() {
  size_model
  present=$(present)
  [ -n "${memory_gb:-}" ] || memory_gb=$(calculate "$(docker info --format '{{.MemTotal}}') / 1e9")
  # With particular GPUs there are ids instead of a count. Without both, no GPU is reserved, and none is checked.
  gpus=$(resolved count)
  [ -n "$gpus" ] || gpus=$(sed -n '/"device_ids": \[/,/\]/ s/^ *"[^"]*",*$/x/p' <<<"$merged" | grep -c x) || true
}

# Sets the sizes of $model: weights (GB), token_kb (kB of memory for each token of context), each nothing if it cannot be estimated,
# and the source of each.
# shellcheck disable=SC2034 # context_source: lib/context.sh
size_model() {
  weights=$(listed 3) source="known size"
  if [ -z "$weights" ] || [ "$weights" = - ]; then
    weights=$(estimate) source="estimated from its name"
  fi
  token_kb=$(listed 5) context_source="known size"
  if [ -z "$token_kb" ] || [ "$token_kb" = - ]; then
    token_kb=$(estimate_token) context_source="estimated from its name"
  fi
}

# Prints column $1 of the model's line in engine/models.tsv: the line with its name, or with the beginning of its name.
listed() {
  awk -F '\t' -v engine="$engine" -v model="$(known_as "$model")" -v column="$1" '
    $1 != engine { next }
    $2 == model { exact = $column }
    $2 ~ /\*$/ && index(model, substr($2, 1, length($2) - 1)) == 1 { alike = $column }
    END { print exact != "" ? exact : alike }' engine/models.tsv
}

# Prints the name $1 in the form of engine/models.tsv: for Ollama without the tag latest, and in small letters.
known_as() { if [ "$engine" = ollama ]; then tr '[:upper:]' '[:lower:]' <<<"${1%:latest}"; else echo "$1"; fi; }

# Estimates the GB from the number of parameters in the name and the bytes of each: two in vLLM, 0.7 in Ollama's format, unless
# the name says otherwise.
estimate() {
  parameters | awk -v engine="$engine" -v name="$(tr '[:upper:]' '[:lower:]' <<<"$model")" '{
    bytes = engine == "ollama" ? 0.7 : 2
    if (name ~ /awq|gptq|int4|fp4|4bit|w4a16|q4/) bytes = 0.7
    else if (name ~ /fp8|int8|8bit|w8a8|q8|q6|q5/) bytes = 1.1
    else if (name ~ /[:-](b?f|fp)16/) bytes = 2
    printf "%.1f\n", $1 * $2 * bytes
  }'
}

# Prints the experts and the billions of parameters of each that the name tells ("8b": 1 8; "135M": 1 0.135; "8x7b": 8 7), or
# nothing.
parameters() {
  awk -v name="$(tr '[:upper:]' '[:lower:]' <<<"$model")" 'BEGIN {
    words = split(name, word, "[:/_-]+")
    for (i = 1; i <= words; i++)
      if (word[i] ~ /^([0-9]+x)?[0-9]+(\.[0-9]+)?[bm]$/) {
        times = 1; size = word[i]
        if (split(size, part, "x") == 2) { times = part[1]; size = part[2] }
        print times, size * (size ~ /m$/ ? 0.001 : 1)
        exit
      }
  }'
}

# Prints how much of the model an earlier run left on the volume: a number of bytes, or "all". The provisioner reports it.
present() {
  local project
  project=$(resolved name)
  if docker volume inspect "${project}_$engine" >/dev/null 2>&1 && has_image "$project-provision"; then
    docker run --rm --network none --env LLM_MODEL="$model" --volume "${project}_$engine:/models:ro" \
      --entrypoint /opt/engine/provision "$project-provision" --present 2>/dev/null && return
  fi
  echo 0
}

not_checked() { echo "$unchecked$*"; }

need_new_docker() {
  local version
  version=$(docker version --format '{{.Server.Version}}')
  awk -F. '{ exit !($1 > 20 || ($1 == 20 && $2 >= 10)) }' <<<"$version" ||
    die "Docker 20.10 or newer is needed ($version is here): update it (https://docs.docker.com/engine/install/), then run this again."
  echo "Docker $version, Compose $compose_version"
}

need_project() {
  need_own_project
  echo "no other directory has a stack with the name of this one"
}

need_port() {
  need_free_port
  # shellcheck disable=SC2154 # port: lib/address.sh
  echo "port $port is free, or used by this stack"
}

# TLS has no address of its own: Caddy takes over the gateway's, and the chat window's.
need_part_ports() {
  local part line address other taken=("STACK_PUBLISH $host $port")
  local host port
  for part in "${parts[@]}"; do
    has_part "$part" || continue
    while read -ra line; do
      address=$(setting "${line[0]}")
      split_address "${address:-$(default_of "${line[0]}")}" "${line[0]}"
      # shellcheck disable=SC2086 # three words
      for other in "${taken[@]}"; do need_another_port "${line[0]}" $other; done
      need_free_port "${line[@]}"
      taken+=("${line[0]} $host $port")
    done < <(published_by "$part")
  done
  echo "the ports of the parts beside the stack are free, or used by them"
}

# Stops if the setting $1, which is $host:$port, takes the port that the setting $2 takes with $3:$4.
need_another_port() {
  [ "$port" = "$4" ] && [ "$port" != 0 ] || return 0
  case " $host $3 " in
    *" 0.0.0.0 "* | *" [::] "* | " $3 $host ") ;;
    *) return 0 ;;
  esac
  die "$1=$host:$port and $2=$3:$4 take the same port: set one of them to another address, then run this again."
}

need_secret_files() {
  need_secret_file stack_api_keys STACK_API_KEYS_FILE "$gateway_user"
  need_secret_file stack_admin_keys STACK_ADMIN_KEYS_FILE "$gateway_user"
  need_secret_file stack_store_url STACK_STORE_URL_FILE "$gateway_user"
  need_secret_file hf_token HF_TOKEN_FILE "$vllm_user"
  need_secret_file alert_webhook STACK_ALERT_WEBHOOK_FILE "$monitoring_user"
  need_secret_file tls_certificate STACK_TLS_CERTIFICATE_FILE "$caddy_user"
  need_secret_file tls_key STACK_TLS_KEY_FILE "$caddy_user" "chown $caddy_user"
  echo "every file that a setting names exists, and its container may read it"
}

# Checks the name and the form of the certificate. The name becomes a part of Caddy's configuration, so it must be one.
need_tls() {
  local form name
  form=$(resolved STACK_TLS) name=$(resolved STACK_TLS_NAME)
  [[ $name =~ ^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$ ]] ||
    die "STACK_TLS_NAME=$name is not a host name or an IPv4 address: use the name in the clients' base URL, such as llm.example.org."
  case $form in
    local) ;;
    acme) need_public_name "$name" ;;
    files)
      [ "$(secret_file tls_certificate)" != /dev/null ] && [ "$(secret_file tls_key)" != /dev/null ] ||
        die "STACK_TLS=files needs the files of the certificate and its key: set STACK_TLS_CERTIFICATE_FILE and STACK_TLS_KEY_FILE." ;;
    *) die "STACK_TLS=$form is not known: use local (Caddy's own authority), acme (a public name) or files (certificate files)." ;;
  esac
  echo "TLS: $name, with STACK_TLS=$form"
}

# The authority calls this machine at the name $1, at port 443.
need_public_name() {
  case $1 in
    *.local | *.lan | *.internal | *.home.arpa | *.localhost | *.test) ;;
    *.*[A-Za-z])
      ! on_loopback ||
        die "STACK_TLS=acme needs an address that the internet can reach at port 443, and STACK_PUBLISH=$host:$port is this machine alone: set STACK_PUBLISH=0.0.0.0:443."
      return ;;
  esac
  die "STACK_TLS=acme needs a public name, and STACK_TLS_NAME=$1 is not one: set a name that leads to this machine, or STACK_TLS=local."
}

# `make up` makes the clone's own config/ readable (scripts/up). The modes of another directory are its owner's decision.
need_config() {
  local directory
  directory=$(config_directory)
  [ -d "$directory" ] ||
    die "STACK_CONFIG_DIR names $directory, which is not a directory here: create it, or correct the line in .env, then run this again."
  if [ "$directory" != "$PWD/config" ]; then
    readable "$directory" "$gateway_user" ||
      die "STACK_CONFIG_DIR names $directory, which the gateway's user ($gateway_user) may not enter: 'chmod a+x $directory', then run this again."
  fi
  [ ! -e "$directory/stack.yaml" ] || readable "$directory/stack.yaml" "$gateway_user" ||
    die "The gateway's user ($gateway_user) may not read $directory/stack.yaml: 'chmod a+r $directory/stack.yaml', then run this again."
  echo "the gateway may read $directory"
}

need_gpu() {
  local memory there
  unreserved && return
  command -v nvidia-smi >/dev/null ||
    die "vLLM needs an NVIDIA GPU, and this machine has no driver (there is no nvidia-smi): install the driver (https://docs.nvidia.com/datacenter/tesla/driver-installation-guide/), or run 'ENGINE=ollama make up', which needs no GPU."
  memory=$(gpu_memory) ||
    die "The NVIDIA driver does not answer (nvidia-smi says: ${memory%%$'\n'*}): reinstall the driver or restart the machine, then run this again."
  there=$(grep -c . <<<"$memory")
  [ "$there" -ge "$gpus" ] ||
    die "VLLM_GPU_COUNT asks for $gpus GPUs, and this machine has $there: set VLLM_GPU_COUNT=$there."
  echo "GPUs: $there here, $gpus for vLLM"
}

# Docker gives GPUs to containers through NVIDIA's container toolkit: a runtime, CDI, or the hook that --gpus uses.
need_gpu_runtime() {
  unreserved && return
  docker info --format '{{json .}}' | grep -qE '"nvidia"|nvidia\.com/gpu' || command -v nvidia-container-runtime-hook >/dev/null ||
    die "Docker cannot give GPUs to containers: install the NVIDIA Container Toolkit (https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/install-guide.html), run 'sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker', then run this again."
  echo "Docker can give GPUs to containers"
}

need_gpu_memory() {
  local smallest part have need over
  unreserved && return
  weighed || return 0
  gpus_answer || return 0
  smallest=$(gpu_memory | sort -n | head -n 1)
  part=$(argument gpu-memory-utilization)
  over=$(argument tensor-parallel-size)
  have=$(calculate "$smallest * 1.048576 / 1000 * $part")
  need=$(calculate "($weights + $context_gb) / $over + $gpu_room")
  enough "$have" "$need" ||
    die "$model needs about $need GB on each of $over GPU(s) ($weights GB of weights, $source, $context_gb GB for $context tokens of context, and $gpu_room GB to work in), and vLLM may take $have GB ($part of the smallest, VLLM_GPU_MEMORY_UTILIZATION): $(shorter)$(smaller "$(calculate "($have - $gpu_room) * $over")" context), or spread it over more GPUs (VLLM_GPU_COUNT)."
  echo "GPU memory: about $need GB needed on each of $over GPU(s) for $model ($source), $have GB available"
}

need_ram() {
  local have need spare
  weighed || return 0
  have=$memory_gb
  need=$(calculate "$weights + $context_gb + $ram_room")
  [ "$engine" = ollama ] || need=$(calculate "($vllm_ram + $worker_ram * $gpus) * ${#models[@]} + $(asleep_weights)")
  if ! enough "$have" "$need"; then
    [ "$engine" = ollama ] ||
      die "vLLM needs about $need GB of memory for itself (estimated, for ${#models[@]} model(s) on $gpus GPU(s)${sleeps:+, with the weights of those that sleep}), and Docker has $have GB: add memory, or run 'ENGINE=ollama make up' with a small model."
    spare=$(calculate "$have - $ram_room")
    die "$model needs about $need GB of memory ($weights GB of weights, $source, $context_gb GB for ${context:-0} tokens of context in each of $slots slot(s), and $ram_room GB to work in), and Docker has $have GB: $(shorter)$(smaller "$spare" context), or give Docker more memory."
  fi
  echo "memory: about $need GB needed for $engine with $model ($source), $have GB available"
}

need_token() {
  local file
  file=$(secret_file hf_token)
  if [ "$(listed 4)" = token ] && [ "$present" != all ] && [ ! -s "$file" ]; then
    die "$model needs its owner's permission: request access at https://huggingface.co/$model and set HF_TOKEN_FILE to a file with your token, or take another model, such as LLM_MODEL=Qwen/Qwen3-8B, which needs no token."
  fi
  echo "model hub: as far as is known, $model needs no further token"
}

# Neither memory nor context is checked for an engine outside.
tell_outside() { echo "engine: outside this stack, at $(resolved LLM_BASE_URL), asked as $(resolved LLM_BACKEND); see 'Engines outside the stack' in the README"; }

# This check never fails. It tells the operator in advance if vLLM will refuse requests with tools.
tell_tools() {
  local parser set each=""
  set=$(resolved TOOL_PARSER)
  ! shares_gpus || set=$(own_setting VLLM_TOOL_PARSER "$number" auto)
  parser=$set
  [ "$parser" != auto ] || parser=$(tool_parser)
  ! shares_gpus || each=", with a value for each model of LLM_MODELS in their order, such as auto,hermes"
  case $parser in
    none | -) echo "tools: no parser is known for $model, so requests with tools will be refused (400); set VLLM_TOOL_PARSER to one of vLLM's parsers$each" ;;
    *) echo "tools: vLLM reads tool calls with its parser $parser (VLLM_TOOL_PARSER=$set)" ;;
  esac
}

# The parser of the first pattern in engine/vllm/parsers.tsv that fits the model, as engine/vllm/serve.py finds it.
tool_parser() {
  local name pattern parser
  name=$(tr '[:upper:]' '[:lower:]' <<<"${model##*/}")
  while IFS=$'\t' read -r pattern parser; do
    # shellcheck disable=SC2053 # a pattern
    [[ $pattern != "#"* && $name == $pattern ]] || continue
    echo "$parser"
    return
  done <engine/vllm/parsers.tsv
  echo none
}

# Docker keeps its images beside its volumes. The check of each model counts them too.
need_image_disk() {
  local root have also=""
  [ -z "$unsure" ] || also="; about $unsure_gb GB for $unsure were not checked, because it may be smaller, or still be in Docker's build cache"
  if [ "$images_gb" = 0 ]; then
    echo "disk: no ${unsure:+other }large image is missing on this machine$also"
  elif find_disk; then
    enough "$have" "$images_gb" ||
      die "The images that are not here yet ($images) need about $images_gb GB of disk, and $have GB are free where Docker keeps them ($root): free some space there ('docker system df' shows what Docker uses)."
    echo "disk: about $images_gb GB needed for $images, $have GB free in $root$also"
  else
    not_checked "disk: Docker keeps its images in a virtual machine; about $images_gb GB are needed for $images$also"
  fi
}

# Sets root, the directory of Docker's volumes, and have, the GB that are free there, or returns 1 if this machine does not see it.
find_disk() {
  root=$(docker info --format '{{.DockerRootDir}}')
  [ -d "$root" ] || return
  have=$(calculate "$(df -Pk "$root" | awk 'NR == 2 { print $4 }') * 1024 / 1e9")
}

need_disk() {
  local root have need
  if [ "$present" = all ]; then
    echo "disk: $model is already on this machine"
    return
  fi
  weighed || return 0
  if ! find_disk; then
    not_checked "disk: Docker keeps its volumes in a virtual machine; $model needs about $weights GB ($source)"
    return
  fi
  need=$(to_fetch)
  enough "$have" "$need" ||
    die "$model needs about $need GB of disk ($source$([ "$earlier" = 0 ] || echo ", with all that is fetched before it")), and $have GB are free where Docker keeps its volumes ($root): free some space there ('docker system df' shows what Docker uses), or $(smaller "$(calculate "$have - $earlier")")."
  echo "disk: about $need GB needed for $model ($source), $have GB free in $root"
}

# Whether the model's size is known. Prints a message if not.
weighed() {
  [ -n "$weights" ] && return
  not_checked "the size of $model is unknown, and its name has no number"
  return 1
}

unreserved() {
  [ "$gpus" -gt 0 ] && return 1
  not_checked "no GPU is reserved for vLLM"
}

# Whether the GPUs' memory is known. Prints a message if not; need_gpu has said what to do.
gpus_answer() {
  gpu_memory >/dev/null && return
  not_checked "GPU memory: the NVIDIA driver does not say how much there is"
  return 1
}

# The value of the option $1 in the engine's command.
argument() { sed -nE "s/^ *\"--$1=(.*)\",?\$/\1/p" <<<"$merged" | tail -n 1; }

# Prints the memory of each GPU in MiB, one per line, or the message of nvidia-smi if it fails.
gpu_memory() { nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>&1; }

# Prints "set LLM_MODEL to a smaller one, such as …" with the largest known model of at most $1 GB that needs no token. With $2,
# those GB must hold the least context too.
smaller() {
  awk -F '\t' -v engine="$engine" -v most="$1" -v tokens="${2:+$least_context}" '
    $1 == engine && $3 + 0 > best + 0 && $3 + $5 * tokens / 1e6 <= most + 0 && $4 != "token" && $5 != "0" { best = $3; name = $2 }
    END { print "set LLM_MODEL to a smaller one" (name ? ", such as " name " (" best " GB)" : "") }' engine/models.tsv
}

calculate() { awk "BEGIN { printf \"%.1f\", $1 }"; }
enough() { awk -v have="$1" -v need="$2" 'BEGIN { exit !(have + 0 >= need + 0) }'; }
