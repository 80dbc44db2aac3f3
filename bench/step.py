"""One RL step on given work: 02_selfplay_rl.py's functions against TRL's GRPOTrainer.

    make bench                              makes .venv-trl, where TRL lives; runs all benchmarks
    python bench/step.py                    three rounds of every side
    python bench/step.py SIDES=ours,trl_fast ROUNDS=5

A step: sample TURNS completions of exactly TOKENS tokens, score them under a frozen reference, one
optimizer step on all of them. No judge on any side, the rewards are given (+1, -1 in turn).

ours        policy.speak, then learn() of 02: reference log-probabilities, advantages, update with
            float32 masters; no SFT mix. The end of a turn does not stop it.
trl         GRPOTrainer as it comes: micro-batches of 8, gradient checkpointing, autocast
trl_fast    no checkpointing, no autocast, micro-batches of MICRO_ROWS (as many tokens as ours), on
            a CPU eager attention, whose backward pass is the faster one there
trl_paged   trl_fast with transformers' continuous batching (CUDA only)

TRL: the same folder, prompts, counts and bfloat16 weights, beta > 0, so it has a reference too,
AdamW on the weights themselves; min_new_tokens keeps EOS away. Prompts stand in groups of GROUP,
which GRPO needs, on all sides. Its time is from on_step_begin to on_step_end. Not compared: vLLM.
The ratio is that of TRL's fastest side.
"""
import dataclasses
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import optim  # noqa: E402
import policy  # noqa: E402
import stage  # noqa: E402
from stage import die  # noqa: E402

# ==================================================================================================
MODEL = policy.EMBEDDED   # a folder works too
DTYPE = "bfloat16"        # of the weights on all sides
TURNS = 32                # completions of a step
GROUP = 2                 # completions of a prompt (GRPO: 2 at least)
PROMPT_TOKENS = 85        # about: defender prompts nearest to it
TOKENS = 96               # of a completion
BETA = 0.01               # weight of the KL term, on all sides
LR = 1e-6                 # on all sides
TRAIN_TOKENS = 3072       # of a micro-batch of ours: what 02 ships with
MICRO_ROWS = 16           # of a micro-batch of trl_fast
ROUNDS = 3                # processes of each side, in turn
WARM_UP = 2               # steps before: the memory that the second one asks for is not yet there
REPEATS = 1               # timed steps in a process
PEER_PYTHON = os.environ.get("PEER_PYTHON", ".venv-trl/bin/python")  # has requirements-trl.txt
SIDES = "ours,trl,trl_fast,trl_paged"
SIDE = "all"              # or one of SIDES: that side alone, in this process
# ==================================================================================================
NAMES = ["ours", "trl", "trl_fast", "trl_paged"]
RANGES = dict(SIDE=["all", *NAMES], DTYPE=["float32", "bfloat16"], TURNS=(2, 4096),
              GROUP=(2, 4096), PROMPT_TOKENS=(1, 10 ** 5), TOKENS=(1, 10 ** 5), BETA=(1e-9, 100.0),
              LR=(0.0, 1.0), TRAIN_TOKENS=(16, 10 ** 7), MICRO_ROWS=(1, 4096), ROUNDS=(1, 99),
              WARM_UP=(0, 99), REPEATS=(1, 99))


def work_of(tok):
    """TURNS prompts (token ids), each GROUP times in a row."""
    rows = common.prompts(tok, TURNS // GROUP, PROMPT_TOKENS)
    return [r for r in rows for _ in range(GROUP)]


def ours():
    """Time our steps."""
    rl = importlib.import_module("02_selfplay_rl")
    rl.KL_COEF, rl.LR, rl.TRAIN_TOKENS, rl.SFT_COEF = BETA, LR, TRAIN_TOKENS, 0.0
    model, tok = policy.load(MODEL, DTYPE)
    ref = policy.load(MODEL, DTYPE)[0].requires_grad_(False)
    optimizer = optim.MasterAdamW(model, (0.9, 0.95), 0.0)
    prompts = work_of(tok)
    drafts = [policy.Turn("defender", "vanilla_benign", {}, p, game=i)
              for i, p in enumerate(prompts)]
    tok.stop_ids = {-1}  # no token: every completion has TOKENS
    generator = torch.Generator().manual_seed(0)
    played = []

    def work():
        turns = []
        played.append(common.seconds(lambda: turns.extend(policy.speak(
            model, tok, drafts, True, TOKENS, 1.0, rl.SAMPLE_BATCH, generator))))
        turns = [dataclasses.replace(t, reward=(-1.0) ** i) for i, t in enumerate(turns)]
        rl.learn(model, ref, optimizer, turns, [], 0)
        if any(len(t.ids) != TOKENS for t in turns):
            die(f"side ours: not all completions have {TOKENS} tokens")

    for _ in range(WARM_UP):
        work()
    times = [common.seconds(work) for _ in range(REPEATS)]
    common.report(times, TURNS * TOKENS, prompt=sum(map(len, prompts)) / TURNS,
                  played=sum(played[WARM_UP:]) / REPEATS)


def settings():
    """What a side of TRL's changes in its defaults: the arguments of GRPOConfig."""
    if SIDE == "trl":
        return dict(per_device_train_batch_size=min(8, TURNS),
                    gradient_accumulation_steps=TURNS // min(8, TURNS),
                    model_init_kwargs=dict(dtype=DTYPE),
                    generation_kwargs=dict(min_new_tokens=TOKENS))
    rows, attention = min(MICRO_ROWS, TURNS), "sdpa" if torch.cuda.is_available() else "eager"
    out = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=TURNS // rows,
               gradient_checkpointing=False, bf16=False,
               model_init_kwargs=dict(dtype=DTYPE, attn_implementation=attention),
               generation_kwargs=dict(min_new_tokens=TOKENS))
    if SIDE == "trl_paged":  # takes no min_new_tokens; here eos is only what stops a request
        out |= dict(use_transformers_continuous_batching=True,
                    generation_kwargs=dict(eos_token_id=-1))
    return out


def trl_steps():
    """Time TRL's steps. Runs in PEER_PYTHON."""
    import datasets
    import transformers
    import trl
    transformers.utils.logging.disable_progress_bar()
    folder = str(policy.unpack_embedded() if MODEL == policy.EMBEDDED else MODEL)
    tok = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    prompts = work_of(tok)[::GROUP]
    texts = [tok.decode(p, clean_up_tokenization_spaces=False) for p in prompts]
    if tok(texts).input_ids != prompts:
        die("the prompts do not come back from their texts: TRL would see others")
    times, lengths = [], []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            common.wait()
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            common.wait()
            times.append(time.perf_counter() - self.began)

    def reward(completion_ids, **kwargs):
        lengths.extend(map(len, completion_ids))
        return [(-1.0) ** i for i in range(len(completion_ids))]

    steps = WARM_UP + REPEATS
    with tempfile.TemporaryDirectory() as out:
        config = trl.GRPOConfig(
            output_dir=out, max_steps=steps, learning_rate=LR, beta=BETA, num_generations=GROUP,
            max_completion_length=TOKENS, shuffle_dataset=False, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(), **settings())
        trainer = trl.GRPOTrainer(
            model=folder, reward_funcs=reward, args=config, processing_class=tok,
            train_dataset=datasets.Dataset.from_list([dict(prompt=t) for t in texts] * steps),
            callbacks=[Clock()])
        trainer.train()
    if lengths != [TOKENS] * (steps * TURNS):
        die(f"side {SIDE}: {len(lengths)} completions of {min(lengths)} to {max(lengths)} tokens, "
            f"not {steps} x {TURNS} of {TOKENS}")
    common.report(times[WARM_UP:], TURNS * TOKENS, prompt=sum(map(len, prompts)) / len(prompts),
                  version=trl.__version__)


def main(argv):
    """All sides in turn, or the one that is named."""
    stage.configure(globals(), argv)
    if SIDE != "all":
        return ours() if SIDE == "ours" else trl_steps()
    names = [n for n in SIDES.split(",") if n != "trl_paged" or torch.cuda.is_available()]
    if "ours" not in names or not set(names) <= set(NAMES) or len(names) < 2:
        die(f"SIDES={SIDES!r}: ours and at least one of trl, trl_fast, trl_paged (CUDA only)")
    if TURNS % GROUP or TURNS % min(8, TURNS) or TURNS % min(MICRO_ROWS, TURNS):
        die(f"TURNS={TURNS}: must be a multiple of GROUP, MICRO_ROWS and 8")
    peer = ROOT / PEER_PYTHON  # an absolute path stays what it is
    if not peer.exists():
        die(f"{PEER_PYTHON} not found: make bench, or python3 -m venv .venv-trl && "
            ".venv-trl/bin/pip install -r bench/requirements-trl.txt")
    common.make_base(MODEL)
    common.head(f"one RL step: {MODEL}, {DTYPE}, {TURNS} turns, prompts ~{PROMPT_TOKENS}, "
                f"completions {TOKENS} tokens")
    sides = {n: (sys.executable if n == "ours" else peer, [*argv, f"SIDE={n}"]) for n in names}
    results = common.alternate(__file__, sides, ROUNDS, {"trl_paged"})
    medians = common.table(results, "ours", "tokens")
    report = results["ours"][0]
    fastest = min((n for n in medians if n != "ours"), key=medians.get, default=None)
    if fastest is None:
        die("no side of TRL's ran here")
    print(f"prompts {report['prompt']:.0f} tokens on the mean; of our step "
          f"{report['played']:.2f} s is sampling; TRL {results[fastest][0]['version']}, "
          f"its fastest side is {fastest}")
    common.ratio("step", medians[fastest], medians["ours"])


if __name__ == "__main__":
    main(sys.argv[1:])
