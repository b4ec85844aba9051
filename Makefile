# Every target sets up what it needs in .venv/ first; all are safe to repeat.
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
# A module's tests stay in one process, and tests/conftest.py says which modules come first; more
# than four processes would not help.
PYTEST := $(VENV_PYTHON) -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

.PHONY: help demo test test-all soak lint setup clean

help:
	@echo "make demo      serve a real target, train a small draft against it, plot the losses"
	@echo "make test      lint, types, and all tests that need only pip"
	@echo "make test-all  what needs more: real weights, peers, Ray, a container, a browser"
	@echo "make soak      50,000 examples a property, a million frames, 50,000 requests, 100 kills"
	@echo "PYTHON=...     interpreter to build .venv/ with; its torch is reused if it has one"

setup:
	@$(PYTHON) tools/set_up.py dev

demo:
	@$(PYTHON) tools/set_up.py demo
	@$(VENV_PYTHON) examples/demo.py $(DEMO_ARGS)

lint: setup
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

test: lint
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-all:
	@$(PYTHON) tools/set_up.py dev containers demo page peer ray quantised
	$(PYTEST) -m "slow and not gpu" $(PYTEST_ARGS)

soak: setup
	$(VENV_PYTHON) -m pytest -m "not slow and not gpu" tests/schemas --hypothesis-profile=soak --timeout=7200
	EAGLE3TEST_DECODER_INPUTS=1000000 EAGLE3TEST_HTTP_INPUTS=50000 \
		EAGLE3TEST_OPENAPI_EXAMPLES=2000 EAGLE3TEST_SEED=$$(date +%s) \
		$(VENV_PYTHON) -m pytest tests/fuzz -s --timeout=7200
	EAGLE3TEST_KILLS=100 EAGLE3TEST_NETWORK_STEPS=5000 EAGLE3TEST_RESETS=5000 \
		EAGLE3TEST_SEED=$$(date +%s) $(VENV_PYTHON) -m pytest -s --timeout=7200 \
		tests/faults -k "random or resets"
	EAGLE3TEST_GROUPS=50 $(VENV_PYTHON) -m pytest -s --timeout=7200 tests/parallel -k in_a_row

clean:
	rm -rf .venv demo-report
