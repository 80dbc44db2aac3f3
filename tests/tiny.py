"""Tiny random models with their own tokenizers for tests: no download, made in a second, ~0.6 MB.

    python tests/tiny.py qwen2 FOLDER        also: llama, mistral

Each is a folder as save_pretrained writes it, float32, 2 layers of width 64 with 4 heads on 2
key/value heads, and a byte-level BPE vocabulary trained on the texts of this repo. They differ in
what breaks code that saw one model only:

qwen2    tied embeddings, more rows of embeddings than words, ChatML with a default system text,
         no BOS, pads with <|endoftext|> and stops on <|im_end|>
llama    BOS written by the template and by the tokenizer too (a double BOS is one careless call
         away), two stop ids of which the tokenizer knows one
mistral  [INST] template that raises on a system role, [INST] and [/INST] are special tokens,
         no pad token
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CHATML = """{%- if messages[0]['role'] != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}\
{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""
HEADERS = """{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim \
+ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}\
{%- endif -%}"""
INST = """{{- bos_token -}}
{%- for m in messages -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- if m['role'] == 'user' -%}{{- '[INST] ' + m['content'] + ' [/INST]' -}}
{%- elif m['role'] == 'assistant' -%}{{- ' ' + m['content'] + eos_token -}}
{%- else -%}{{- raise_exception('Only user and assistant roles are supported!') -}}{%- endif -%}
{%- endfor -%}"""

KINDS = {  # special tokens in the order of their ids, named roles, chat template
    "qwen2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
              dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"), CHATML),
    "llama": (["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
               "<|eot_id|>"],
              dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"), HEADERS),
    "mistral": (["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
                dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"), INST)}


def make_tokenizer(kind):
    """A byte-level BPE of about 800 words on the repo's own texts, with the special tokens and
    template of `kind`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    special, named, template = KINDS[kind]
    files = [ROOT / "LICENSE", *sorted((ROOT / "prompts").glob("*.txt")),
             *sorted((ROOT / "judge_adapter" / "texts").glob("*.txt"))]  # texts that seldom change
    texts = [f.read_text(encoding="utf-8") for f in files]
    # Often enough that " yes" and " no" become one word each, which constrained scoring needs.
    texts += [f"Harmful request: {a}\nResponse refusal: {a}\nHarmful response: {a}\n" * 50
              for a in ("yes", "no")]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if "bos_token" in named:
        bos = named["bos_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, bpe.token_to_id(bos))])
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **named)
    tok.chat_template = template
    return tok


def make_tiny(kind, folder, seed=0):
    """Write a tiny random model of `kind` (a key of KINDS) with its tokenizer -> its path."""
    import torch
    import transformers
    transformers.utils.logging.disable_progress_bar()
    tok = make_tokenizer(kind)
    config_class, extra = {
        "qwen2": (transformers.Qwen2Config,
                  dict(vocab_size=len(tok) + 8, tie_word_embeddings=True)),
        "llama": (transformers.LlamaConfig, dict(vocab_size=len(tok), tie_word_embeddings=False)),
        "mistral": (transformers.MistralConfig, dict(vocab_size=len(tok), tie_word_embeddings=False,
                                                     sliding_window=None))}[kind]
    config = config_class(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
        initializer_range=0.15, **extra)  # wide enough that a greedy choice is clear
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if kind == "llama":
        model.generation_config.eos_token_id = tok.convert_tokens_to_ids(
            ["<|end_of_text|>", "<|eot_id|>"])
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: python tests/tiny.py {'|'.join(KINDS)} FOLDER")
    print(make_tiny(sys.argv[1], sys.argv[2]))
