"""The pocket's tokenizer: a stock fast byte-level BPE with numbers in groups of up to three digits."""

from __future__ import annotations

import json
import re
from itertools import product

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ...eval.matters import generate_matter

INSTRUCTION = "Read the matter and answer from it."
SPECIALS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|call|>", "<|memo|>")

# One role token, a space (so that a word is the same token here as inside a sentence), the text, one end token.
# A call's arguments follow <|call|> as JSON. Of tools it shows names and arguments: their descriptions would take most
# of a small window, and training teaches what they do.
CHAT_TEMPLATE = """\
{%- if tools %}<|system|> Tools:
{%- for tool in tools %} {{ tool.function.name }}({{ tool.function.parameters.properties | join(", ") }})
{%- endfor %}<|end|>{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{% if message.content %} {{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}<|call|>{{ call.function.name }} {{ call.function.arguments | tojson }}
{%- endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

# GPT-4's split of text into words, with digits apart from letters and spaces.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(vocab_size: int = 4096, matters: int = 1500) -> PreTrainedTokenizerFast:
    """Train the tokenizer on synthetic matters of the training split; the same words give the same file.

    Every group of one to three digits is a token, any other text falls back to bytes. Special tokens are
    matched only where the chat template writes them: `escape` keeps them out of documents.
    """
    digits = [("".join(group)) for size in (1, 2, 3) for group in product("0123456789", repeat=size)]
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(digits) + 10,  # the ten digits are in both counts
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(matters), trainer)
    bpe = _with_digit_groups(bpe, digits)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=list(SPECIALS[2:]),
        chat_template=CHAT_TEMPLATE,
        prompt_format={"style": "turns", "instruction": INSTRUCTION},  # how `still.prompts` shows it documents
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def escape(text: str) -> str:
    """Break special tokens that stand inside a document's own text."""
    for token in SPECIALS:
        text = text.replace(token, token.replace("|", "\u00a6"))
    return text


def _corpus(matters: int):
    for seed in range(matters):
        for difficulty in ("tiny", "easy"):
            matter = generate_matter(seed, difficulty, "train", unseen_templates=seed % 3 == 0)
            text = matter.text + "\n" + " ".join(fact.question for fact in matter.facts)
            yield re.sub(r"\d+", "x", text)  # the tokens of numbers are given, not learned


def _with_digit_groups(bpe: Tokenizer, digits: list[str]) -> Tokenizer:
    """Add the merges that make every group of two and three digits one token."""
    state = json.loads(bpe.to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    for group in digits:
        if group not in vocab:
            vocab[group] = len(vocab)
        # Both ways to split a group: the pair inside it that merges first may be either.
        merges.extend([group[:cut], group[cut:]] for cut in range(1, len(group)))
    return Tokenizer.from_str(json.dumps(state))
