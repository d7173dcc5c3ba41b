"""A tiny random Llama and a whitespace tokenizer, built in the process, as a folder transformers can load."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "the a film was good bad fine dull great awful very positive negative Review Sentiment Answer A B C D : ."
)


def make_tokenizer():
    """Every word with the space before it is one token, as in byte-pair vocabularies; letters back it up."""
    pieces = [f"{space}{word}" for word in WORDS.split() for space in ("", " ")]
    pieces += [*"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"0123456789", " ", "\n"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in pieces:
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_regex(r" ?[A-Za-z]+| ?[^A-Za-z\s]|\n| "), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def make_model(vocab_size, seed=0, hidden_size=32, intermediate_size=48):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # large enough for its heads to tell words apart
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _regex(pattern):
    from tokenizers import Regex

    return Regex(pattern)


def review_rows(count):
    """Reviews whose sentiment is one word: learnable by a tiny model in some tens of steps."""
    words = [("good", 1), ("bad", 0), ("great", 1), ("awful", 0), ("fine", 1), ("dull", 0)]
    rows = []
    for i in range(count):
        word, answer = words[i % len(words)]
        question = f"the film was {'very ' * (i % 3)}{word} ."
        rows.append({"question": question, "choices": ["negative", "positive"], "answer": answer})
    return rows
