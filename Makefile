# make demo    the main job with no server at all
# make test    every test, on private servers
# make check   lint, format, types
# Nothing has to be prepared; PYTHON=... names the Python that the environment is made with.

.DEFAULT_GOAL := help
.PHONY: help env demo check servers test constraints clean

bin := .venv/bin
made := .venv/made

help:
	@sed -n 's/^# make/make/p' Makefile

env: $(made)

$(made): pyproject.toml constraints.txt scripts/env.sh
	@scripts/env.sh
	@touch $@

demo: env
	@$(bin)/python examples/demo.py

check: env
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy --strict

servers:
	@scripts/servers.sh

# Each worker starts servers of its own, and a file's tests stay together; WORKERS=0 runs them all in one process.
WORKERS ?= 2

test: env servers
	$(bin)/python -m pytest --durations=10 -n $(WORKERS) --dist loadfile

# Takes the newest versions that pyproject.toml allows, and pins them. Run the tests before committing the result.
constraints:
	@scripts/env.sh --newest
	@scripts/pin.sh >constraints.new
	@mv constraints.new constraints.txt
	@touch $(made)

# Removes what the targets above have made, the environment too.
clean:
	rm -rf .venv .knell dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tasks services tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
