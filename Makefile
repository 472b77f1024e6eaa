# make demo · quick · test · test-newest · test-oldest · fuzz · check · check-compiled · docs · bench · tune · gpu · sanitize.
# Everything is installed into $(VENV), at the versions of $(CONSTRAINTS); what is imported is compiled then, and kept: without,
# as images of containers like to have it, each process compiles PyTorch and timm anew, 8 of the 13 s of importing them.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
CONSTRAINTS ?= .ci/constraints.txt
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
OUT := $(or $(OUT),benchmarks/results/$(shell date +%Y-%m-%d-%H%M))
TIMM_SOURCE := $(VENV)/timm
MINUTES ?= 4.75
GPU ?= h200
N ?= 10000
SEED ?= 0
PROCESSES ?= $(shell nproc)

COMPILED := sm_80,sm_89,sm_90,sm_100,sm_120
KERNELS := $(foreach name,outer block short_attention attention_backward gelu backward pixel_embed fold inner totals kernels \
    approximations,tests/test_$(name).py)

.PHONY: demo quick test test-newest test-oldest fuzz check check-compiled docs bench tune gpu sanitize clean
.DELETE_ON_ERROR:

$(READY): setup.py pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python -m pip install -q --no-compile -e ".[dev]"
	touch $@

# Train on real handwritten digits, classify the held-out image files with the checkpoint, and look into it beside the same model
# without inner transformers, trained the same way. Stopped, it continues.
demo: $(READY)
	$(BIN)/tnt-fast train digits --out runs/digits --resume
	$(BIN)/tnt-fast classify runs/digits/data/val --checkpoint runs/digits/last.pt --topk 2 \
	    --page runs/digits/predictions.png > runs/digits/predictions.txt
	@echo "a few of runs/digits/predictions.txt:" && awk 'NR % 60 == 1' runs/digits/predictions.txt
	$(BIN)/tnt-fast train digits --model-kwargs "inner_blocks=()" --out runs/digits-vit --resume
	$(BIN)/tnt-fast visualize $$(for i in 0 1 2 3 4 5 6 7 8 9; do ls runs/digits/data/val/$$i/*.png | head -n 1; done) \
	    --checkpoint runs/digits/last.pt --beside-checkpoint runs/digits-vit/last.pt --out runs/digits/seen
	@echo "pictures: runs/digits/training.png runs/digits/predictions.png; open runs/digits/seen/index.html"

test: check $(TIMM_SOURCE)
	$(BIN)/python -m pytest -n 2 --dist worksteal --timm-source=$(TIMM_SOURCE) tests

# The same with the newest releases, and with the oldest that setup.py declares; each in an environment of its own.
test-newest test-oldest: test-%:
	$(MAKE) test VENV=.venv-$* CONSTRAINTS=.ci/$*.txt

# The tests nearest to what changed since the last commit, or to FILES="...", in at most 90 seconds on two idle cores.
quick: $(READY)
	$(BIN)/python -m tests.quick $(FILES)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# N random cases against the reference; `make test` has a few hundred. Fails where one is wrong, with the command that repeats it.
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --count $(N) --seed $(SEED) --processes $(PROCESSES) --json benchmarks/results/fuzz.json

# The compiled kernels run on the CPU, all of it: five targets, four precisions, every case, then mutations; for a release, in one
# to two hours on two cores. Fails where an answer is wrong, and where fewer than 95% of the mutations are noticed.
check-compiled: $(READY)
	$(BIN)/python -m pytest -q -n $(PROCESSES) --dist worksteal --wide --paths $(COMPILED) -k "sm_ or Shipped or wide" \
	    --compiled-json benchmarks/results/compiled.json $(KERNELS) tests/test_static_cost.py tests/test_mutations.py \
	    tests/test_shared_memory.py
	$(BIN)/python -m tests.mutations --count 300 --seed $(SEED) --processes $(PROCESSES) --json benchmarks/results/mutations.json

# The docstrings and all pages as HTML in site/; a broken link or a name that is not there fails. The pages and the package are
# gathered first: links reach out of docs/, and kernels/ is a part of tnt_fast/ only where it is installed.
docs: $(VENV)/docs
	rm -rf .cache/docs && mkdir -p .cache/docs/pages .cache/docs/source
	cp -r --parents README.md CONTRIBUTING.md CHANGELOG.md docs examples/README.md benchmarks/results .cache/docs/pages
	cp -r tnt_fast .cache/docs/source && cp -r kernels .cache/docs/source/tnt_fast
	$(BIN)/mkdocs build --strict
	@echo "open site/index.html"

$(VENV)/docs: $(READY)
	PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python -m pip install -q -e ".[docs]"
	touch $@

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only

# On a machine with a GPU, in about 9 minutes: its name, the kernels' tests (150 to 240 s beside 16 cores, those of outer first) while
# what is timed compiles behind them, times (MINUTES=0: every row; SKIP="FILE ...": not those that these files have); fails at the
# end if one of them did. Interrupted, or out of minutes: make gpu OUT=the same folder goes on. Without .venv it uses $(PYTHON) with
# what is installed there. Then, anywhere: python -m benchmarks.report
gpu sanitize: PY = $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))
gpu:
	mkdir -p $(OUT)
	$(PY) -c 'import torch, sys; torch.cuda.is_available() or sys.exit("make gpu: torch sees no GPU on this machine")'
	$(PY) -m tnt_fast.cli info | tee $(OUT)/machine.txt
	failed=; skip=; file=$(OUT)/benchmarks.json; n=1; \
	for known in $(SKIP); do skip="$$skip --skip-measured $$known"; done; \
	while [ -s $$file ]; do skip="$$skip --skip-measured $$file"; n=$$((n + 1)); file=$(OUT)/benchmarks-$$n.json; done; \
	nice $(PY) -m benchmarks.precompile --seconds 245 $$skip > $(OUT)/precompile.txt 2>&1 & \
	if ! grep -qs " passed" $(OUT)/gpu-tests.txt || grep -qE "[0-9]+ (failed|error)" $(OUT)/gpu-tests.txt; then \
	    timeout -k 10 -s INT 240 $(PY) -m pytest $(KERNELS) -n 12 \
	        -v --paths gpu -p no:cacheprovider --junitxml $(OUT)/gpu-tests.xml > $(OUT)/gpu-tests.txt; \
	    case $$? in 0) ;; 124|137) failed="$$failed kernel-tests-unfinished-after-240-s" ;; *) failed="$$failed kernel-tests" ;; esac; \
	fi; \
	grep -E "^(FAILED|ERROR)|[0-9]+ (passed|failed)" $(OUT)/gpu-tests.txt; wait; \
	sed -i -E 's/ hostname="[^"]*"//; s#/[^ "]*/site-packages/##g' $(OUT)/gpu-tests.*; \
	$(PY) -m pytest benchmarks --ignore benchmarks/test_flops.py --benchmark-only -q -p no:cacheprovider --minutes $(MINUTES) \
	    $$skip --benchmark-json $$file || failed="$$failed benchmarks"; \
	if [ -n "$$failed" ]; then echo "make gpu: failed:$$failed" >&2; exit 1; fi

# The launch tables of the kernels, swept: on a GPU by time, elsewhere by simulating the machine code for GPU, over all cores.
# Interrupted, it goes on. WRITE=1 puts what won into kernels/.
tune: $(READY)
	$(BIN)/python -m benchmarks.tune --gpu $(GPU) --processes $(PROCESSES) $(if $(WRITE),--write)

# Every kernel once under compute-sanitizer, which comes with CUDA's tools.
sanitize:
	mkdir -p $(OUT)
	for tool in memcheck racecheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 9 $(PY) -m benchmarks.kernels --call > $(OUT)/$$tool.txt 2>&1 \
	    || { tail -20 $(OUT)/$$tool.txt; exit 1; }; done

# timm's own tests come with its source distribution; without a network the tests that use them show as skipped.
$(TIMM_SOURCE): $(READY)
	mkdir -p $@
	version=$$($(BIN)/python -c 'import timm; print(timm.__version__)') && \
	$(BIN)/python -m pip download -q --no-deps --no-binary timm -d $@ timm==$$version && \
	tar -xzf $@/timm-$$version.tar.gz -C $@ --strip-components 1 || echo "timm's source is not at hand"

clean:
	rm -rf .venv .venv-newest .venv-oldest .cache build dist site *.egg-info
