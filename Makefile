# `make` alone lists the targets. Recipes longer than a line live in build/ci/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export PYTHONDONTWRITEBYTECODE := 1

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: packages venv ## the life of an isolated network on two simulated hosts, shown step by step (root)
	@.venv/bin/python build/ci/checkout.py -m bed.demo

test: packages venv build ## all tests, with the time of each group (root); TIMES=--times writes the times to the docs
	@build/package/venvs
	@build/pages/venv
	@.venv/bin/python build/ci/groups.py $(TIMES) static unit model golden repo docs kernel ssh e2e binary release mutants

test-binary: packages venv build ## all end-to-end tests with the one file in the place of the sources (root)
	@.venv/bin/python build/ci/groups.py binary-all

build: ## dist/netloom: the one self-contained executable (root; ten minutes the first time)
	@build/nuitka/build

bench: packages venv ## measurements beside their yardsticks; nothing is asserted (root)
	@.venv/bin/python build/ci/checkout.py build/ci/bench.py

release: venv build ## dist/: executable, sums, bill of materials, licences, deb, rpm, extension archive; tried in fresh roots (root)
	@build/package/release

audit: venv ## licences, pins, the bill of materials; known vulnerabilities, by a service that is asked
	@build/package/audit

docs: venv ## dist/docs: the documents as a site, with search and checked links; opens without a server
	@build/pages/build

check: venv ## format, lint, types, import contracts, tests that need no root: half a minute
	@.venv/bin/python build/ci/groups.py static unit model golden repo

fix: venv ## format the code and apply the linter's safe corrections
	@.venv/bin/ruff check --quiet --fix-only .
	@.venv/bin/ruff format .

packages: ## install the Debian packages of build/ci/apt.txt that are missing (root)
	@build/ci/apt

venv: ## make .venv from the hashed requirement files
	@build/ci/venv

lock: ## pin the requirement files anew; LOCK=--upgrade takes the newest releases
	@build/ci/lock $(LOCK)

clean: ## remove .venv, caches and products
	@rm -rf .venv .venv-docs .venv-release .venv-runtime dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help demo test test-binary build bench release audit docs check fix packages venv lock clean
