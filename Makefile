PYTHON ?= python3
BIN := .venv/bin
READY := .venv/foveate-ready

.PHONY: demo test

demo: $(READY)
	$(BIN)/foveate compare --out foveate-demo
	@echo "The report is in foveate-demo/report.html"

test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: $(READY)
	$(BIN)/foveate model --fetch
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy src
	$(BIN)/python -m pytest -n 2

# The stamp comes last: a set-up that was cut short is done again.
$(READY): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[hf,dev]'
	touch $@
