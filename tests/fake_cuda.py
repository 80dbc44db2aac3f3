"""What runs on CUDA, typed where there is none: FakeTensorMode knows the shape, type and device of
every tensor and no number, so a tensor that was left on the CPU fails. Every wait for the device is
counted. A process of its own: a device stands in for CUDA, and a process keeps it.

    python tests/fake_cuda.py FOLDER_OF_A_MODEL     a JSON line: {check: "" or what went wrong}"""
import contextlib
import copy
import json
import sys
import traceback
from pathlib import Path

import torch
import transformers.masking_utils as masking_utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("standin")  # a CPU build of torch has no device "cuda"

from engine_tools import ragged_prompts  # noqa: E402
from helpers import import_stage  # noqa: E402

from engine import adapters, models, sampling, slots  # noqa: E402
from engine.optim import OPTIMIZERS  # noqa: E402
from judge import Judge  # noqa: E402
from selfplay.turns import Turn  # noqa: E402

rl = import_stage("02_selfplay_rl")
WHERE = torch.device("standin:0")
WAITS = []  # what asked for a number of a tensor on the device; it gets ones
ROWS = 5


class Mode(FakeTensorMode):
    avoid_device_init = True  # constants get to the device without an allocation there


def ones(shape):
    return [ones(shape[1:]) for _ in range(shape[0])] if len(shape) else 1


def count_waits():
    def stand_in(name, answer):
        def call(x, *args):
            if x.device == WHERE:
                WAITS.append(name)
            return answer(x)
        setattr(FakeTensor, name, call)

    stand_in("tolist", lambda x: ones(x.shape))
    stand_in("item", lambda x: 1.0)
    stand_in("__bool__", lambda x: True)
    stand_in("__float__", lambda x: 1.0)
    stand_in("__int__", lambda x: ROWS)  # all rows live


@contextlib.contextmanager
def on_the_device(model, rank=0):
    """A copy of a model in bfloat16, with an adapter if rank, on the device."""
    there, known = copy.deepcopy(model).to(torch.bfloat16), {}
    adapters.choose_weights(there, rank, 8, 0)
    with Mode():
        def moved(x):
            if id(x) not in known:  # the head and the embedding may be one
                known[id(x)] = torch.empty(x.shape, dtype=x.dtype, device=WHERE)
            return known[id(x)]

        for module in there.modules():
            for name, p in module.named_parameters(recurse=False):
                known[id(p)] = torch.nn.Parameter(moved(p), requires_grad=p.requires_grad)
                module._parameters[name] = known[id(p)]
            for name, x in module.named_buffers(recurse=False):
                module._buffers[name] = moved(x)
        WAITS.clear()
        yield there


def some_turns(tok):
    """Turns with a reward, of both roles."""
    turns = []
    for i, prompt in enumerate(ragged_prompts(tok, 2 * ROWS)):
        role = ("attacker", "defender")[i % 2]
        turns.append(Turn(role, "generated_harmful", dict(id="s", prompt="p"), prompt, "p", game=i,
                          ids=[3 + i] * (2 + i), logps=[-1.0] * (2 + i), reward=float(i % 3)))
    return turns


def fails(call):
    try:
        call()
    except RuntimeError:
        return True
    return False


def check_that_a_wrong_device_is_found(model, tok):
    with on_the_device(model) as there:
        ids = torch.zeros(1, 3, dtype=torch.long)
        assert fails(lambda: there.base_model(input_ids=ids))
        hidden = there.base_model(input_ids=ids.to(WHERE)).last_hidden_state
        assert hidden.device == WHERE and fails(lambda: hidden + torch.zeros(1, 3, 1))
        assert hidden.sum().item() == 1 and WAITS == ["item"]


def sampled(model, tok, rollout, temperature=1.0, top_p=1.0, rank=0):
    """24 tokens of five prompts -> the waits."""
    prompts = ragged_prompts(tok, ROWS)
    with on_the_device(model, rank) as there:
        pairs = sampling.sample(there, tok, prompts, 24, temperature, ROWS, None, top_p, rollout)
        assert [len(ids) for ids, _ in pairs] == [1] * ROWS
        return list(WAITS)


def check_the_plain_way(model, tok):
    """Three looks at which rows have ended, in 24 tokens; then ids and log-probabilities. The
    library takes a mask of fake numbers for one that is traced: then it does not ask it."""
    masking_utils.is_tracing = lambda *_: False
    want = ["__int__"] * 3 + ["tolist"] * 11
    assert sampled(model, tok, "plain") == want
    assert sampled(model, tok, "plain", rank=4) == want
    assert sampled(model, tok, "plain", 0.7, 0.9) == want


def check_slots(model, tok):
    """A step has no wait; after each eight of them count and done of all slots, then ids and
    log-probabilities of those that have ended. By both ways to attend."""
    for works in (False, True):
        slots.flash_works = lambda *_, works=works: works
        for how in (dict(), dict(rank=4), dict(temperature=0.7, top_p=0.9)):
            assert sampled(model, tok, "slots", **how) == ["tolist"] * 4, WAITS


def check_logprobs_losses_and_optimizers(model, tok):
    """02's update, by both optimizers, all weights and an adapter: it waits for each micro-batch
    and for the gradient's norm."""
    turns = some_turns(tok)
    sft = [dict(prompt_ids=t.prompt_ids, completion_ids=t.ids) for t in turns]
    for name in OPTIMIZERS:
        for rank in (0, 4):
            for updates in (1, 3):
                rl.UPDATES = updates
                with on_the_device(model, rank) as there:
                    optimizer = OPTIMIZERS[name](there, (0.9, 0.95), 0.0)
                    m = rl.learn(there, there, optimizer, turns, sft, 0)
                    assert m["skipped"] == 0
                    assert all(p.device == WHERE for p in there.parameters())
                    assert all(t.device == WHERE for n, t in optimizer.tensors().items()
                               if not n.startswith("step"))


def check_the_judge(model, tok):
    pairs = [("a request", "a reply"), ("another one", None), ("a third, longer one", "a b c")]
    with on_the_device(model) as there:
        labels = Judge(there, tok).classify(pairs)
        assert len(labels) == 3
        labels = Judge(there, tok, scoring="generate").classify(pairs)
        assert len(labels) == 3


def main(folder):
    model, tok = models.load_model(folder, "float32")
    count_waits()
    models.device = lambda: WHERE
    found = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check(model, tok)
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
