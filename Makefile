# Everything runs in the environment of tools/env.sh, which tools/setup.sh makes on the first call.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint bench bench-gpu table3 clean

IN_ENV := source tools/env.sh &&

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: ## install what is missing: nothing to do, no network, on the second call
	@tools/setup.sh

demo: setup ## the policy on the simulated S1, results in runs/demo (DEMO_ARGS="--help" for options)
	@$(IN_ENV) exec python -m safe_pruner_node.evaluation.demo $(DEMO_ARGS)

# A ROS domain of its own, so that a demo running meanwhile is not part of the test.
test: setup ## lint, types, import rules and all tests
	@tools/setup.sh parity
	@tools/lint.sh
	@export ROS_DOMAIN_ID=$$((30 + $$$$ % 40)); $(IN_ENV) exec python -m pytest test $(TEST_ARGS)

lint: setup ## ruff, mypy, import rules, shell, docker files
	@tools/lint.sh

bench: setup ## milliseconds of each stage: vanilla, SAFE keyframe, SAFE pruned (BENCH_ARGS)
	@$(IN_ENV) exec python -m safe_pruner_node.evaluation.bench $(BENCH_ARGS)

bench-gpu: setup ## every path on the GPU: right against fp32, then ms against the roofline (BENCH_ARGS)
	@$(IN_ENV) exec python -m safe_pruner_node.evaluation.bench_gpu $(BENCH_ARGS)

table3: setup ## success of every pruning method on the twin's tasks, rho 0.75 and 0.90 (EVAL_ARGS)
	@$(IN_ENV) exec python -m safe_pruner_node.evaluation.evaluate --rho 0.75 0.9 $(EVAL_ARGS)

clean: ## remove what set-up, build and runs have made
	rm -rf .venv .venv-parity .setup ros2_ws/build ros2_ws/install ros2_ws/log runs
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
