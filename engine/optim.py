"""Two optimizers, AdamW whose small steps survive bfloat16 weights, and their rate's schedule.

A bfloat16 weight of .02 and its neighbour are 1.2e-4 apart. A step of 5e-7 is rounded away, so
plain AdamW loses 99 % of its updates. (Other libraries' optimizers: bench/README.md.) What the two
keep of a parameter, in bytes, with bfloat16 (float32) weights:

              weight   gradient   float32   master or       Adam's     all
                                  sum       compensation    states
    "master"  2 (4)    2 (4)      4 (4)     4 (4)           8 (8)      20 (24)
    "kahan"   2 (4)    2 (4)      -         2 (-)           4 (8)      10 (16)

master   AdamW on float32 copies of the weights. Gradients of micro-batches add up in float32.
kahan    AdamW with Kahan summation (arXiv 2010.06192): the part of each update that rounding drops
         is kept and added later. With float32 weights it is plain AdamW. Its limits: a step under
         2^-17 of its weight is lost (1.2e-7 for a weight of .02). Gradients add up in bfloat16, so
         keep an update under about a hundred micro-batches. Moments are bfloat16: enough for
         beta2 = .95, too coarse for .999."""
import math

import torch

from engine import parallel, progress, shards
from engine.run import die

BYTES = {  # of a parameter: (optimizer, bytes of a weight) -> what it keeps between updates
    ("master", 2): 4 + 4 + 8, ("master", 4): 4 + 4 + 8, ("kahan", 2): 2 + 4, ("kahan", 4): 8}
# the same -> what tensors() has: no sum of gradients; with "kahan" the weight itself
SAVED = {("master", 2): 12, ("master", 4): 12, ("kahan", 2): 2 + 2 + 4, ("kahan", 4): 4 + 8}


class _Resumable:
    """What both optimizers do with `adamw`, torch's own, and `kept`, {name: tensor} besides it."""

    def __init__(self, model):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.own = list(map(shards.local, self.params))  # what this process has of each
        self.sharded = bool(self.own) and self.own[0] is not self.params[0]
        self.left_out = 0  # updates in a row whose gradient was not finite

    def _is_finite(self, norm):
        """May an update be applied? If not, it is counted and said."""
        finite = math.isfinite(norm)
        self.left_out = 0 if finite else self.left_out + 1
        if not finite:
            progress.say("an update was left out: its gradient was not finite")
        return finite

    def tensors(self):
        """All state as {name: tensor}, for safetensors; no moments before the first step. Of a
        sharded model all processes put it together, so all must call this; the first gets it."""
        out = {}
        for name, x in self.kept.items():
            out[name] = shards.full(x, self.params[int(name.split(".")[1])])
        for i, x in enumerate(self.adamw.param_groups[0]["params"]):
            for name, value in self.adamw.state.get(x, {}).items():
                out[f"{name}.{i}"] = value if name == "step" else shards.full(value, self.params[i])
        return out

    @torch.no_grad()
    def restore(self, tensors):
        """The reverse of tensors(), the model's weights included. On a CPU, what follows is then
        bit for bit what would have followed. The state of another model stops."""
        there = {name: list(t.shape) for name, t in tensors.items()}
        of, want = {}, {}
        for name in self.kept:
            of[name] = self.params[int(name.split(".")[1])]
            want[name] = list(of[name].shape)
        for i, p in enumerate(self.params):
            if f"step.{i}" in tensors:
                want[f"step.{i}"] = []
                want[f"exp_avg.{i}"] = want[f"exp_avg_sq.{i}"] = list(p.shape)
        for name in sorted(want.keys() | there.keys()):
            if there.get(name) != want.get(name):
                die(f"the optimizer's state is of another model or DTYPE: {name} has the shape "
                    f"{there.get(name)}, not {want.get(name)} (None: there is none)")
        for name, x in self.kept.items():
            x.copy_(shards.part_of(tensors[name], of[name]))
        for i, x in enumerate(self.adamw.param_groups[0]["params"]):
            self.adamw.state[x] = {}
            for name in ("step", "exp_avg", "exp_avg_sq"):
                if f"{name}.{i}" in tensors:  # the fused kernel wants all on the tensor's device
                    value = tensors[f"{name}.{i}"]
                    if name != "step":
                        value = shards.part_of(value, self.params[i])
                    self.adamw.state[x][name] = value.to(x.device).clone()

    def _update(self, lr):
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()


class MasterAdamW(_Resumable):
    """torch.optim.AdamW on float32 copies of the weights. `collect()` moves gradients into the
    float32 sums after each micro-batch; `step(lr, clip)` returns the gradient norm. If that is not
    finite, the step is left out: it drops the gradients and changes nothing."""

    def __init__(self, model, betas, weight_decay):
        super().__init__(model)
        self.master = [p.detach().clone().float() for p in self.own]
        self.kept = {f"master.{i}": m for i, m in enumerate(self.master)}
        for m in self.master:
            m.grad = torch.zeros_like(m)
        self.adamw = torch.optim.AdamW(self.master, 0.0, betas, 1e-8, weight_decay, fused=True)

    def collect(self):
        """Add the parameters' gradients to the float32 sums and drop them."""
        for p, m in zip(self.params, self.master):
            if p.grad is not None:
                m.grad.add_(shards.local(p.grad))
                p.grad = None

    @torch.no_grad()
    def step(self, lr, clip):
        """Sum over processes, clip to norm `clip`, update at rate `lr`, write back -> the norm."""
        gradients = [m.grad for m in self.master]
        if not self.sharded:  # FSDP sums them by itself
            parallel.sum_gradients(gradients)
        norm = shards.over_all(torch.nn.utils.get_total_norm(gradients), self.sharded)
        torch.nn.utils.clip_grads_with_norm_(self.master, clip, norm)
        norm = float(norm)
        if self._is_finite(norm):
            self._update(lr)
        for own, m in zip(self.own, self.master):
            own.copy_(m)
            m.grad.zero_()
        return norm

    @torch.no_grad()
    def restore(self, tensors):
        """As in _Resumable; the model's weights are the copies, rounded."""
        super().restore(tensors)
        for own, m in zip(self.own, self.master):
            own.copy_(m)


class KahanAdamW(_Resumable):
    """torch.optim.AdamW with Kahan summation; the interface of MasterAdamW. `lost`: what rounding
    took from each parameter so far, in its precision (float32: the parameter itself). AdamW moves
    `lost`; then weight + lost, rounded, is the new weight, and the rest is the new `lost`."""

    def __init__(self, model, betas, weight_decay):
        super().__init__(model)
        self.lost = [p if p.dtype == torch.float32 else torch.zeros_like(p) for p in self.own]
        self.weight_decay, self.kept = weight_decay, {}
        for i, (p, lost) in enumerate(zip(self.own, self.lost)):
            self.kept[f"weight.{i}"] = p
            if lost is not p:
                self.kept[f"lost.{i}"] = lost
        self.adamw = torch.optim.AdamW(self.lost, 0.0, betas, weight_decay=0.0, fused=True)

    def collect(self):
        """Nothing to do: gradients add up where autograd leaves them."""

    @torch.no_grad()
    def step(self, lr, clip):
        """Sum over processes, clip to norm `clip` (in float32), update at rate `lr` -> the norm."""
        if parallel.number_of() > 1:
            for p in self.params:  # a process may have had no work
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if not self.sharded:
                parallel.sum_gradients([p.grad for p in self.params])
        grads = [shards.local(p.grad) for p in self.params if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
        norm = float(shards.over_all(torch.stack(norms).norm(), self.sharded)) if norms else 0.0
        if not self._is_finite(norm):
            for p in self.params:
                p.grad = None
            return norm
        for g in grads if norm > clip else []:
            g.mul_(clip / (norm + 1e-6))
        for p, own, lost in zip(self.params, self.own, self.lost):
            lost.grad = None if p.grad is None else shards.local(p.grad)
            if self.weight_decay and p.grad is not None:
                lost.add_(own, alpha=-lr * self.weight_decay)
        self._update(lr)
        for p, own, lost in zip(self.params, self.own, self.lost):
            if lost is not own:
                before = own.clone()
                own.add_(lost)
                lost.add_(before.sub_(own))  # exact if |lost| <= |weight| (Dekker's fast two-sum)
            p.grad = lost.grad = None
        return norm


def cosine_with_warmup(update, total, warmup):
    """The factor of the peak rate at 0-based `update` of `total`: linear from 0 over `warmup`
    updates, then half a cosine down to 0.1, where it stays. As transformers'
    get_cosine_with_min_lr_schedule_with_warmup, so update 0 has rate 0 where warmup > 0."""
    if update < warmup:
        return update / warmup
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress)) * 0.9 + 0.1


OPTIMIZERS = dict(master=MasterAdamW, kahan=KahanAdamW)
