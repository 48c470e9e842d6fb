# make demo    install, train on embedded phantoms, find structures in unseen ones, write demo/report.html
#              EXAM=neck_ct.nii.gz: find those of the shipped model in an exam of yours instead, in seconds
# make test    install, run the tests
# make check   lint and format, as the pre-commit hooks do
# make bench   speed, as ratios of two things measured side by side; make bench-peers: against ANTs and elastix

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_TO_TEST := $(VENV)/.ready-to-test
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

.PHONY: demo test check bench bench-peers clean

demo: $(READY)
ifdef EXAM
	$(BIN)/deepatlas locate -m head-neck-ct -i "$(EXAM)" -o demo/exam --report --overwrite
	@echo "The report: $(CURDIR)/demo/exam/report.html"
else
	$(BIN)/deepatlas demo -o demo --overwrite
	@echo "The report: $(CURDIR)/demo/report.html"
endif

test: $(READY_TO_TEST)
	$(BIN)/python -m pytest -q

check: $(READY_TO_TEST)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

bench: $(READY)
	$(BIN)/python -m benchmarks --json bench.json

bench-peers: $(READY) .peers/.ready
	$(BIN)/python -m benchmarks --rows vs_ants,vs_elastix --json bench-peers.json

.peers/.ready:
	$(PYTHON) -m venv .peers
	.peers/bin/python -m pip install --quiet --disable-pip-version-check antspyx itk-elastix
	@touch .peers/.ready

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("deepatlas needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) .
	@touch $@

$(READY_TO_TEST): $(READY)
	$(BIN)/python $(INSTALL) '.[all]'
	@touch $@

clean:
	rm -rf $(VENV) .peers demo
