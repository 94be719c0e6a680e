"""A local Hugging Face model as the agent: token-in, token-out, with a cache for each episode.

What a session reads, it reads in the chunks in which it was first read: a prompt's new tokens in one forward, sampled
tokens one by one. A run that is taken up again repeats the open window's chunks, so its numbers are the same, bit for
bit, and nothing is computed for windows that are closed.

Sessions that are open side by side and have read the same tokens, as rollouts of a group do until they say different
things, share what that made (*prefix caching*: vLLM, SGLang's RadixAttention, Zheng et al., arXiv 2312.07104): a prompt
is read once and copied, and a window's slots are made once. Tokens that were decoded in one batch or another differ by
rounding, and so does what is taken from another session.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch

from ...cache import StillCache
from ...calling import passing
from ...decoding import drawn
from ...models import LoadedModel
from ...reading import capture_queries
from ...rope import full_attention_layers
from ..backends.slots import exact_cache
from ..types import ContextSize, Limit, Message, NoRoom, Sampled
from .calls import parser_of
from .chat import ChatFormat
from .drafts import Written

COUNTS = 16
"""Texts whose tokens a session remembers."""


class LocalPolicy:
    """A model and its tokenizer.

    Args:
        loaded: from `still.models.load`.
        window: tokens of context to use; the model's own limit unless given.

    Attributes:
        version: of the weights, set anew by whoever trains them; every sampled turn records it.
        written: where drafts of later turns come from.
        reads: prompts that open sessions have read, by version and `LocalSession.trail`.

    Raises:
        ValueError: the window is larger than the model's, or its chat template has no tool calls.
    """

    capabilities = frozenset({"tokens", "kv", "queries"})
    version: int | None = None

    def __init__(self, loaded: LoadedModel, window: int | None = None):
        self.name, self.model, self.tokenizer = loaded.name, loaded.model, loaded.tokenizer
        config = self.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None) or 0
        if window is not None and limit and window > limit:
            raise ValueError(f"the window is {window} tokens and {self.name} was made for {limit}; take that or less")
        if not (window or limit):
            raise ValueError(f"{self.name} does not say how long its context may be; give a window in tokens")
        self.window = window or limit
        self.parse = parser_of(self.tokenizer.chat_template or "")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = len(full_attention_layers(config))
        self.bytes_per_token = 2 * layers * config.num_key_value_heads * head_dim * self.model.dtype.itemsize
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())
        self.written = Written()
        self.reads: WeakValueDictionary[Hashable, Read] = WeakValueDictionary()
        self._made: WeakValueDictionary[Hashable, StillCache] = WeakValueDictionary()

    def session(self, tools: list[dict[str, Any]], queries: bool = False) -> LocalSession:
        """A new conversation; with `queries` the window's queries are kept for methods that look at them."""
        return LocalSession(self, ChatFormat(self.tokenizer, tools), queries)

    def once(self, key: Hashable, make: Callable[[], StillCache]) -> StillCache:
        """A cache that nobody may change, made once for all sessions of this `version` that ask for the same.

        It lives as long as one of them keeps it.

        Args:
            key: all that it hangs on, but for the model's weights.
            make: makes it.
        """
        key = self.version, key
        cache = self._made.get(key)
        if cache is None:
            cache = self._made[key] = make()
        return cache


@dataclass(eq=False)
class Read:
    """A prompt that an open session has read, for others that ask for the same.

    Attributes:
        cache: the session's, which has grown since or will.
        length: logical length of the prompt.
        logits: `[vocabulary]` after its last token.
    """

    cache: StillCache
    length: int
    logits: torch.Tensor

    def copy(self) -> StillCache | None:
        """A cache of the prompt; None where layers that keep a state cannot go back to it."""
        further = self.cache.logical_length - self.length
        if further and len(self.cache.compact_layers) < len(self.cache.layers):
            return None
        cache = self.cache.clone()
        if further:
            cache.crop(-further)
        return cache


@dataclass
class Window:
    """A closed window. What the model keeps of it is read when it is asked for.

    Attributes:
        session: whose window it is.
        base: entries of S and U.
        held: slots that crossed into it.
        tokens: raw tokens of the window.
        last_turn: columns of the window that the last assistant's turn takes, as `(first, behind the last)`.
    """

    session: LocalSession
    base: int
    held: int
    tokens: int
    last_turn: tuple[int, int]

    @cached_property
    def _read(self) -> tuple[StillCache, dict[int, torch.Tensor]]:
        return self.session.read_window()

    @property
    def cache(self) -> StillCache:
        """S and U, what crossed before, and the window's tokens, raw."""
        return self._read[0]

    @property
    def queries(self) -> dict[int, torch.Tensor]:
        """Rotated queries `[1, query_heads, tokens, head_dim]` of each full-attention layer, if they were kept."""
        return self._read[1]

    @property
    def positions(self) -> torch.Tensor:
        """Logical positions of the raw tokens `[tokens]`."""
        end = self.cache.logical_length
        return torch.arange(end - self.tokens, end, device=self.session.policy.model.device)


@dataclass
class _State:
    """Where the conversation stands, without any tensor.

    Attributes:
        chunks: ids of every forward since the window began.
        carry: the last sampled token, which is read together with what follows it.
        waiting: rendered ids that no forward has read.
        before: who spoke last.
        last_turn: columns of the last assistant's turn.
    """

    chunks: list[list[int]] = field(default_factory=list)
    carry: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    before: str = "user"
    last_turn: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.chunks)) + len(self.carry) + len(self.waiting)

    def copy(self) -> _State:
        return _State(list(self.chunks), list(self.carry), list(self.waiting), self.before, self.last_turn)


@dataclass
class Turn:
    """A turn while it is sampled.

    Attributes:
        append_ids: prompt tokens since the turn before.
        most: longest output.
        limit: how tokens are chosen.
        prompt: tokens of the whole prompt.
        ends: tokens that end a turn.
        output: sampled so far.
        logprobs: of `output`.
        margin: smallest gap between the two best logits so far.
    """

    append_ids: list[int]
    most: int
    limit: Limit
    prompt: int
    ends: frozenset[int]
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margin: float = float("inf")

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.limit.seed)
        self.started = time.perf_counter()

    def take(self, token: int, logprob: float, gap: float) -> None:
        """One more token."""
        self.output.append(token)
        self.logprobs.append(logprob)
        self.margin = min(self.margin, gap)

    @property
    def done(self) -> bool:
        """Ended, or as long as it may be."""
        return bool(self.output) and (self.output[-1] in self.ends or len(self.output) >= self.most)


class LocalSession:
    """See `harness.types.Session`; `close_window` and `hold` are what KV backends use besides.

    Attributes:
        chat: renders messages.
        base_ids: of S and U.
        pending_ids: what `close_window` read at the window's end that no turn had answered.
        decodes_here: tokens come from this process's model, so episodes may share a batch.
    """

    decodes_here: ClassVar[bool] = True

    def __init__(self, policy: LocalPolicy, chat: ChatFormat, queries: bool):
        self.policy, self.chat, self.keep_queries = policy, chat, queries
        self.base_ids: list[int] = []
        self._base: tuple[Message, ...] = ()
        self.pending_ids: list[int] = []
        self._counts: dict[str, int] = {}
        self._exact: StillCache | None = None  # S and U, read once
        self._begin()

    def _begin(
        self, opened: Callable[[], StillCache] | None = None, before: str = "user", behind: Hashable = None
    ) -> None:
        """A window behind what is opened when it is first read; behind S and U alone unless given.

        Args:
            opened: makes the cache.
            before: who spoke last.
            behind: what is opened, as other sessions know it.
        """
        self._opened, self._cache, self._read, self._queries = opened, None, 0, {}
        self._behind, self._latest = tuple(self.base_ids) if opened is None else behind, None
        self._compacted = (0, 0)
        self._state, self._undo = _State(before=before), _State()

    def start(self, base: Sequence[Message]) -> None:
        """Begin a window afresh; S and U are read once for all windows."""
        if tuple(base) != self._base:
            self._base, self.base_ids, self._exact = tuple(base), self.chat.base(base), None
        self._begin()

    def append(self, messages: Sequence[Message]) -> None:
        """Render messages behind what is there; nothing is read yet."""
        state = self._state
        if state.before == "assistant":
            ended = state.carry == self.chat.closing[:1]
            state.waiting += self.chat.closing[1:] if ended else self.chat.closing
        state.waiting += self.chat.follow(messages, state.before)
        state.before = messages[-1].role

    def sample(self, limit: Limit) -> Sampled:
        """Sample one turn, greedily at temperature 0."""
        turn = self.begin(limit)
        with torch.no_grad(), self._watching():
            while not turn.done:
                self.choose(turn, self._forward(turn.output[-1:]))
        return self.finish(turn)

    @torch.no_grad()
    def begin(self, limit: Limit) -> Turn:
        """Read the turn's prompt, and choose its first token."""
        append_ids, size = self._prompt(), self.size()
        room = self.policy.window - size.total - len(self.chat.opening)
        if room < 1:
            raise NoRoom(f"a window of {self.policy.window} tokens has no room for a turn: {size}")
        ends = frozenset(self.policy.ends | set(self.chat.closing[:1]))
        turn = Turn(append_ids, min(limit.tokens, room), limit, self._prompt_tokens(), ends)
        self._read_prompt(turn, [*self._state.carry, *append_ids])
        return turn

    def _read_prompt(self, turn: Turn, chunk: list[int]) -> None:
        """Read a prompt, or copy what another session has read alike."""
        reads, key = self.policy.reads, (self.policy.version, self.trail(turn.append_ids))
        known = None if self.keep_queries else reads.get(key)
        copied = known and known.copy()
        if copied is None:
            self._catch_up()
            with self._watching():
                logits = self._forward(chunk)
        else:
            self._cache, self._read, logits = copied, len(self._state.chunks), known.logits
        self._latest = reads[key] = Read(self._cache, self._cache.logical_length, logits)
        self.choose(turn, logits)

    def choose(self, turn: Turn, logits: torch.Tensor) -> None:
        """Choose the turn's next token from logits `[vocabulary]`."""
        turn.take(*choose(logits, turn.limit.temperature, turn.generator))

    def finish(self, turn: Turn) -> Sampled:
        """The turn is sampled: it belongs to the window now."""
        ended = turn.output[-1] in turn.ends
        text, calls, problem = self.policy.parse(self.chat.decode(turn.output[:-1] if ended else turn.output))
        self._take(turn.append_ids, turn.output)
        self._read = len(self._state.chunks)
        return Sampled(
            text, calls, "stop" if ended else "length", problem, tuple(turn.append_ids), tuple(turn.output),
            tuple(round(x, 6) for x in turn.logprobs), None if turn.margin == float("inf") else round(turn.margin, 6),
            turn.prompt, len(turn.output), round(time.perf_counter() - turn.started, 6), version=self.policy.version,
        )  # fmt: skip

    def accept(self, sampled: Sampled) -> None:
        """Take a recorded turn.

        Raises:
            ValueError: it followed another prompt.
        """
        if tuple(self._prompt()) != tuple(sampled.append_ids):
            raise ValueError("the recorded turn followed another prompt: the run was made by other code or settings")
        self._take(list(sampled.append_ids), list(sampled.output_ids))

    def reject(self) -> None:
        """Forget the last turn; the window is read again up to it when that is needed."""
        self._state = self._undo.copy()
        if self._read > len(self._state.chunks):
            self._cache, self._read, self._queries = None, 0, {}

    def repeat(self, sampled: Sampled) -> Sampled:
        """Put a turn of an earlier window behind this one's prompt."""
        here = replace(sampled, append_ids=tuple(self._prompt()), prompt_tokens=self._prompt_tokens())
        self.accept(here)
        return here

    def count(self, text: str) -> int:
        """Tokens of a text inside a message; the loop asks for each result's more than once."""
        if text not in self._counts:
            if len(self._counts) >= COUNTS:
                self._counts.clear()
            self._counts[text] = len(self.chat.encode(self.chat.neutral(text)))
        return self._counts[text]

    def cut(self, text: str, tokens: int, last: bool = False) -> str:
        """The first tokens of a text, or the last ones."""
        ids = self.chat.encode(self.chat.neutral(text))
        kept = ids[-tokens:] if last else ids[:tokens]
        return text if len(ids) <= tokens else self.chat.decode(kept if tokens else [])

    def window_ids(self) -> list[int]:
        """Ids of S and U, and of the window up to the prompt's last message."""
        state = self._state
        return [*self.base_ids, *(token for chunk in state.chunks for token in chunk), *state.carry]

    def size(self) -> ContextSize:
        """The window as it is now."""
        return ContextSize(len(self.base_ids), self._compacted[0], self._state.tokens, self._compacted[1])

    def trail(self, more: Sequence[int] = ()) -> Hashable:
        """What the window stands behind, its tokens but for those that wait to be read, and `more`."""
        return self._behind, (*self.window_ids()[len(self.base_ids) :], *more)

    def close_window(self) -> Window:
        """End the window with what waits to be read; `hold` must follow."""
        self._read_on()
        return Window(self, len(self.base_ids), self._compacted[0], self._state.tokens, self._state.last_turn)

    @torch.no_grad()
    def read_window(self) -> tuple[StillCache, dict[int, torch.Tensor]]:
        """Keys and values of the window that was closed, and its queries if they were kept; both may be changed."""
        self._latest = None  # of what the cache becomes nobody can go back to the prompt
        self._catch_up()
        return self._cache, {layer: torch.cat(parts, dim=2) for layer, parts in self._queries.items()}

    def hold(self, cache: StillCache, behind: Hashable = None) -> None:
        """Go on behind a cache that holds S and U exactly and what crosses; nothing in it is raw.

        Args:
            cache: which is not changed.
            behind: what made it, where another session may hold the same; None where none can.
        """
        before = self._state.before if self._state.before != "assistant" else "user"
        self._begin(cache.clone, before, object() if behind is None else behind)
        slots = sum(cache.row_slots()) - len(self.base_ids)
        self._compacted = (slots, cache.nbytes - len(self.base_ids) * self.policy.bytes_per_token)

    @torch.no_grad()
    def peek(self) -> tuple[StillCache, list[int]]:
        """A copy of the cache up to here, and the ids behind it that wait to be read; nothing is changed."""
        self._catch_up()
        return self._cache.clone(), [*self._state.carry, *self._state.waiting]

    def exact_base(self) -> StillCache:
        """A cache of S and U alone."""
        if self._exact is None:
            begins = tuple(self.base_ids)
            self._exact = self.policy.once(begins, lambda: exact_cache(self.policy.model, begins))
        return self._exact.clone()

    @property
    def layers(self) -> list[int]:
        """The full-attention layers."""
        return full_attention_layers(self.policy.model.config)

    def _read_on(self) -> None:
        """Make a chunk of what waits at the window's end."""
        state = self._state
        if state.before == "assistant":
            state.waiting += self.chat.closing[1:] if state.carry == self.chat.closing[:1] else self.chat.closing
        self.pending_ids = list(state.waiting)
        if state.carry or state.waiting:
            state.chunks.append([*state.carry, *state.waiting])
            state.carry, state.waiting = [], []

    def _prompt(self) -> list[int]:
        """Everything between the last sampled token and the next one to sample."""
        state = self._state
        if state.before == "assistant":
            raise ValueError("two assistant's turns in a row: append a message first")
        return [*state.waiting, *self.chat.opening]

    def _prompt_tokens(self) -> int:
        return self.size().total + len(self.chat.opening)

    def _take(self, append_ids: list[int], output: list[int]) -> None:
        state = self._state
        self._undo = state.copy()
        first = sum(map(len, state.chunks)) + len(state.carry) + len(append_ids)
        state.chunks.append([*state.carry, *append_ids])
        state.chunks += [[token] for token in output[:-1]]
        state.carry, state.waiting, state.before = output[-1:], [], "assistant"
        state.last_turn = (first, first + len(output))

    @torch.no_grad()
    def _catch_up(self) -> None:
        if self._cache is None:
            opened = self.exact_base if self._opened is None else self._opened
            self._cache, self._read, self._queries = opened(), 0, {}
        with self._watching():
            for chunk in self._state.chunks[self._read :]:
                self._forward(chunk)
        self._read = len(self._state.chunks)

    def _forward(self, ids: list[int]) -> torch.Tensor:
        """Read ids behind the cache; logits `[vocabulary]` after the last, in fp32 on the CPU."""
        model = self.policy.model
        inputs = torch.tensor([ids], device=model.device)
        out = model(input_ids=inputs, **passing(model, self._cache), use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float().cpu()

    def _watching(self):
        """Keep the queries of every forward inside, if a method needs them."""
        if not self.keep_queries:
            return nullcontext()
        decoder = self.policy.model.get_decoder()
        return capture_queries(decoder, _Each(self._queries))


class _Each(dict):
    """Takes what is assigned to a layer as one more part of it."""

    def __init__(self, parts: dict[int, list[torch.Tensor]]):
        super().__init__()
        self.parts = parts

    def __setitem__(self, layer: int, queries: torch.Tensor) -> None:
        super().__setitem__(layer, queries)
        self.parts.setdefault(layer, []).append(queries)


def choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> tuple[int, float, float]:
    """A token from logits `[vocabulary]`, its log-probability, and the gap between the two best logits."""
    best = logits.topk(2)
    gap = (best.values[0] - best.values[1]).item()
    if temperature <= 0:
        token = int(best.indices[0])
        return token, logits.log_softmax(-1)[token].item(), gap
    scaled = (logits / temperature).log_softmax(-1)
    (token,) = drawn(scaled[None], [generator])
    return token, scaled[token].item(), gap
