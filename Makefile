# Every command of the repository. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help install format lint types test isolated docs bench ci

PACKAGES := rlhf-losses rlhf-data rlhf-core rlhf-infer rlhf-ray rlhf-cli

help:  ## List the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

install:  ## Create the environment: all packages, CPU engines, test tools
	uv sync

format:  ## Rewrite the code in the house style
	uv run ruff format
	uv run ruff check --fix

lint:  ## Check style and the usual mistakes
	uv run ruff check
	uv run ruff format --check

types:  ## Check types
	uv run basedpyright

test:  ## Run all tests
	uv run pytest

isolated:  ## Run each package's tests with only its declared dependencies
	@set -e; for package in $(PACKAGES); do \
		echo "== $$package"; \
		uv run --isolated --no-default-groups --package $$package --with pytest --with pytest-timeout --with pytest-xdist \
			pytest packages/$$package/tests; \
	done

docs:  ## Regenerate docs/cli.md from the options
	uv run python docs/generate_cli.py

bench:  ## Measure training and PPO beside TRL, the losses beside full logits, inference beside bare vLLM
	uv run --group bench python benchmarks/sft.py
	uv run --group bench python benchmarks/preferences.py --method dpo
	uv run --group bench python benchmarks/ppo.py
	uv run python benchmarks/ppo_scale.py
	uv run python benchmarks/losses.py
	uv run python benchmarks/inference.py generate
	uv run python benchmarks/inference.py score

ci:  ## What CI runs
	.ci/run
