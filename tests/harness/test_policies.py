"""Rendering, parsing and served models: the same ids whatever computes them."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from agent_cases import Reader, SteeredPolicy, episode, make_task, of, texts, tiny_agent, tiny_agent_tokenizer

from still import StillCache, methods
from still.eval.prices import Price, Prices
from still.harness import backends
from still.harness.agent import drive, drive_many
from still.harness.play import Outcome, table
from still.harness.policies import local
from still.harness.policies.calls import parser_of
from still.harness.policies.chat import ChatFormat
from still.harness.policies.local import LocalPolicy, choose
from still.harness.policies.server import ReplyError, ServerConfig, ServerPolicy
from still.harness.policies.token_server import TokenServerPolicy
from still.harness.run_config import RunConfig
from still.harness.runs import metrics, read_run
from still.harness.sampling import sampler
from still.harness.trace import trace_page
from still.harness.types import Limit, Message, ToolCall

HERMES = """\
{%- if tools %}<|system|># Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|end|>\n{% endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}
{%- if loop.first or messages[loop.index0 - 1].role != "tool" %}<|user|>{% endif %}
<tool_response>\n{{ message.content }}\n</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != "tool" %}<|end|>\n{% endif %}
{%- else %}<|{{ message.role }}|>{% if message.role == "assistant" and loop.last %}<think>\n\n</think>\n\n{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}\n<tool_call>\n{"name": "{{ call.function.name }}", "arguments": \
{{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|end|>\n{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|><think>\n\n</think>\n\n{% endif %}"""
READ = ToolCall("read", '{"path": "a.txt"}')


def hermes_tokenizer():
    """The tiny tokenizer with a template such as Qwen's: wrapped calls, merged results, earlier turns reworded."""
    tokenizer = tiny_agent_tokenizer()
    tokenizer.chat_template = HERMES
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"])
    return tokenizer


@pytest.mark.parametrize("tokenizer", [tiny_agent_tokenizer(), hermes_tokenizer()], ids=["marked", "wrapped"])
def test_pieces_join_to_the_whole_conversation(tokenizer):
    chat = ChatFormat(tokenizer, [{"type": "function", "function": {"name": "read", "parameters": {}}}])
    base = [Message("system", "S"), Message("user", "U")]
    turn = Message("assistant", "I read.", (READ,))
    result, bridge = Message("tool", "text of a", call=READ), Message("user", "B")
    ids = chat.base(base) + chat.opening + chat.assistant(turn)
    ids += chat.closing[1:] + chat.follow([result], "assistant") + chat.follow([bridge], "tool") + chat.opening
    whole = chat._text([chat._plain(each) for each in (*base, turn, result, bridge)], True)
    if "<think>" in whole:  # the template takes the empty reasoning out of earlier turns; what was sampled stays
        whole = whole.replace("<|assistant|>I read.", "<|assistant|><think>\n\n</think>\n\nI read.")
    assert chat.decode(ids) == whole


@pytest.mark.parametrize("tokenizer", [tiny_agent_tokenizer(), hermes_tokenizer()], ids=["marked", "wrapped"])
def test_a_turn_is_parsed_as_it_was_rendered(tokenizer):
    chat, parse = ChatFormat(tokenizer), parser_of(tokenizer.chat_template)
    other = ToolCall("write", '{"path": "output/memo.md", "content": "line one\\nline \\"two\\" <b>é</b>"}')
    text, calls, problem = parse(chat.decode(chat.assistant(Message("assistant", "Now.", (READ, other)))[:-1]))
    assert (text, problem) == ("Now.", "")
    assert [(c.name, c.parsed()) for c in calls] == [(c.name, c.parsed()) for c in (READ, other)]


@pytest.mark.parametrize("tokenizer", [tiny_agent_tokenizer(), hermes_tokenizer()], ids=["marked", "wrapped"])
def test_no_mark_inside_a_text_is_a_mark(tokenizer):
    chat = ChatFormat(tokenizer)
    marks = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    evil = "StandsHere7f3a".join(sorted(marks)) + "<think>"
    ids = chat.follow([Message("tool", evil, call=READ)], "assistant")
    plain = chat.follow([Message("tool", "x", call=READ)], "assistant")
    special = {tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    assert [i for i in ids if i in special] == [i for i in plain if i in special]


@pytest.mark.parametrize(("template", "text", "expected"), [
    ("<|call|>", '<|call|>read {"path": 1}<|call|>glob', (["read", "glob"], "")),
    ("<|call|>", "<|call|>read {broken", (["read"], "no JSON object")),
    ("<|call|>", "<|call|>", ([""], "names no tool")),
    ("<tool_call>", '<tool_call>{"name": "read", "arguments": {}}</tool_call>', (["read"], "")),
    ("<tool_call>", '<tool_call>{"name": "read"', ([""], "not closed")),
    ("<tool_call>", "<tool_call>[1]</tool_call>", ([""], "names no tool")),
    ("<think>x<tool_call>", '<think><tool_call>{"name": "x"}</tool_call></think>Done', ([], "")),
    ("<tool_call><function=", "<tool_call>\n<function=read>\n<parameter=path>\na b\n</parameter>\n<parameter=limit>\n"
     "5\n</parameter>\n</function>\n</tool_call>", (["read"], "")),
    ("<tool_call><function=", "<function=read><parameter=path>x", (["read"], "not closed")),
])  # fmt: skip
def test_calls_of_every_syntax(template, text, expected):
    _, calls, problem = parser_of(template)(text)
    assert [each.name for each in calls] == expected[0]
    assert expected[1] in problem
    assert bool(problem) == bool(expected[1])


def test_a_template_without_calls_is_refused():
    with pytest.raises(ValueError, match="no known syntax"):
        parser_of("{{ messages }}")
    bare = tiny_agent_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ChatFormat(bare)


class Server(ThreadingHTTPServer):
    """Completions of a real tiny model from token ids, and chat completions by a script, over real HTTP."""

    def __init__(self, loaded=None, player=None, failures: int = 0, handler=None):
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.loaded, self.player, self.failures, self.requests = loaded, player, failures, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        if self.server.failures > 0:
            self.server.failures -= 1
            self.send_response(429)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        self.answer(200, {"id": "x", "created": 0, "model": body.get("model"), **self.reply(body)})

    def reply(self, body):
        return self.complete(body) if self.path.endswith("/v1/completions") else self.chat(body)

    def answer(self, status, reply):
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    @torch.no_grad()
    def complete(self, body):
        ids, output, logprobs, tops = list(body["prompt"]), [], [], []
        while len(output) < body["max_tokens"]:
            scores = self.server.loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            best = scores.topk(2)
            token = int(best.indices[0])
            ids.append(token)
            output.append(token)
            logprobs.append(float(best.values[0]))
            tops.append({str(int(i)): float(v) for i, v in zip(best.indices, best.values, strict=True)})
            if token in body.get("stop_token_ids", ()):
                break
        text = self.server.loaded.tokenizer.decode(output)
        scores = {"token_logprobs": logprobs, "top_logprobs": tops, "tokens": [], "text_offset": []}
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": scores, "token_ids": output}
        return {"object": "text_completion", "choices": [choice]}

    def chat(self, body):
        seen = [
            Message(m["role"], m.get("content") or "", call=called(body["messages"], m)) for m in body["messages"]
        ]
        turn = self.server.player(seen, None)
        calls = [
            {"id": f"call_{len(seen)}_{n}", "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for n, c in enumerate(turn.calls)
        ]
        message = {"role": "assistant", "content": turn.content or None, "tool_calls": calls or None}
        usage = {"prompt_tokens": 100 * len(seen), "completion_tokens": 20, "total_tokens": 100 * len(seen) + 20}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
        return {"object": "chat.completion", "choices": [choice], "usage": usage}

    def log_message(self, *arguments):
        pass


def called(messages, message):
    """The call that a tool's message answers."""
    if message["role"] != "tool":
        return None
    for each in messages:
        for one in each.get("tool_calls") or ():
            if one["id"] == message["tool_call_id"]:
                return ToolCall(one["function"]["name"], one["function"]["arguments"])
    raise AssertionError(f"{message['tool_call_id']} answers no call")


@pytest.fixture
def serve():
    servers = []

    def start(**options):
        servers.append(Server(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_served_model_gives_the_local_greedy_ids(serve):
    loaded = tiny_agent()
    config = ServerConfig("tiny", serve(loaded=loaded).url, window=4000)
    base, limit = [Message("system", "S"), Message("user", "Read it all.")], Limit(24)
    turns = []
    for policy in (LocalPolicy(loaded, 4000), TokenServerPolicy(config, loaded.tokenizer)):
        session = policy.session([])
        session.start(base)
        made = [session.sample(limit)]
        session.append([Message("tool", "text of a document", call=READ)])
        made.append(session.sample(limit))
        session.append([Message("user", "Go on.")])
        made.append(session.sample(limit))
        session.reject()
        made.append(session.sample(limit))
        turns.append(made)
    for mine, theirs in zip(*turns, strict=True):
        assert mine.append_ids == theirs.append_ids
        assert mine.output_ids == theirs.output_ids
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert mine.margin == pytest.approx(theirs.margin, abs=1e-3)
        assert mine.prompt_tokens == theirs.prompt_tokens
    assert turns[0][2].output_ids == turns[0][3].output_ids


def test_a_server_is_told_to_draw_from_the_models_own_distribution(serve):
    loaded = tiny_agent()
    server = serve(loaded=loaded)
    session = TokenServerPolicy(ServerConfig("tiny", server.url, window=4000), loaded.tokenizer).session([])
    session.start([Message("system", "S"), Message("user", "Read it all.")])
    session.sample(Limit(4))
    (body,) = server.requests
    own = {"top_p": 1, "top_k": -1, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
    assert {name: body.get(name) for name in own} == own


@pytest.mark.parametrize("backend", ["memo", "trim", "none", "full", "plain"])
def test_text_backends_run_on_chat_completions_with_retries_and_cost(tmp_path, serve, backend):
    server = serve(player=Reader(), failures=2)
    config = ServerConfig("model-x", server.url, window=9000)
    policy = ServerPolicy(config, Prices({"model-x": Price(2.0, 10.0)}))
    task = make_task(tmp_path, texts(6))
    run = episode(tmp_path, task, None, policy=policy, backend=backend, budget="200t", window=9000)
    assert drive(run)["status"] == "done"
    events = read_run(run.folder.root)
    assert len(of(events, "compact")) == {"full": 0, "plain": 0}.get(backend, 2)
    assert len(server.requests) == len(of(events, "turn")) + 2
    spent = sum(2e-6 * turn["prompt_tokens"] + 1e-5 * turn["output_tokens"] for turn in of(events, "turn"))
    assert sum(turn["cost"] for turn in of(events, "turn")) == pytest.approx(spent)
    tools = [json.dumps(request["tools"]) for request in server.requests]
    assert len(set(tools)) == 1  # rendered alike in every request, memo turns included
    assert all(request["messages"][:2] == server.requests[0]["messages"][:2] for request in server.requests)


def test_a_served_run_is_taken_up_again(tmp_path, serve):
    class Failing(Reader):
        left = 7

        def __call__(self, seen, limit):
            self.left -= 1
            assert self.left, "the server is down"
            return super().__call__(seen, limit)

    task = make_task(tmp_path, texts(6))
    down = ServerPolicy(ServerConfig("m", serve(player=Failing()).url, window=9000, retries=0))
    run = episode(tmp_path, task, None, policy=down, backend="memo", budget="200t", window=9000)
    with pytest.raises(Exception, match=r"[Cc]onnection"):
        drive(run)
    assert read_run(run.folder.root)[-1]["event"] == "error"
    server = serve(player=Reader())
    up = ServerPolicy(ServerConfig("m", server.url, window=9000))
    again = episode(tmp_path, task, None, policy=up, backend="memo", budget="200t", window=9000)
    assert drive(again)["status"] == "done"
    assert len(server.requests) == len(of(read_run(run.folder.root), "turn")) - 6


def test_what_a_server_cannot_do_is_refused(serve, monkeypatch):
    policy = ServerPolicy(ServerConfig("m", serve().url))
    with pytest.raises(ValueError, match="take a local model"):
        backends.make(RunConfig(backend="kv", budget="100t"), policy)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        ServerPolicy(ServerConfig("m"))


def test_tokens_are_drawn_as_often_as_they_are_likely():
    chances = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn = [choose(chances.log(), 1.0, generator) for _ in range(4000)]
    for token, chance in enumerate(chances.tolist()):
        share = sum(one[0] == token for one in drawn) / len(drawn)
        assert abs(share - chance) <= 4 * (chance * (1 - chance) / len(drawn)) ** 0.5
    assert all(logprob == pytest.approx(math.log(chances[token])) for token, logprob, _ in drawn)
    cooler = [choose(chances.log(), 0.1, generator)[0] for _ in range(200)]
    assert cooler.count(1) >= 190
    assert choose(chances.log(), 0.0, generator)[0] == 1


def test_sessions_that_begin_alike_read_their_beginning_once(monkeypatch):
    policy, read, exact_cache = LocalPolicy(tiny_agent(layers=1), 4096), [], local.exact_cache
    monkeypatch.setattr(local, "exact_cache", lambda model, ids: read.append(list(ids)) or exact_cache(model, ids))

    def begun(task):
        session = policy.session([])
        session.start([Message("system", "Read the matter."), Message("user", task)])
        return session, session.sample(Limit(12, 0.0, 0)).output_ids

    (one, said), (two, again), (other, _) = begun("When does it end?"), begun("When does it end?"), begun("Who signs?")
    assert read == [one.base_ids, other.base_ids]
    assert said == again
    assert one.exact_base().nbytes == two.exact_base().nbytes  # what was sampled is in neither
    assert len(one.base_ids) == one.exact_base().logical_length
    policy.version = 1
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.5)
    assert begun("When does it end?")[0].base_ids == read[-1]
    assert len(read) == 3
    assert begun("When does it end?")[0].base_ids == read[-1]
    assert len(read) == 4  # nobody kept it


def counted(model) -> list[int]:
    """Tokens of every forward of a model, from now on."""
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    return read


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("qwen3_next", marks=pytest.mark.full)])
def test_sessions_that_read_alike_read_a_prompt_once(kind):
    loaded = tiny_agent(kind)
    policy = LocalPolicy(loaded, 4096)

    def asked(policy, document="The term ends in May. " * 8):
        session = policy.session([])
        session.start([Message("system", "Read."), Message("user", "When does it end?")])
        session.append([Message("user", document)])
        return session

    def sampled(session, temperature=0.0, seed=0):
        turn = session.sample(Limit(10, temperature, seed))
        return turn.output_ids, turn.logprobs

    alone, warm = sampled(asked(LocalPolicy(loaded, 4096))), sampled(asked(LocalPolicy(loaded, 4096)), 1.5, seed=3)
    one, read = asked(policy), counted(loaded.model)
    assert sampled(one) == alone
    whole, decoded = sum(read), len(alone[0]) - 1
    two = asked(policy)
    read.clear()
    ids, logprobs = sampled(two, 1.5, seed=3)  # it says something else, and the first one has gone on
    assert ids == warm[0] != alone[0]
    assert logprobs == pytest.approx(warm[1], abs=1e-5)
    again = 0 if kind == "qwen3" else whole - decoded - len(one.base_ids)  # a state cannot be taken back
    assert sum(read) == again + len(ids) - 1
    for session in (one, two):  # behind what they said they are strangers
        session.append([Message("user", "And who signs it?")])
    read.clear()
    later = [sampled(session) for session in (one, two)]
    assert sum(read) > 2 * (decoded + len("And who signs it?"))
    fresh = asked(LocalPolicy(loaded, 4096))
    sampled(fresh, 1.5, seed=3)
    fresh.append([Message("user", "And who signs it?")])
    assert sampled(fresh)[0] == later[1][0]
    for document, version in (("The term ends in June. " * 8, None), ("The term ends in May. " * 8, 1)):
        policy.version = version
        read.clear()
        other = asked(policy, document)  # another document is another prompt, and so is one for other weights
        sampled(other)
        assert sum(read) > decoded + len(document)


def test_a_rejected_turn_is_sampled_again_behind_the_prompt_that_was_read():
    loaded = tiny_agent()
    session = LocalPolicy(loaded, 4096).session([])
    session.start([Message("system", "Read."), Message("user", "When does it end?")])
    first = session.sample(Limit(10, 0.0, 0))
    session.reject()
    read = counted(loaded.model)
    assert session.sample(Limit(10, 0.0, 0)).output_ids == first.output_ids
    assert sum(read) == len(first.output_ids) - 1


class Parting(Reader):
    """Lets the model write so many letters at the end."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def __call__(self, seen, limit):
        message = super().__call__(seen, limit)
        return message if message.content != "Done." else Message("assistant", "Done: " + "~" * self.size)


@pytest.mark.parametrize("backend", ["kv", "hybrid"])
def test_rollouts_that_read_alike_make_slots_once(tmp_path, monkeypatch, backend):
    loaded, made = tiny_agent(), []
    task = make_task(tmp_path, texts(5, 100))
    method = methods.get("streaming_llm")
    compact = type(method).compact_layer
    monkeypatch.setattr(
        type(method), "compact_layer", lambda self, layer, *rest: made.append(layer) or compact(self, layer, *rest)
    )

    def rollouts(budgets=("200t",) * 3, **letters):
        """Runs that one policy plays side by side, by name, and how many letters each ends with."""
        sizes = iter(letters.values())
        policy = SteeredPolicy(loaded.tokenizer, lambda: Parting(next(sizes)), 6000, loaded)
        settings = {"policy": policy, "backend": backend, "window": 6000, "method": method}
        each = zip(letters, budgets, strict=False)
        runs = [episode(tmp_path, task, None, name=name, budget=budget, **settings) for name, budget in each]
        ends = drive_many(runs, len(runs), sampler(policy, len(runs)))
        assert {end["status"] for _, end in ends} == {"done"}
        return [read_run(run.folder.root) for run in runs]

    (alone,), once = rollouts(alone=30), len(made)
    made.clear()
    read = counted(loaded.model)
    one, two, _ = rollouts(one=5, two=30, three=60)
    assert len(made) == once
    assert [turn["output_ids"] for turn in of(two, "turn")] == [turn["output_ids"] for turn in of(alone, "turn")]
    assert len(of(one, "compact")) > 1
    for event in of(alone, "compact"):
        path = event["artifact"]["path"]
        first, *others = (StillCache.load(tmp_path / name / path, loaded.model) for name in ("one", "three", "alone"))
        for other, exact in zip(others, (0, 1e-5), strict=True):
            for mine, theirs in zip(first.layers, other.layers, strict=True):
                torch.testing.assert_close(mine.keys, theirs.keys, atol=exact, rtol=exact)
                torch.testing.assert_close(mine.values, theirs.values, atol=exact, rtol=exact)
    shared = sum(read)
    read.clear()
    for name in ("four", "five", "six"):  # one after the other: nobody is there to share with
        rollouts(**{name: 30})
    assert sum(read) > 1.5 * shared
    made.clear()
    for events, slots in zip(rollouts(("200t", "100t"), more=30, fewer=30), (200, 100), strict=True):
        last = of(events, "compact")[-1]["artifact"]
        assert 0.8 * slots < last["nbytes"] / events[0]["bytes_per_token"] <= slots
    assert len(made) == 2 * once


class Saying(Handler):
    """Answers with what it was given, one after the other, and the last one again and again."""

    def reply(self, body):
        said = self.server.player
        return said.pop(0) if len(said) > 1 else said[0]


def said(content=None, finish="stop", usage=(5, 2), **more):
    """A chat completion with such a message."""
    counts = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*usage, 7), strict=True))
    message = {"role": "assistant", "content": content, **more}
    return {"choices": [{"index": 0, "finish_reason": finish, "message": message}], "usage": counts}


def calling(arguments):
    """A chat completion with one call."""
    return said(tool_calls=[{"id": "1", "type": "function", "function": {"name": "read", "arguments": arguments}}])


def ask_for_a_turn(server, retries: int = 2):
    """A turn of a conversation with it."""
    prices = Prices({"model-x": Price(2.0, 10.0)})
    session = ServerPolicy(ServerConfig("model-x", server.url, retries=retries), prices).session([])
    session.start([Message("system", "S"), Message("user", "U")])
    return session.sample(Limit(8))


@pytest.mark.parametrize(("reply", "expected"), [
    (said([{"type": "text", "text": "Do"}, {"type": "thinking", "text": "hm"}, {"type": "text", "text": "ne."}]),
     {"text": "Done."}),
    (calling({"path": "é.txt"}), {"calls": (ToolCall("read", '{"path": "é.txt"}', "1"),), "problem": ""}),
    (said("half \ud83d pair"), {"text": "half ? pair"}),
    (calling('{"path": "\ud83d"}'), {"calls": (ToolCall("read", '{"path": "?"}', "1"),)}),
    (said("Done.", usage=(None, None)), {"prompt_tokens": 3, "output_tokens": 2, "cost": None}),
    (said("Do", finish="content_filter"), {"text": "Do", "finish": "content_filter"}),
], ids=["parts", "object", "text", "arguments", "usage", "filter"])  # fmt: skip
def test_odd_replies_are_turns_all_the_same(serve, reply, expected):
    sampled = ask_for_a_turn(serve(player=[reply], handler=Saying))
    assert {name: getattr(sampled, name) for name in expected} == expected
    json.dumps([sampled.text, [call.arguments for call in sampled.calls]], ensure_ascii=False).encode()


NONE = [
    {"choices": None, "error": {"message": "overloaded"}}, {"choices": []}, {"choices": [{"index": 0}]}, said(5),
    said(tool_calls=[{"id": "1", "type": "function"}]),
]  # fmt: skip


@pytest.mark.parametrize("none", NONE)
def test_a_reply_that_is_none_is_asked_for_again(serve, monkeypatch, none):
    monkeypatch.setattr("still.harness.policies.server.time.sleep", lambda seconds: None)
    server = serve(player=[none, none, said("Done.")], handler=Saying)
    assert ask_for_a_turn(server).text == "Done."
    assert len(server.requests) == 3
    with pytest.raises(ReplyError, match=r"model-x at http://127.* gave no turn, asked 3 times"):
        ask_for_a_turn(serve(player=[none], handler=Saying))


def test_what_a_server_said_in_place_of_a_turn_is_told(serve, monkeypatch):
    monkeypatch.setattr("still.harness.policies.server.time.sleep", lambda seconds: None)
    with pytest.raises(ReplyError, match=r"no choices; it said .*overloaded"):
        ask_for_a_turn(serve(player=[NONE[0]], handler=Saying))
    loaded, server = tiny_agent(), serve(player=[NONE[0]], handler=Saying)
    session = TokenServerPolicy(ServerConfig("tiny", server.url, window=4000, retries=1), loaded.tokenizer).session([])
    session.start([Message("system", "S"), Message("user", "U")])
    with pytest.raises(ReplyError, match=r"asked 2 times: the reply has no choices; it said .*overloaded"):
        session.sample(Limit(4))


def test_a_content_filter_ends_the_run_with_its_name(tmp_path, serve):
    server = serve(player=[calling({"path": "next"}), said("", finish="content_filter")], handler=Saying)

    def run():
        policy = ServerPolicy(ServerConfig("m", server.url, window=9000))
        return episode(tmp_path, make_task(tmp_path, texts(3)), None, policy=policy, window=9000)

    assert [drive(run())[key] for key in ("status", "stop")] == ["stopped", "content_filter"]
    assert drive(run())["stop"] == "content_filter"  # replayed
    assert len(server.requests) == 2
    assert not of(read_run(tmp_path / "run"), "note")


def test_bytes_that_are_not_known_are_said_to_be_so(tmp_path, serve):
    policy = ServerPolicy(ServerConfig("m", serve(player=Reader()).url, window=9000))
    run = episode(tmp_path, make_task(tmp_path, texts(6)), None, policy=policy, backend="memo", budget="200t",
                  window=9000)  # fmt: skip
    drive(run)
    ours = metrics(read_run(run.folder.root))
    assert ours["still"]["peak_compacted_tokens"] > 0
    assert ours["still"]["peak_compacted_bytes"] is None
    (line,) = table([Outcome("task", tmp_path, "done", "done", ours)])
    assert " unknown bytes held" in line
    assert "unknown number of bytes" in trace_page(run.folder.root)
