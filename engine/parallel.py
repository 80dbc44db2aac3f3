"""A run in several processes: `accelerate launch`, `torchrun`. Each runs the same program.

Games, seeds and uniform numbers are functions of (SEED, step, game), so every process draws the
same. Each plays, judges and learns from its share of the work; what comes out is gathered, so that
all know all of it. Gradients are summed before the optimizer's step, so the weights stay equal.
Nothing is wrapped: DDP arms no reducer where a model's parts are called directly, as here. Process
groups, gathering and sums are accelerate's. In one process all of this does nothing."""
import contextlib
import datetime
import os
import sys
import time

_state = None   # accelerate's PartialState, if there are several processes
_alone = False  # inside alone()
BUCKET = 2 ** 24  # gradients that are summed in one go


def begin():
    """Join the processes of this run. Only the first one prints."""
    global _state
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and _state is None:
        import torch
        from accelerate import PartialState
        patience = datetime.timedelta(hours=2)  # while the first one saves on a slow disk
        _state = PartialState(cpu=not torch.cuda.is_available(), timeout=patience)
        if not is_first():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def end():
    """Leave the other processes."""
    global _state
    if _state is not None:
        import torch
        torch.distributed.destroy_process_group()
        _state = None


def number_of():
    """How many processes share the work now."""
    return 1 if _state is None or _alone else _state.num_processes


def index():
    """Which of them this process is, from 0."""
    return 0 if number_of() == 1 else _state.process_index


def is_first():
    """Is this the process that prints and writes?"""
    return _state is None or _state.process_index == 0


def wait_to_complain():
    """The first process has a moment to print the same error and to end all others."""
    if not is_first():
        time.sleep(3)


@contextlib.contextmanager
def alone():
    """Inside, this process does all the work that it is given."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def deal(sizes):
    """Sizes of pieces of work -> for each process the indices of its pieces, ascending. The largest
    come first, each goes to the process that has the least."""
    loads = [0] * number_of()
    shares = [[] for _ in loads]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += sizes[i]
    return list(map(sorted, shares))


def mine(sizes):
    """The indices of the pieces of work that this process does."""
    return deal(sizes)[index()]


def share(batches, sizes):
    """Those of the batches (lists of indices into `sizes`) that this process does."""
    return [batches[k] for k in mine(_work(batches, sizes))]


def _work(batches, sizes):
    work = []
    for batch in batches:
        work.append(sum(sizes[i] for i in batch))
    return work


def imbalance(batches, sizes):
    """Work of the process that has the most by share(), over the mean; 1 is best."""
    work = _work(batches, sizes)
    loads = _work(deal(work), work)
    return max(loads) * len(loads) / max(1, sum(loads))


def _of_all(values):
    """A list of this process -> the lists of all processes, end to end."""
    if number_of() == 1:
        return values
    from accelerate.utils import gather_object
    return _talk(gather_object, values)


def gather(found):
    """{piece: its outcome} of this process -> those of all processes."""
    return dict(_of_all(list(found.items())))


def total(values, most=()):
    """{name: number} of this process -> sums over all; of the names in `most` the largest ones."""
    every, out = _of_all([values]), {}
    for name in values:
        numbers = [each[name] for each in every]
        out[name] = max(numbers) if name in most else sum(numbers)
    return out


def add_up(x):
    """A CPU tensor of this process -> the sum over all processes."""
    every = _of_all([x])
    return sum(every[1:], start=every[0])


def once(call, *args):
    """call(*args) in the first process alone. The others get its value; if it fails, they end."""
    if number_of() == 1:
        return call(*args)
    from accelerate.utils import broadcast_object_list
    out = [False, None]
    try:
        if is_first():
            out = [True, call(*args)]
    finally:
        _talk(broadcast_object_list, out)
    if not out[0]:
        sys.exit(1)
    return out[1]


def sum_gradients(tensors):
    """Sum tensors over all processes, in place, in float32."""
    if number_of() == 1:
        return
    import torch
    from accelerate.utils import reduce
    bucket, size = [], 0
    for n, last in enumerate(tensors, 1):
        bucket.append(last)
        size += last.numel()
        if size >= BUCKET or n == len(tensors):
            flat = _talk(reduce, torch.cat([x.flatten().float() for x in bucket]), "sum")
            for x, part in zip(bucket, flat.split(list(map(torch.numel, bucket)))):
                x.copy_(part.view_as(x))
            bucket, size = [], 0


def check_equal(tensors):
    """Stop if the tensors are not the same in all processes, to the last bit of their sums."""
    tensors = [x for x in tensors if not hasattr(x, "to_local")]  # no shares
    if number_of() == 1 or not tensors:
        return
    import torch
    sums = torch.stack([x.detach().double().sum() for x in tensors]).tolist()
    if len(set(map(str, _of_all([sums])))) > 1:
        sys.exit("error: the processes have different weights: this is an error of the program")


def _talk(call, *args):
    """A collective call. It fails where another process has ended."""
    try:
        return call(*args)
    except RuntimeError as problem:
        wait_to_complain()
        sys.exit("error: another process of this run has ended (its own line says why); the same "
                 f"command goes on ({str(problem).splitlines()[0][:80]})")
