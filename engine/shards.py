"""A model whose weights lie in shares on several processes: torch's FSDP2 (`fully_shard`).

Each process keeps a share of every matrix, of its gradient and of the optimizer's state. While the
policy learns, a layer is put together when it is needed and taken apart again. A rollout needs each
layer once a token, so it works inside whole(), where all of it is put together once."""
import contextlib
import math
import types

import torch

from engine import parallel


def shard(model):
    """Spread a loaded model, which is the same in all processes, over them."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    for layer in model.base_model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.call = types.MethodType(lambda self, function, *args: function(self, *args), model)
    register_fsdp_forward_method(model, "call")  # its hooks put the weights together
    model.in_shards = model.no_graphs = True  # its layers wait for one another by other streams
    with torch.no_grad():  # the hooks find out which part is the outermost one
        model.call(lambda m: m.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long,
                                                                device=m.device))[0])
    for part in _parts(model):
        part.reshard()


def _parts(model):
    from torch.distributed.fsdp import FSDPModule
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model):
    """Does each process have a share of the weights only, at this moment?"""
    return getattr(model, "in_shards", False)


def call(function, model, *args):
    """function(model, *args), where the function runs the model's parts."""
    return model.call(function, *args) if is_sharded(model) else function(model, *args)


@contextlib.contextmanager
def whole(*models):
    """Inside, all processes have all weights of the models."""
    sharded = [model for model in dict.fromkeys(models) if is_sharded(model)]
    try:
        for model in sharded:
            for part in _parts(model):
                part.set_reshard_after_forward(False)
                part.unshard()
            model.in_shards = False
        yield
    finally:
        for model in sharded:
            for part in _parts(model):
                part.reshard()
                part.set_reshard_after_forward(True)
            model.in_shards = True


def rounds(batches, sizes, model):
    """(batch, weight of its loss) for those of the batches (lists of indices into `sizes`) that
    this process does. Of a sharded model all processes have as many, for they put its layers
    together at the same time: to fill up, a batch comes again with weight 0. The others have the
    number of processes there, because FSDP takes the mean of all gradients."""
    weight = float(parallel.number_of()) if is_sharded(model) else 1.0
    own = [(batch, weight) for batch in parallel.share(batches, sizes)]
    if is_sharded(model):
        most = parallel.total(dict(n=len(own)), most=("n",))["n"]
        own += [(batches[0], 0.0)] * (most - len(own))
    return own


def local(x):
    """This process' share of a parameter or gradient; all of it, if it is not sharded."""
    return x.to_local() if hasattr(x, "to_local") else x


def full(share, parameter):
    """A share of what belongs to a parameter, its optimizer's state -> all of it, on the CPU of the
    first process. The others get what has no memory: a card cannot hold the whole state."""
    if not hasattr(parameter, "to_local"):
        return share
    from torch.distributed.tensor import DTensor
    every = DTensor.from_local(share, parameter.device_mesh, parameter.placements,
                               shape=parameter.shape, stride=parameter.stride()).full_tensor()
    return every.to("cpu" if parallel.is_first() else "meta")


def part_of(whole_tensor, parameter):
    """The reverse of full()."""
    if not hasattr(parameter, "to_local"):
        return whole_tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(whole_tensor.to(parameter.device), parameter.device_mesh,
                             parameter.placements).to_local()


def over_all(norm, sharded):
    """A norm of what this process has -> the norm of what all have, if that differs."""
    if not sharded:
        return norm
    return torch.tensor(math.sqrt(parallel.total(dict(x=float(norm) ** 2))["x"]))
