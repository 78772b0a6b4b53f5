# Every target is a small script of the same name in scripts/. `make` alone lists them.
.DEFAULT_GOAL := help

# The text as typed, because a question may contain a dollar sign.
override export Q := $(value Q)

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: ## start the stack and print how to use it (ENGINE=ollama|vllm|tiny|outside, and MONITORING, TLS and CHAT=on|off, or WITH=chat,tls,monitoring)
doctor: ## check whether this machine can run the stack, and the stack itself if it runs (JSON=1 prints JSON)
	@scripts/doctor $(if $(JSON),--json)
down: ## stop the stack and keep the fetched models
logs: ## follow the logs
tls-root: ## write the root certificate of Caddy's own authority to tls-root.crt
models: ## list the models and their sizes (PULL=name fetches one, REMOVE=name removes one)
	@scripts/models $(if $(PULL),pull $(PULL),$(if $(REMOVE),remove $(REMOVE)))
chat: ## ask the model a question: make chat Q="Why is the sky blue?"
dev: ## run the gateway and the tiny engine as plain processes, and reload on change (LLM_BASE_URL=… uses your engine)
test: ## run all checks and all tests
check: ## run only the checks
bench-quick: ## measure what the gateway costs, in two minutes
soak: ## send 50,000 requests, some with faults, kill workers 600 times, and account for every request
lock: ## pin the dependencies in requirements/ again

up down logs tls-root chat dev test check bench-quick soak lock:
	@scripts/$@

.PHONY: help up doctor down logs tls-root models chat dev test check bench-quick soak lock
