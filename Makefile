# Every verb sets up what it needs: with Python 3.11 or newer, git and make, `make demo` and
# `make test` work in a fresh clone. CI calls the same verbs.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The compiled relay: its sources, and the files that are built from them.
NATIVE := $(wildcard proxy/native/*.pyx proxy/native/*.pxd)
COMPILED := proxy/native/*.so proxy/native/*.c

PYTHON_IS_NEW_ENOUGH := 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; $(PYTHON) is %d.%d. Say which one: make PYTHON=python3.12 ..." % sys.version_info[:2])'

# Where `make install` installs: a virtual environment in share, and a link to its command in bin.
# EXTRAS='[demo]' installs what the verb demo needs, too.
PREFIX ?= $(HOME)/.local
override PREFIX := $(if $(filter /%,$(PREFIX)),$(PREFIX),$(CURDIR)/$(PREFIX))
EXTRAS ?=
INSTALL_VENV := $(PREFIX)/share/lakebase-auth-proxy

# Hypothesis examples for one test of `make fuzz`; the suite's own profile is short.
FUZZ_EXAMPLES ?= 20000
# Inputs of the byte fuzzer for each side; the seed makes a run repeatable.
FUZZ_INPUTS ?= 2000000
FUZZ_SEED ?= 20261122

SITE ?= build/site
SITE_DOCUMENTS = $(SITE)-documents
# The pages of the site, and what they link to.
DOCUMENTS = $(wildcard *.md docs deploy examples) LICENSE config.example.toml docker-compose.yml \
	tests/packaging/README.md tests/clients/registry.py

.DEFAULT_GOAL := help
.PHONY: help install setup pure lint format types test unit e2e fuzz bench soak pooling pools suites routes closes clients fleet demo docs site lock dist all clean
.PHONY: halves unit-e2e unit-rest pure-checks not-compiled pure-wire pure-pools

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

# For who uses the proxy and does not work on it: it needs no .venv. `build` is removed first, because
# what an earlier build left there would be installed too.
install: ## install the command in ~/.local, or in PREFIX=/usr/local
	@$(PYTHON) -c $(PYTHON_IS_NEW_ENOUGH)
	@echo "Installing into $(INSTALL_VENV)"
	@echo "  1 of 2: a virtual environment"
	@$(PYTHON) -m venv "$(INSTALL_VENV)"
	@rm -rf build
	@echo "  2 of 2: the proxy, what it depends on, and its compiled relay (a minute or two)"
	@"$(INSTALL_VENV)/bin/python" -m pip install --quiet --disable-pip-version-check '.$(EXTRAS)'
	@mkdir -p "$(PREFIX)/bin" "$(PREFIX)/share/man/man1"
	@cp docs/lakebase-auth-proxy.1 "$(PREFIX)/share/man/man1"
	@ln -sfn "$(INSTALL_VENV)/bin/lakebase-auth-proxy" "$(PREFIX)/bin/lakebase-auth-proxy"
	@"$(PREFIX)/bin/lakebase-auth-proxy" version --build
	@case ":$$PATH:" in *:"$(PREFIX)/bin":*) ;; *) echo "$(PREFIX)/bin is not in PATH: add it, or type $(PREFIX)/bin/lakebase-auth-proxy" ;; esac

setup: $(INSTALLED) ## make the virtual environment .venv (the other verbs do it by themselves)

# Rebuilt when the dependencies or the compiled relay change. The stamp is written last, so that an
# interrupted installation is repeated. The previous compiled files are removed first: if they cannot
# be compiled now, the proxy must not run old ones.
$(INSTALLED): pyproject.toml $(NATIVE)
	@$(PYTHON) -c $(PYTHON_IS_NEW_ENOUGH)
	@echo "Setting up $(VENV), once"
	@echo "  1 of 2: a virtual environment"
	@$(PYTHON) -m venv $(VENV)
	@rm -rf build $(COMPILED)
	@echo "  2 of 2: what it depends on, and the compiled relay (a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,dev]'
	@$(BIN)/python -c 'import sys; from proxy import native; why = native.WHY_MISSING; why and print("NOT COMPILED: the relay is pure Python here (%s). %s" % (why, native.WHAT_IT_TAKES), file=sys.stderr)'
	@touch $@

# For `make pure test`: what a machine without a compiler runs. The stamp is removed as well, so the
# next make compiles again; in this run the target counts as made.
pure: $(INSTALLED) ## remove the compiled relay for the verbs after it: make pure test
	rm -rf build $(COMPILED) $(INSTALLED)

lint: $(INSTALLED) ## style, format, and the layers of the package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint proxy/native
	$(BIN)/lint-imports

format: $(INSTALLED) ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED) ## mypy, strict, on package and tests
	$(BIN)/mypy

test: lint types unit ## everything that CI requires

unit: $(INSTALLED)
	$(BIN)/pytest -m 'not bench' $(ARGS)

# The same in two halves of about one length: `make --jobs=2 --output-sync=target halves` on two cores.
FIRST_HALF = tests/e2e tests/differential tests/observe tests/session
halves: lint types unit-e2e unit-rest

# On the relay in Python, after `make pure`: what is said on the wire and how it ends; and pools, in
# front of the newest server. Without $(INSTALLED), which would compile it again.
pure-checks: pure-wire pure-pools

not-compiled:
	@$(BIN)/python -c 'import sys; from proxy import native; sys.exit("the relay is compiled: make pure comes first" if native.AVAILABLE else 0)'

pure-wire: not-compiled
	$(BIN)/pytest -m e2e -q -k "(wire or drain) and not pool"

pure-pools: not-compiled
	TEST_SHARDS_VERSION=18 $(BIN)/pytest -m e2e tests/e2e -q -k "pool and not soak"

unit-e2e: $(INSTALLED)
	$(BIN)/pytest -m 'not bench' $(FIRST_HALF)

unit-rest: $(INSTALLED)
	$(BIN)/pytest -m 'not bench' $(addprefix --ignore=,$(FIRST_HALF))

e2e: $(INSTALLED) ## only the tests against the emulator's real PostgreSQL
	$(BIN)/pytest -m e2e $(ARGS)

fuzz: $(INSTALLED) ## two million inputs a side, and generated tests for longer (FUZZ_SEED=...)
	$(BIN)/python -m tests.fuzz.startup --side client --inputs $(FUZZ_INPUTS) --seed $(FUZZ_SEED)
	$(BIN)/python -m tests.fuzz.startup --side upstream --inputs $(FUZZ_INPUTS) --seed $(FUZZ_SEED)
	HYPOTHESIS_PROFILE=deep FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/pytest tests/fuzz tests/property $(ARGS)

# Needs the distribution's PostgreSQL (the demo's has no TLS) and PgBouncer besides .venv, and reports
# what is missing. ARGS: --help lists them. `--only shardmap` needs neither and takes a minute.
# `--base CHECKOUT` compares with the proxy of another checkout in the same rounds.
bench: $(INSTALLED) ## measure beside PgBouncer and a direct connection (twenty minutes)
	@exec $(BIN)/python -m bench $(ARGS)

# ARGS: --seconds N, --seed N (which it prints).
soak: $(INSTALLED) ## move tenants for 10 minutes while servers fail: no row is lost or misplaced
	@exec $(BIN)/python -m tests.soak.moves $(ARGS)

# ARGS: --seconds N, --seed N (which it prints), --clients N.
pooling: $(INSTALLED) ## 200 clients leave something in a pool's sessions for 20 minutes: none finds it
	@exec $(BIN)/python -m tests.soak.pooling $(ARGS)

# What CI does not do: pools with the compiled relay on the newest server, and with Python's on the other.
pools: $(INSTALLED) ## the tests of pools on both relays and on both servers (twenty minutes)
	TEST_SHARDS_VERSION=18 $(BIN)/pytest -m e2e tests/e2e -k "pool and not soak" $(ARGS)
	$(MAKE) pure e2e ARGS='-k "pool and not soak" $(ARGS)'
	$(MAKE) setup

# Asks the package registry for the sources of asyncpg and pg8000. ARGS: --suites NAME...
suites: $(INSTALLED) ## drivers' own test suites: what passes without a pool passes through one
	@exec $(BIN)/python -m tests.soak.driver_suites $(ARGS)

# ARGS: --sessions N, --keys N. 100,000 sessions took 24 minutes on two busy cores.
routes: $(INSTALLED) ## 100,000 sessions over 1,000 shard keys: every one is on the right shard
	@exec $(BIN)/python -m tests.soak.routing $(ARGS)

# ARGS: --closes N, --clients NAME... Drivers that are not installed are left out, and it says so.
closes: $(INSTALLED) ## 1,000 polite closes by each of seven clients: none is counted as lost
	@exec $(BIN)/python -m tests.soak.polite_closes $(ARGS)

# Needs what `.ci/run` installs; a client that is not there is skipped, and its row stays as it was.
# ARGS: -k Python. DUMP_MEGABYTES=1000 (30): how much pg_dump and pg_restore carry.
clients: $(INSTALLED) ## try every driver and tool directly and through the proxy, and write docs/clients.md
	CLIENTS_RECORD=1 $(BIN)/pytest tests/clients --ignore tests/clients/test_document.py $(ARGS)
	$(BIN)/python -m tests.clients.document

# ARGS: --help lists the fleets, limits and outages to try. The default is 20,000 proxies and a limit
# of 100 a second, both scaled to a tenth, and takes less than a minute.
fleet: $(INSTALLED) ## simulate proxies that share the workspace API's limit, in virtual time
	@exec $(BIN)/python -m tests.simulation.fleet $(ARGS)

# exec: no shell remains between make and the program. Ctrl-C reaches the program, make forwards a
# SIGTERM to it, and waits until it has cleaned up.
demo: $(INSTALLED) ## the whole system on this machine, nothing to sign up for
	@exec $(BIN)/lakebase-auth-proxy demo $(ARGS)

docs: $(INSTALLED) ## regenerate config.example.toml, the manual page, the schema, the state tables
	$(BIN)/python -c 'from proxy.config import example_toml; print(example_toml(), end="")' > config.example.toml.new
	mv config.example.toml.new config.example.toml
	$(BIN)/python -m tests.protocol_states
	$(BIN)/python -m tests.generated
	$(BIN)/python -m tests.transcripts

# SITE=DIRECTORY: another place. Every document keeps its path, so that links are those of the repository.
site: $(INSTALLED) ## the documents as a site in build/site, with every link and anchor checked
	@rm -rf $(SITE) $(SITE_DOCUMENTS)
	@mkdir -p $(SITE_DOCUMENTS)
	@tar -cf - $(DOCUMENTS) | tar -xf - -C $(SITE_DOCUMENTS)
	@SITE=$(abspath $(SITE)) SITE_DOCUMENTS=$(abspath $(SITE_DOCUMENTS)) NO_MKDOCS_2_WARNING=1 \
		$(BIN)/mkdocs build --strict
	@echo "Open $(SITE)/index.html"

# What the image and the wheels are made of, at the newest versions: every package with the hashes of
# its files. `make setup` takes the newest, so that the tests see them before a release has them.
LOCK := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header
BUILD_REQUIREMENTS := 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")'

lock: $(INSTALLED) ## lock the packages of the image and of the wheels in requirements/
	$(LOCK) pyproject.toml --output-file requirements/proxy.txt
	$(LOCK) pyproject.toml --extra demo --constraint requirements/proxy.txt --no-annotate --output-file requirements/demo.txt
	$(BIN)/python -c $(BUILD_REQUIREMENTS) | $(LOCK) --no-annotate --output-file requirements/build.txt -

# ARGS: --python PROGRAM (for each), --into DIRECTORY.
dist: $(INSTALLED) ## sdist, a wheel for each Python, SBOM and checksums in dist/, tried
	@$(BIN)/python -m release $(ARGS)

all: test fuzz bench ## test, fuzz and bench

clean: ## remove the virtual environment, the compiled files and every cache
	rm -rf $(VENV) $(COMPILED) *.egg-info build dist htmlcov .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
