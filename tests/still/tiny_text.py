"""A tiny byte-level tokenizer with a chat template, and a model that goes with it: text in tests, made offline."""

from __future__ import annotations

from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from still.models import LoadedModel

SPECIALS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT = (
    "{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Four special tokens and 256 bytes; every text is its bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIALS, *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIALS[0],
        eos_token=SPECIALS[1],
        extra_special_tokens=list(SPECIALS[2:]),
        chat_template=CHAT if chat else None,
        clean_up_tokenization_spaces=False,
    )


def tiny_base(chat: bool = True, seed: int = 0, **overrides) -> LoadedModel:
    """A tiny random model that reads text, as `still.models.load` would give it."""
    tokenizer = tiny_tokenizer(chat)
    model = tiny_model("qwen3", seed, vocab_size=len(tokenizer), eos_token_id=1, **overrides)
    return LoadedModel("tiny", model, tokenizer)
