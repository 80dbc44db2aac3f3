"""Sampling by transformers' own continuous batching: paged keys and values, in its own thread."""
import torch

from engine import parallel
from engine.run import die

BLOCK = 256  # positions of a page


def complete(model, tok, prompts, max_new, temperature, batch, top_p, generator):
    """Token ids of prompts -> list of (ids, logps), on a CPU about `batch` at once. Nothing of the
    model's generation_config is used. No key or value outlives the call: pages are not shared,
    since the library would find them again after the weights have changed."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    seeds = torch.randint(2 ** 31, (parallel.number_of(),), generator=generator).tolist()
    seed = seeds[parallel.index()]  # processes draw from streams of their own
    config = GenerationConfig(
        do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, top_p=top_p,
        max_new_tokens=max_new, eos_token_id=sorted(tok.stop_ids), pad_token_id=0)
    pages = tokens = None  # as many as the device's free memory holds
    if model.device.type == "cpu":
        pages = min(batch, len(prompts)) * -(-(max(map(len, prompts)) + max_new) // BLOCK)
        tokens = max(2048, batch)
    paging = ContinuousBatchingConfig(return_logprobs=True, allow_block_sharing=False, seed=seed,
                                      block_size=BLOCK, num_blocks=pages,
                                      max_batch_tokens=tokens, safety_margin=0.0)
    if model.config._attn_implementation in ("folded", "grouped"):
        model.set_attn_implementation("sdpa")  # ours have no paged form; the caller sets them back
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        results = model.generate_batch(prompts, generation_config=config,
                                       continuous_batching_config=paging).values()
    if len(results) < len(prompts):
        die("ROLLOUT=library: the library's thread ended early: give ROLLOUT=slots or plain")
    for result in results:
        if result.error:
            die(f"ROLLOUT=library: {result.error}")
    return [(r.generated_tokens, r.logprobs) for r in results]
