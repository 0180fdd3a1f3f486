PYTHON ?= python3
BIN := .venv/bin
READY := .venv/foveate-ready
KERNELS := CMakeLists.txt $(wildcard src/foveate/native/src/*)
# What runs on the kernels is tested on each of their instruction sets, and without any.
NATIVE_TESTS := $(wildcard tests/test_native_*.py) $(addprefix tests/test_, \
	attach.py attend.py attend_quantized.py block_sparse.py contracts.py doctor.py gather.py \
	routed.py skip.py)

.PHONY: demo test

demo: $(READY)
	$(BIN)/foveate compare --out foveate-demo
	@echo "The report is in foveate-demo/report.html"

test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: $(READY)
	$(BIN)/foveate doctor
	$(BIN)/foveate model --fetch
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy src
	$(BIN)/python -m pytest -n 2
	set -e; for isa in $$($(BIN)/python -c 'from foveate.native import isa, runnable; \
		print(*{*runnable(), "none"} - {isa()})'); do \
		echo "FOVEATE_ISA=$$isa"; \
		FOVEATE_ISA=$$isa $(BIN)/python -m pytest -n 2 -m "not slow" -k "not gradients" \
			$(NATIVE_TESTS); \
	done

# The stamp comes last: a set-up that was cut short is done again.
$(READY): pyproject.toml constraints.txt $(KERNELS)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[hf,dev]'
	touch $@
