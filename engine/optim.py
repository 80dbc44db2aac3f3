"""Two optimizers: AdamW whose small steps survive bfloat16 weights.

A bfloat16 weight of .02 and its neighbour are 1.2e-4 apart. A step of 5e-7 is rounded away, so
plain AdamW on such weights loses 99 % of its updates. What the two keep of a parameter, in bytes,
with bfloat16 (float32) weights:

              weight   gradient   float32   master or       Adam's     all
                                  sum       compensation    states
    "master"  2 (4)    2 (4)      4 (4)     4 (4)           8 (8)      20 (24)
    "kahan"   2 (4)    2 (4)      -         2 (-)           4 (8)      10 (16)

master   AdamW on float32 copies of the weights. Gradients of micro-batches add up in float32.
kahan    AdamW with Kahan summation (arXiv 2010.06192): the part of each update that rounding drops
         is kept and added later. Its limits: weight and compensation together have 16 bits, so in a
         long run a step under 2^-17 of its weight is lost (1.2e-7 for a weight of .02). Gradients
         add up in bfloat16, so keep an update under about a hundred micro-batches.
         Moments are bfloat16: enough for beta2 = .95, too coarse for .999. With float32 weights it
         is plain AdamW.

torch.optim.AdamW(fused=True) does the arithmetic of both, in float32 whatever it stores.
bench/README.md says why other libraries' optimizers did not do.
"""
import torch

BYTES = {  # of a parameter: (optimizer, bytes of a weight) -> what it keeps between updates
    ("master", 2): 4 + 4 + 8, ("master", 4): 4 + 4 + 8, ("kahan", 2): 2 + 4, ("kahan", 4): 8}


class MasterAdamW:
    """torch.optim.AdamW on float32 copies of the weights. `collect()` moves gradients into the
    float32 sums after each micro-batch; `step(lr, clip)` returns the gradient norm."""

    def __init__(self, model, betas, weight_decay):
        self.params = trainable(model)
        self.master = [p.detach().clone().float() for p in self.params]
        for m in self.master:
            m.grad = torch.zeros_like(m)
        self.adamw = torch.optim.AdamW(self.master, lr=0.0, betas=betas, weight_decay=weight_decay,
                                       fused=True)

    def collect(self):
        """Add the parameters' gradients to the float32 sums and drop them."""
        for p, m in zip(self.params, self.master):
            if p.grad is not None:
                m.grad.add_(p.grad)
                p.grad = None

    def step(self, lr, clip):
        """Clip to norm `clip`, update at rate `lr`, write the weights back -> the norm before."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.master, clip))
        _step(self.adamw, lr)
        with torch.no_grad():
            for p, m in zip(self.params, self.master):
                p.copy_(m)
                m.grad.zero_()
        return norm

    def tensors(self):
        """All state as {name: tensor}, for safetensors."""
        return _numbered("master", self.master) | _states(self.adamw, self.master)

    @torch.no_grad()
    def restore(self, tensors):
        """The reverse of tensors(): bit for bit, the model's weights included."""
        for i, (p, m) in enumerate(zip(self.params, self.master)):
            m.copy_(tensors[f"master.{i}"])
            p.copy_(m)
        _restore_states(self.adamw, self.master, tensors)


class KahanAdamW:
    """torch.optim.AdamW with Kahan summation; the same interface as MasterAdamW. `lost` holds, for
    each parameter, what rounding has taken from it so far, in its own precision. A float32
    parameter stands there itself. AdamW moves `lost`. Then weight + lost is split again: its
    rounding is the new weight, the rest is the new `lost`."""

    def __init__(self, model, betas, weight_decay):
        self.params = trainable(model)
        self.lost = [p if p.dtype == torch.float32 else torch.zeros_like(p) for p in self.params]
        self.weight_decay = weight_decay
        self.adamw = torch.optim.AdamW(self.lost, lr=0.0, betas=betas, weight_decay=0.0, fused=True)

    def collect(self):
        """Nothing to do: gradients add up where autograd leaves them."""

    @torch.no_grad()
    def step(self, lr, clip):
        """Clip to norm `clip` (float32), update at rate `lr`, drop the gradients -> the norm."""
        grads = [p.grad for p in self.params if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        for g in grads if norm > clip else []:
            g.mul_(clip / (norm + 1e-6))
        for p, lost in zip(self.params, self.lost):
            lost.grad = p.grad
            if self.weight_decay and p.grad is not None:
                lost.add_(p, alpha=-lr * self.weight_decay)
        _step(self.adamw, lr)
        for p, lost in zip(self.params, self.lost):
            if lost is not p:
                before = p.clone()
                p.add_(lost)
                lost.add_(before.sub_(p))  # exact where |lost| <= |weight| (Dekker's fast two-sum)
            p.grad = lost.grad = None
        return norm

    def tensors(self):
        """All state as {name: tensor}, for safetensors."""
        out = _numbered("weight", self.params)
        for i, (p, lost) in enumerate(zip(self.params, self.lost)):
            if lost is not p:
                out[f"lost.{i}"] = lost
        return out | _states(self.adamw, self.lost)

    @torch.no_grad()
    def restore(self, tensors):
        """The reverse of tensors(): bit for bit, the model's weights included."""
        for i, (p, lost) in enumerate(zip(self.params, self.lost)):
            p.copy_(tensors[f"weight.{i}"])
            if lost is not p:
                lost.copy_(tensors[f"lost.{i}"])
        _restore_states(self.adamw, self.lost, tensors)


OPTIMIZERS = dict(master=MasterAdamW, kahan=KahanAdamW)


def trainable(model):
    """The parameters of a model that learn, in its own order."""
    return [p for p in model.parameters() if p.requires_grad]


def _step(adamw, lr):
    """One step of torch's AdamW at rate `lr`."""
    for group in adamw.param_groups:
        group["lr"] = lr
    adamw.step()


def _numbered(name, tensors):
    """A list of tensors as {"name.0": tensor, ...}."""
    return {f"{name}.{i}": t for i, t in enumerate(tensors)}


def _states(adamw, moved):
    """Adam's states of the tensors it moves as {"exp_avg.0": tensor, ...}; none before its first
    step."""
    out = {}
    for i, x in enumerate(moved):
        for name, value in adamw.state.get(x, {}).items():
            out[f"{name}.{i}"] = value
    return out


def _restore_states(adamw, moved, tensors):
    """The reverse of _states(). `step` goes to the tensor's device too, as the fused kernel wants
    it."""
    for i, x in enumerate(moved):
        adamw.state[x] = {}
        for name in ("step", "exp_avg", "exp_avg_sq"):
            if f"{name}.{i}" in tensors:
                adamw.state[x][name] = tensors[f"{name}.{i}"].to(x.device).clone()
