# Two commands for a newcomer: `make quickstart` and `make test`. Both make the virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test lint docs clean tensorrt-bindings

quickstart: $(STAMP)
	$(BIN)/infoprune-export run quickstart

test: $(STAMP) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Pages of docs/reference, and build/docs from the docstrings.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cpu,docs]"
	$(BIN)/python docs/make_reference.py
	$(BIN)/python -m pdoc --docformat google --no-show-source -o build/docs infoprune_export '!infoprune_export.engine.tensorrt.plugin'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cpu,dev]"
	$(BIN)/python -m compileall -q infoprune_export # tests start many processes, some of them forbidden to write bytecode
	touch $@

# For the tests marked tensorrt: three releases of TensorRT's Python bindings, which cannot live in one environment, the
# plugin registry of the newest, and the compiler and assembler of CUDA. They carry NVIDIA's licence; nothing of them is
# copied.
tensorrt-bindings: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/tensorrt/10.3.0 tensorrt_cu12_bindings==10.3.0
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/tensorrt/10.16.1 tensorrt_cu13_bindings==10.16.1.11
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/tensorrt/11.4.0 tensorrt_cu13_bindings==11.4.0.106 tensorrt_lean_cu13_libs==11.4.0.106
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/tensorrt/cuda nvidia-cuda-nvcc==13.5.37 nvidia-cuda-nvrtc==13.5.37

clean:
	rm -rf $(VENV) runs build dist
