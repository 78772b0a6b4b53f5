# Every target is a small script of the same name in scripts/. `make` alone lists them.
.DEFAULT_GOAL := help

# As typed: a question may hold a dollar sign.
override export Q := $(value Q)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: ## bring the stack up and say how to use it (ENGINE=ollama|vllm|tiny chooses the engine)
doctor: ## look at whether this machine can carry it, and change nothing
down: ## stop it; fetched models stay
logs: ## follow its logs
chat: ## ask it something: make chat Q="Why is the sky blue?"
dev: ## run gateway and tiny engine as plain processes, reloading on change (LLM_BASE_URL=… takes your engine)
test: ## run all checks and all tests
check: ## run the checks alone
bench-quick: ## measure what the gateway costs, in two minutes
soak: ## 50,000 requests with faults among them, 600 kills: every one accounted for, nothing leaks
lock: ## pin the dependencies in requirements/ again

up doctor down logs chat dev test check bench-quick soak lock:
	@scripts/$@

.PHONY: help up doctor down logs chat dev test check bench-quick soak lock
