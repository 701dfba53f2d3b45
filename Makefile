PYTHON ?= python3

.PHONY: install run test soak attack lint

install: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	.venv/bin/python -m compileall -q -j 0 -x /tests/ .venv/lib > /dev/null || true  # on all cores; pip takes one
	touch .venv/installed

run: install
	.venv/bin/python ppo_continuous_lrrl.py --total-timesteps 300000 $(ARGS)

test: install
	.venv/bin/python -m pytest -n auto --dist worksteal $(ARGS)

soak: install
	KILLS=$${KILLS:-50} .venv/bin/python -m pytest -n auto --dist worksteal -k killed tests/test_resume.py tests/test_benchmark.py $(ARGS)

attack: install
	ATTACKS=$${ATTACKS:-300} .venv/bin/python -m pytest -n auto --dist worksteal tests/test_run.py tests/test_files.py tests/test_checkpoints.py \
		tests/test_journal.py $(ARGS)

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
