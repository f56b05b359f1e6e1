# `make` alone lists the targets. Recipes longer than a line live in build/ci/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export PYTHONDONTWRITEBYTECODE := 1

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: packages venv ## show the life of a network on simulated hosts, and a take-over, step by step (root)
	@.venv/bin/python build/ci/checkout.py -m bed.demo

test: packages emulator venv build ## run all tests (root); TIMES=--times writes the time of each group to the docs
	@build/package/venvs
	@build/pages/venv
	@.venv/bin/python build/ci/groups.py $(TIMES) static unit model fuzz golden repo docs hosts-single e2e kernel ssh binary mutants crash release load kernel-machine

test-long: packages venv ## run the long tests, all crash points and all mutants, 1,000 networks, and fuzz each target (root; hours)
	@.venv/bin/python build/ci/groups.py model-long mutants-all e2e-long load-long crash-all kernel-long ssh-long mutants-machine
	@$(MAKE) fuzz

test-binary: packages venv build ## run all end-to-end tests with the one file instead of the sources (root)
	@.venv/bin/python build/ci/groups.py binary-all

build: ## compile dist/netloom, the self-contained executable (root; ten minutes the first time)
	@build/nuitka/build

test-hosts: packages emulator venv build ## run the tests on emulated hosts: kernels, distributions, firewalls (root; half an hour)
	@.venv/bin/python build/ci/groups.py hosts
	@.venv/bin/python build/ci/platforms.py

fuzz: venv ## fuzz with atheris: TARGET=dhcp SECONDS=60; all targets in turn by default, two minutes each
	@build/ci/fuzz-venv
	@.venv/bin/python build/ci/fuzzing.py $(if $(TARGET),--target=$(TARGET)) $(if $(SECONDS),--seconds=$(SECONDS)) \
		$(if $(INPUT),--input=$(INPUT)) $(if $(KEEP),--keep)

bench: packages venv ## measure speed beside yardsticks, without assertions; ROWS="event life" chooses (root; an hour)
	@build/ci/bench $(ROWS)

bench-quick: packages venv ## measure some of it in two minutes (root)
	@build/ci/bench --quick $(ROWS)

bench-docs: venv ## copy the results of make bench to docs/operators/speed.md
	@PYTHONPATH=tests .venv/bin/python -m bench.document dist/bench docs/operators/speed.md

release: venv build ## make all files of a release in dist/, and test the packages in new root file systems (root)
	@build/package/release

audit: venv ## check pins, licences and the bill of materials, and ask a service for known vulnerabilities
	@build/package/audit

docs: venv ## make the documents a site in dist/docs, with search and checked links; it opens without a server
	@build/pages/build

check: venv ## check format, lint, types and imports, and run the tests that need no root (half a minute)
	@.venv/bin/python build/ci/groups.py static unit model fuzz golden repo

fix: venv ## format the code and apply the safe corrections of the linter
	@.venv/bin/ruff check --quiet --fix-only .
	@.venv/bin/ruff format .

packages: ## install missing Debian packages of build/ci/apt.txt (root)
	@build/ci/apt

emulator: ## install missing Debian packages of build/ci/apt-hosts.txt (root)
	@build/ci/apt $$(grep -vE '^(#|$$)' build/ci/apt-hosts.txt)

venv: ## make .venv from the hashed requirement files
	@build/ci/venv

lock: ## update the requirement files from pyproject.toml; LOCK=--upgrade takes the newest releases
	@build/ci/lock $(LOCK)

clean: ## remove virtual environments, caches and products
	@rm -rf .venv .venv-bench .venv-docs .venv-fuzz .venv-release .venv-runtime dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help demo test test-long test-binary test-hosts build fuzz bench bench-quick bench-docs release audit docs check fix packages emulator venv lock clean
