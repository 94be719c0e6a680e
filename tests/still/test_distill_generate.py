from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tiny_text import tiny_base

from still.distill import answers as answers_module
from still.distill.answers import Answerer
from still.distill.config import DataConfig
from still.distill.data import load_rows
from still.distill.dedup import Deduplicator
from still.distill.documents import Context, Document, cut, held_out_names, read_documents
from still.distill.generate import generate
from still.distill.journal import Journal
from still.distill.questions import parse
from still.distill.rendering import Renderer

pytest.importorskip("openai")


class Server:
    """An OpenAI-compatible server on this machine; `reply(prompt)` gives a text, or an HTTP status to fail with."""

    def __init__(self, reply):
        self.prompts: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                owner.prompts.append(prompt)
                made = reply(prompt)
                status = made if isinstance(made, int) else 200
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": made}}
                answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
                text = json.dumps(answer | {"choices": [choice]} if status == 200 else {"error": {"message": "no"}})
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


def talkative_base():
    """A tiny model that writes short words: letters, and its end token about every fourth token."""
    base = tiny_base()
    model, tokenizer = base.model, base.tokenizer
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    with torch.no_grad():
        ids = torch.randint(4, 260, (8, 64), generator=torch.Generator().manual_seed(0))
        typical = model.model(ids).last_hidden_state.mean((0, 1))
        push = typical / typical.square().sum()
        others = torch.ones(len(tokenizer), dtype=torch.bool)
        others[[*letters, tokenizer.eos_token_id]] = False
        model.lm_head.weight[others] -= 40 * push
        model.lm_head.weight[tokenizer.eos_token_id] += 1.5 * push
    return base


def text_of(prompt):
    return re.search(r"<text>\n(.*)\n</text>", prompt, re.DOTALL)[1]


def three_questions(prompt):
    """A fact, a string and a question without an answer, about whatever the text begins with."""
    word = text_of(prompt).split()[0]
    made = [
        {"kind": "fact", "question": f"What of {word}?", "answer": "something else"},
        {"kind": "string", "question": f"Which word opens {word}?", "answer": word},
        {"kind": "fact", "question": "Why?"},
    ]
    return "Here you are:\n```json\n" + json.dumps(made) + "\n```"


@pytest.fixture
def folder(tmp_path):
    docs = tmp_path / "docs"
    (docs / "sub").mkdir(parents=True)
    for index in range(6):
        words = " ".join(f"w{index}x{number}." for number in range(30))
        (docs / f"{index}.txt").write_text(f"Start{index} {words}")
    (docs / "sub" / "copy.md").write_text((docs / "0.txt").read_text().upper())
    (docs / "picture.png").write_bytes(b"\x89PNG")
    return docs


SETTINGS = {
    "questions": 4, "context_tokens": [320], "answer_tokens": 32, "api_model": "scripted", "held_out": 0.3,
    "concurrency": 2, "retries": 2,
}  # fmt: skip


def test_documents_become_rows_that_load(tmp_path, folder):
    base = talkative_base()
    with Server(three_questions) as server:
        config = DataConfig(**SETTINGS, endpoint=server.url)
        made = generate(folder, tmp_path / "rows", base, config, progress=False)
    assert made.dropped["file_.png"] == 1
    assert made.dropped["exact_duplicate"] == 1  # the copy in capitals
    assert made.dropped["no_answer"] == len(server.prompts) == 6
    assert made.failed == {}
    rows = load_rows(tmp_path / "rows", Renderer(base.tokenizer))
    assert len(rows) == sum(made.rows.values())
    assert sum(row.held_out for row in rows) == made.rows["validation"] > 0
    assert all(row.tokens <= 320 for row in rows)
    assert sum(len(row.turns) for row in rows) == sum(made.turns.values())
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert manifest["dropped"] == made.dropped
    assert manifest["provenance"]["model"] == "tiny"
    names = {path.name for path in (tmp_path / "rows").glob("*.jsonl")}
    assert names == set(manifest["shards"]) == {"train-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl"}
    line = json.loads((tmp_path / "rows" / "train-00000-of-00001.jsonl").read_text().splitlines()[0])
    assert line["source"].endswith(".txt")
    renderer = Renderer(base.tokenizer)
    context = [(part["name"], part["text"]) for part in line["context"]]
    again = Answerer(base.model, renderer, 32).with_context(
        renderer.context(context), [turn["question"] for turn in line["turns"]], config.temperature
    )
    assert [answer.text for answer in again] == [turn["answer"] for turn in line["turns"]]  # the base's own answers


def test_a_context_that_changes_its_split_is_answered_anew_for_it(tmp_path, folder):
    base, settings = talkative_base(), SETTINGS | {"held_out": 1e-6, "concurrency": 1}
    renderer, rows = Renderer(base.tokenizer), tmp_path / "rows"
    (folder / "sub" / "copy.md").unlink()
    (late,) = held_out_names(read_documents(folder)[0], settings["held_out"], 0)
    text = (folder / late).read_text()
    (folder / late).unlink()
    (moved,) = held_out_names(read_documents(folder)[0], settings["held_out"], 0)

    def made():
        with Server(three_questions) as server:
            generate(folder, rows, base, DataConfig(**settings, endpoint=server.url), progress=False)
        lines = [json.loads(line) for path in rows.glob("*.jsonl") for line in path.read_text().splitlines()]
        return {line["source"]: line for line in lines}, len(server.prompts)

    before, asked = made()
    assert (before[moved]["split"], asked) == ("validation", 5)
    (folder / late).write_text(text)
    after, asked = made()
    assert (after[moved]["split"], after[late]["split"], asked) == ("train", "validation", 1)
    assert {name: row for name, row in after.items() if name not in (moved, late)} == {
        name: row for name, row in before.items() if name != moved
    }
    questions = [turn["question"] for turn in after[moved]["turns"]]
    context = renderer.context([(part["name"], part["text"]) for part in after[moved]["context"]])
    drawn = Answerer(base.model, renderer, 32).with_context(context, questions, DataConfig().temperature)
    assert [answer.text for answer in drawn] == [turn["answer"] for turn in after[moved]["turns"]]


def test_edits_change_the_context_and_guessable_questions_are_dropped(tmp_path):
    base, renderer = talkative_base(), None
    renderer = Renderer(base.tokenizer)
    answerer = Answerer(base.model, renderer, 64, seed=3)
    docs = tmp_path / "docs"
    docs.mkdir()
    text = "The rent is 900 pounds. The term is two years. " + " ".join(f"Clause{i}." for i in range(12))
    (docs / "lease.txt").write_text(text)
    edited = text.replace("900 pounds", "700 pounds")
    (true,) = answerer.with_context(renderer.context([("lease.txt", edited)]), ["What is the rent?"], 0.7)
    (guess,) = answerer.without_context(["How long is the term?"])
    assert true.ended
    edit = {"kind": "edit", "sentence": "The rent  is 900 pounds.", "edited": "The rent is 700 pounds."}
    replies = [
        edit | {"question": "What is the rent?", "answer": true.text},
        edit | {"question": "And what is the rent?", "answer": "it"},  # the same sentence again
        {"kind": "fact", "question": "How long is the term?", "answer": guess.text},
    ]
    with Server(lambda prompt: json.dumps(replies)) as server:
        settings = SETTINGS | {"answer_tokens": 64, "held_out": 0.0, "seed": 3}
        made = generate(docs, tmp_path / "rows", base, DataConfig(**settings, endpoint=server.url), progress=False)
    row = json.loads((tmp_path / "rows" / "train-00000-of-00001.jsonl").read_text())
    assert row["context"] == [{"name": "lease.txt", "text": edited}]
    assert [(turn["kind"], turn["answer"], turn["agrees"]) for turn in row["turns"]] == [("edit", true.text, True)]
    assert made.dropped == {"sentence_edited_twice": 1, "answered_without_context": 1}


def test_answers_side_by_side_are_those_of_generate(monkeypatch):
    """Greedy ones; and what is drawn for a question depends on no other one."""
    base = talkative_base()
    answerer = Answerer(base.model, Renderer(base.tokenizer), 24)
    context = answerer.renderer.context([("lease.txt", "The rent is 900 pounds. The term is two years.")])
    questions = ["What is the rent?", "How long, in years, is the term?", "Who?"]
    both = answerer.with_context(context, questions, 0.0), answerer.without_context(questions)
    drawn = answerer.with_context(context, questions, 1.0)
    assert drawn == [answerer.with_context(context, [question], 1.0)[0] for question in questions]
    assert drawn != both[0]
    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "contexts", lambda *args: None)
        patch.setattr(answers_module, "pads_freely", lambda config: False)
        patch.setattr(Answerer, "_decode", lambda *args: pytest.fail("one by one"))
        assert (answerer.with_context(context, questions, 0.0), answerer.without_context(questions)) == both
    assert any(not answer.ended for answer in both[0] + both[1]) or len({len(a.text) for a in both[0]}) > 1


def test_draws_follow_the_models_shares():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(400, -1)
    numbers = [torch.Generator().manual_seed(seed) for seed in range(400)]
    drawn = Counter(answers_module.draw(logits, 2.0, numbers))
    shares = (logits[0] / 2).softmax(-1)
    assert drawn[2] == 0
    assert all(abs(drawn[token] / 400 - shares[token]) < 0.08 for token in range(4))
    assert set(answers_module.draw(logits[:3], 0.0, numbers[:3])) == {3}


def test_failed_requests_are_retried_and_the_lost_ones_sent_again(tmp_path, folder):
    seen = Counter()

    def moody(prompt):
        name = text_of(prompt).split()[0]
        seen[name] += 1
        if name == "Start1":
            return 500
        return 503 if seen[name] == 1 else three_questions(prompt)

    base = talkative_base()
    with Server(moody) as server:
        config = DataConfig(**SETTINGS, endpoint=server.url)
        made = generate(folder, tmp_path / "rows", base, config, progress=False)
        assert len(made.failed) == made.dropped["request_failed"] == 1
        assert seen == {"Start1": 3} | {f"Start{i}": 2 for i in (0, 2, 3, 4, 5)}
    with Server(three_questions) as server:
        config = DataConfig(**SETTINGS, endpoint=server.url)
        whole = generate(folder, tmp_path / "rows", base, config, progress=False)
        assert [text_of(prompt).split()[0] for prompt in server.prompts] == ["Start1"]
    assert "request_failed" not in whole.dropped
    assert sum(whole.rows.values()) >= sum(made.rows.values())


def test_a_server_that_refuses_the_model_stops_the_run_at_once(tmp_path, folder):
    with Server(lambda prompt: 404) as server:
        config = DataConfig(**SETTINGS | {"concurrency": 1}, endpoint=server.url)
        with pytest.raises(ValueError, match="refuses requests for model 'scripted'"):
            generate(folder, tmp_path / "rows", talkative_base(), config, progress=False)
    assert len(server.prompts) == 1


def test_a_killed_run_repeats_no_finished_request(tmp_path, folder):
    base = talkative_base()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    slow = threading.Event()

    def reply(prompt):
        if len(server.prompts) > 3:
            slow.wait(120)
        return three_questions(prompt)

    arguments = ["data", str(folder), "-o", str(tmp_path / "rows"), "--model", str(tmp_path / "base")]
    for name, value in SETTINGS.items():
        shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        arguments += [f"--{name.replace('_', '-')}", shown]
    journal = tmp_path / "rows" / "journal" / "replies.jsonl"
    with Server(reply) as server:
        arguments += ["--endpoint", server.url, "--device", "cpu"]
        code = f"import sys; from still.cli import main; sys.exit(main({arguments!r}))"
        child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while child.poll() is None and not (journal.exists() and len(journal.read_text().splitlines()) == 3):
            time.sleep(0.05)
        assert child.poll() is None
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        slow.set()
    finished = {json.loads(line)["id"] for line in journal.read_text().splitlines()}
    with journal.open("a") as file:
        file.write('{"id": "cut sho')  # as a kill in the middle of a line leaves it
    with Server(three_questions) as again:
        settings = DataConfig(**SETTINGS, endpoint=again.url)
        loaded = base.__class__(str(tmp_path / "base"), base.model, base.tokenizer)
        made = generate(folder, tmp_path / "rows", loaded, settings, progress=False)
    assert len(finished) == len(again.prompts) == 3
    assert not {text_of(p).split()[0] for p in again.prompts} & {text_of(p).split()[0] for p in server.prompts[:3]}
    assert sum(made.rows.values()) > 0
    with pytest.raises(ValueError, match=r"other settings \(questions 4 -> 5\)"):
        generate(folder, tmp_path / "rows", loaded, DataConfig(**SETTINGS | {"questions": 5}, endpoint="x"))


def test_the_base_may_write_its_own_questions(tmp_path, folder):
    config = DataConfig(**{**SETTINGS, "api_model": None, "context_tokens": [600]})

    class Shy:
        def write(self, prompts, done):
            for id_ in prompts:
                done(id_, "I would rather not.")
            return {}

    with pytest.raises(ValueError, match=r"no row is left .*context_without_turns 6.*reply_without_json 6"):
        generate(folder, tmp_path / "rows", talkative_base(), config, Shy(), progress=False)
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert manifest["rows"] == {"train": 0, "validation": 0}


CONTEXT = Context((("a.txt", "The fee is 7 pounds. The term ends in May. It may be renewed."),), 30, 100, "train")


def edit(sentence, edited, answer="a"):
    return {"kind": "edit", "question": "Q", "answer": answer, "sentence": sentence, "edited": edited}


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("text", "not_an_object"),
        ({"kind": "riddle", "question": "Q", "answer": "a"}, "unknown_kind"),
        ({"kind": "fact", "answer": "a"}, "no_question"),
        ({"kind": "fact", "question": "Q", "answer": "?!"}, "no_answer"),
        ({"kind": "fact", "question": "Q", "answer": "a" * 500}, "long_answer"),
        ({"kind": "fact", "question": "known,  QUESTION", "answer": "a"}, "duplicate_question"),
        ({"kind": "string", "question": "Q", "answer": "8 pounds"}, "string_not_in_text"),
        ({"kind": "edit", "question": "Q", "answer": "a", "sentence": "The fee is 7 pounds."}, "no_edited"),
        (edit("The fee.", "x"), "sentence_not_in_text_once"),
        (edit("The fee is 7 pounds.", "x", answer="7"), "edit_keeps_the_answer"),
        (edit("It may be renewed.", "it may be renewed"), "edit_changes_nothing"),
        (edit("It may be renewed.", "It may. " * 99), "edit_too_long"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_counted_by_its_reason(item, reason):
    known = {"kind": "fact", "question": "Known question?", "answer": "May"}
    dropped = Counter()
    context, asked = parse(json.dumps([known, item]), CONTEXT, 8, dropped, lambda some: len(some.text))
    assert {name: count for name, count in dropped.items() if count} == {reason: 1}
    assert [one.question for one in asked] == ["Known question?"]
    assert context.parts == CONTEXT.parts


def test_a_reply_that_was_cut_gives_its_whole_questions():
    reply = json.dumps([{"kind": "fact", "question": f"Q{i}?", "answer": "May"} for i in range(3)])
    dropped = Counter()
    _, asked = parse("Sure! " + reply[:-12], CONTEXT, 8, dropped, lambda some: 1)
    assert [one.question for one in asked] == ["Q0?", "Q1?"]
    assert parse("No.", CONTEXT, 8, dropped, lambda some: 1)[1] == []
    assert dropped["reply_without_json"] == 1


def test_contexts_fit_their_length_and_hold_the_documents_words():
    renderer = Renderer(tiny_base().tokenizer)
    documents = [
        Document("long.txt", " ".join(f"Sentence number {i} stands here." for i in range(60))),
        Document("short.txt", "A short one."),
        Document("line.txt", " ".join(f"word{i}" for i in range(150))),
    ]
    dropped = Counter()
    contexts = list(cut(documents, 400, renderer, "train", dropped))
    for context in contexts:
        assert context.tokens == len(renderer.context(list(context.parts))) <= 400
    words = " ".join(context.text for context in contexts).split()
    expected = " ".join(document.text for document in documents).split()
    assert Counter(expected) - Counter(words) == Counter() or dropped["short_context"] == 1
    assert any(len(context.parts) > 1 for context in contexts)
    assert len({context.id for context in contexts}) == len(contexts)


def test_near_duplicates_are_found_and_others_kept():
    words = [f"word{i}" for i in range(200)]
    known = Deduplicator(0.8)
    assert known.seen(" ".join(words)) == ""
    assert known.seen(" ".join(words).upper() + "!") == "exact_duplicate"
    assert known.seen(" ".join([*words[:100], "other", *words[101:]])) == "near_duplicate"
    assert known.seen(" ".join([*words[:100], *(f"new{i}" for i in range(100))])) == ""
    assert Deduplicator(1.0).seen("a b c") == ""


def test_documents_that_need_an_extra_say_so(tmp_path):
    try:
        import markitdown  # noqa: F401
    except ModuleNotFoundError:
        (tmp_path / "a.docx").write_bytes(b"PK")
        with pytest.raises(ModuleNotFoundError, match=r"a\.docx takes the `documents` extra"):
            read_documents(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_documents(tmp_path / "missing")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises((ValueError, ModuleNotFoundError)):
        read_documents(tmp_path)


def test_a_damaged_journal_names_its_line(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.add("a", value=1)
    journal.add("b", value=2)
    path = tmp_path / "j.jsonl"
    path.write_text(path.read_text() + '{"id": "c", "val')
    assert set(Journal(path).records) == {"a", "b"}
    path.write_text("damage\n" + path.read_text())
    with pytest.raises(ValueError, match=r"j\.jsonl:1: this line is damaged"):
        Journal(path)
