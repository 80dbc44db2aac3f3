"""One RL step on given work: 02_selfplay_rl.py's functions against TRL's GRPOTrainer.

    make bench                              makes .venv-trl, where TRL lives; runs all benchmarks
    python bench/step.py                    three rounds of every side
    python bench/step.py SIDES=ours,trl_fast ROUNDS=5
    python bench/step.py LORA_RANK=16       an adapter learns: ours against TRL with peft

A step: sample TURNS completions of exactly TOKENS tokens, score them under a frozen reference, one
optimizer step on all of them. No judge on any side, the rewards are given (+1, -1 in turn).

ours        sample(), then learn() of 02: reference log-probabilities, advantages, update with
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
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from engine import adapters, models, run  # noqa: E402
from engine.optim import MasterAdamW  # noqa: E402
from engine.run import ROOT, die  # noqa: E402
from selfplay.turns import Turn, complete  # noqa: E402

# ==================================================================================================
MODEL = "smollm2"         # a folder works too
DTYPE: Literal["float32", "bfloat16"] = "bfloat16"  # of the weights on all sides
TURNS = 32                # completions of a step
GROUP = 2                 # completions of a prompt (GRPO: 2 at least)
PROMPT_TOKENS = 85        # about: defender prompts nearest to it
TOKENS = 96               # of a completion
BETA = 0.01               # weight of the KL term, on all sides
LR = 1e-6                 # on all sides
LORA_RANK = 0             # of an adapter on all linear layers that learns instead, on all sides
TRAIN_TOKENS = 3072       # of a micro-batch of ours: what 02 ships with
MICRO_ROWS = 16           # of a micro-batch of trl_fast
ROUNDS = 3                # processes of each side, in turn
WARM_UP = 2               # steps before: the memory that the second one asks for is not yet there
REPEATS = 1               # timed steps in a process
PEER_PYTHON = os.environ.get("PEER_PYTHON", ".venv-trl/bin/python")  # has requirements-trl.txt
SIDES = "ours,trl,trl_fast,trl_paged"
SIDE: Literal["all", "ours", "trl", "trl_fast", "trl_paged"] = "all"  # or one, in this process
# ==================================================================================================
TRL_SIDES = ["trl", "trl_fast", "trl_paged"]


def work_of(tok):
    """TURNS prompts (token ids), each GROUP times in a row."""
    rows = []
    for row in common.prompts(tok, TURNS // GROUP, PROMPT_TOKENS):
        rows += [row] * GROUP
    return rows


def ours():
    """Time our steps."""
    stage = common.stage("02_selfplay_rl.py", f"KL_COEF={BETA}", f"LR={LR}",
                         f"TRAIN_TOKENS={TRAIN_TOKENS}", "SFT_COEF=0")
    learn, batch = stage["learn"], stage["SAMPLE_BATCH"]
    ref, tok = models.load_model(MODEL, DTYPE)
    ref.requires_grad_(False)
    if LORA_RANK:
        model = adapters.twin(ref)
        adapters.choose_weights(model, LORA_RANK, 2 * LORA_RANK, 0)
    else:
        model, _ = models.load_model(MODEL, DTYPE)
    optimizer = MasterAdamW(model, (0.9, 0.95), 0.0)
    prompts, drafts = work_of(tok), []
    for i, prompt in enumerate(prompts):
        drafts.append(Turn("defender", "vanilla_benign", {}, prompt, game=i))
    tok.stop_ids = {-1}  # no token: every completion has TOKENS
    generator = torch.Generator().manual_seed(0)
    played = []

    def play(turns):
        turns += complete(model, tok, drafts, True, TOKENS, 1.0, batch, generator)

    def work():
        turns = []
        played.append(common.seconds(lambda: play(turns)))
        for i, turn in enumerate(turns):
            if len(turn.ids) != TOKENS:
                die(f"side ours: not all completions have {TOKENS} tokens")
            turns[i] = dataclasses.replace(turn, reward=(-1.0) ** i)
        learn(model, ref, optimizer, turns, [], 0)

    common.repeat(work, WARM_UP)
    times = common.repeat(work, REPEATS)
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
    folder = str(models.unpack_embedded() if MODEL == models.EMBEDDED else MODEL)
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

    steps, lora = WARM_UP + REPEATS, None
    if LORA_RANK:
        import peft
        lora = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear",
                               lora_dropout=0.0, task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as out:
        config = trl.GRPOConfig(
            output_dir=out, max_steps=steps, learning_rate=LR, beta=BETA, num_generations=GROUP,
            max_completion_length=TOKENS, shuffle_dataset=False, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(), **settings())
        trainer = trl.GRPOTrainer(
            model=folder, reward_funcs=reward, args=config, processing_class=tok,
            train_dataset=datasets.Dataset.from_list([dict(prompt=t) for t in texts] * steps),
            callbacks=[Clock()], peft_config=lora)
        trainer.train()
    if lengths != [TOKENS] * (steps * TURNS):
        die(f"side {SIDE}: {len(lengths)} completions of {min(lengths)} to {max(lengths)} tokens, "
            f"not {steps} x {TURNS} of {TOKENS}")
    common.report(times[WARM_UP:], TURNS * TOKENS, prompt=sum(map(len, prompts)) / len(prompts),
                  version=trl.__version__)


def checked_sides():
    """The names in SIDES that can run here; stops on constants that TRL cannot take."""
    names = SIDES.split(",")
    if not torch.cuda.is_available() and "trl_paged" in names:
        names.remove("trl_paged")
    if "ours" not in names or not set(names) <= {"ours", *TRL_SIDES} or len(names) < 2:
        die(f"SIDES={SIDES!r}: ours and at least one of trl, trl_fast, trl_paged (CUDA only)")
    if GROUP < 2 or TURNS % GROUP or TURNS % min(8, TURNS) or TURNS % min(MICRO_ROWS, TURNS):
        die(f"TURNS={TURNS}: must be a multiple of GROUP, which is 2 or more, MICRO_ROWS and 8")
    if BETA == 0:
        die("BETA=0.0: must be above 0, so that TRL has a reference model too")
    if not (ROOT / PEER_PYTHON).exists():  # an absolute path stays what it is
        die(f"{PEER_PYTHON} not found: make bench, or python3 -m venv .venv-trl && "
            ".venv-trl/bin/pip install -r bench/requirements-trl.txt")
    return names


def main(argv):
    """All sides in turn, or the one that is named."""
    run.configure(globals(), argv)
    if SIDE != "all":
        return ours() if SIDE == "ours" else trl_steps()
    names, sides = checked_sides(), {}
    common.make_base(MODEL)
    common.head(f"one RL step: {MODEL}, {DTYPE}, {TURNS} turns, prompts ~{PROMPT_TOKENS}, "
                f"completions {TOKENS} tokens")
    for name in names:
        python = sys.executable if name == "ours" else ROOT / PEER_PYTHON
        sides[name] = (python, [*argv, f"SIDE={name}"])
    results = common.alternate(__file__, sides, ROUNDS, {"trl_paged"})
    medians = common.table(results, "ours", "tokens")
    mine = results["ours"][0]
    peers = [name for name in medians if name != "ours"]
    if not peers:
        die("no side of TRL's ran here")
    fastest = min(peers, key=medians.get)
    print(f"prompts {mine['prompt']:.0f} tokens on the mean; of our step {mine['played']:.2f} s is "
          f"sampling; TRL {results[fastest][0]['version']}, its fastest side is {fastest}")
    common.ratio("step", medians[fastest], medians["ours"])


if __name__ == "__main__":
    main(sys.argv[1:])
