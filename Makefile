# setup: a virtual environment with everything pinned. demo, test, lint, bench and server set it up first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
# The server's address, for `make server` here and for the demo that should show up there.
PREFECT_PORT ?= 4200
# Processes that share the tests, file by file; each computes with one thread.
WORKERS ?= 2

.PHONY: setup ceph postgres runners chromium demo test test-slow test-long lint format bench server clean

setup: $(READY)

$(READY): pyproject.toml infra/constraints.txt
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c infra/constraints.txt torch
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c infra/constraints.txt --editable '.[dev,report,native]'
	touch $@

# Debian and Ubuntu: a real S3 server for the slow tests, about 100 packages. They skip those without it.
ceph:
	command -v radosgw >/dev/null && command -v ceph-mon >/dev/null && command -v ceph-osd >/dev/null || { \
		sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); $$sudo apt-get update -qq && \
		$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends radosgw ceph-mon ceph-osd; }

# Debian and Ubuntu: the database of the slow test in which it goes away. It skips without it.
postgres:
	command -v postgres >/dev/null || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || { \
		sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); $$sudo apt-get update -qq && \
		$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql; }

# Dask and Ray for the slow tests of their task runners, which skip without them.
runners: setup
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c infra/constraints.txt --editable '.[ray,dask]'

# Debian and Ubuntu: a browser for the slow tests of the Prefect UI. They skip those without it.
chromium:
	command -v chromium >/dev/null || { \
		sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); $$sudo apt-get update -qq && \
		$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; }

demo: setup
	$(RUN)/winnow demo

test: setup
	$(RUN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu"

test-slow: setup
	$(RUN)/python -m pytest -n $(WORKERS) --dist loadfile -m "slow and not long and not gpu"

# What would make CI longer than an hour.
test-long: setup
	$(RUN)/python -m pytest -m "long and not gpu"

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: setup
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

bench: setup
	for file in tests/benchmarks/bench_*.py; do PYTHONPATH=. $(RUN)/python $$file || exit 1; done

server: setup
	# Without its address the UI asks port 4200, whatever the port here.
	PREFECT_UI_API_URL=http://127.0.0.1:$(PREFECT_PORT)/api \
		DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT=false \
		$(RUN)/prefect server start --host 127.0.0.1 --port $(PREFECT_PORT)

clean:
	rm -rf $(VENV) build *.egg-info lake
