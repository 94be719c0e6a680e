from __future__ import annotations

import json
import random
from statistics import fmean

import pytest
import torch
from tiny_text import tiny_tokenizer

from still.distill.batches import BatchStream, DatasetRows, Draws, IterableRows, bucket_lengths
from still.distill.data import Row, RowError, collate, load_rows, split_rows
from still.distill.objective import IGNORE
from still.distill.rendering import Renderer
from still.prompts import render

ROW = {
    "id": "a",
    "context": "The fee is 7 pounds. The term ends in May.",
    "turns": [
        {"question": "What is the fee?", "answer": "7 pounds", "kind": "string"},
        {"question": "When does the term end?", "answer": "in May", "kind": "fact"},
    ],
}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("chat", [True, False])
def test_context_and_first_question_are_what_inference_feeds(tmp_path, chat):
    tokenizer = tiny_tokenizer(chat)
    (row,) = load_rows(write(tmp_path / "rows.jsonl", ROW), Renderer(tokenizer))
    context, questions = render(tokenizer, [ROW["context"]], [turn["question"] for turn in ROW["turns"]])
    assert list(row.context_ids) == context
    assert [list(ids) for ids in row.opening] == questions


@pytest.mark.parametrize("chat", [True, False])
def test_a_batch_reads_as_one_conversation_and_supervises_answers_alone(tmp_path, chat):
    tokenizer = tiny_tokenizer(chat)
    (row,) = load_rows(write(tmp_path / "rows.jsonl", ROW), Renderer(tokenizer))
    batch = collate([row], random.Random(0))
    text = tokenizer.decode(batch["turn_ids"][0])
    for turn in ROW["turns"]:
        assert text.count(turn["question"]) == text.count(turn["answer"]) == 1
    labels = batch["labels"][0]
    supervised = tokenizer.decode(labels[labels != IGNORE])
    end = "<|end|>" if chat else "\n"
    assert sorted(part.strip() for part in supervised.split(end) if part.strip()) == ["7 pounds", "in May"]
    assert supervised.count(end) == 2
    kept = labels != IGNORE
    assert torch.equal(batch["turn_ids"][0][kept], labels[kept])
    if chat:
        first, second = (t for t in ROW["turns"]) if text.index("fee") < text.index("term") else ROW["turns"][::-1]
        messages = [
            {"role": "user", "content": first["question"]},
            {"role": "assistant", "content": first["answer"]},
            {"role": "user", "content": second["question"]},
            {"role": "assistant", "content": second["answer"]},
        ]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered.strip().endswith(text[text.index(first["question"]) :])


def test_padding_stands_left_of_contexts_and_right_of_turns():
    rows = [
        Row("a", [5, 6, 7], [([8], [9, 1])]),
        Row("b", [5], [([8, 8, 8], [9, 9, 1])]),
    ]
    batch = collate(rows, random.Random(0), pad_id=0)
    assert batch["context_ids"].tolist() == [[5, 6, 7], [0, 0, 5]]
    assert batch["context_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["turn_ids"].tolist() == [[8, 9, 1, 0, 0, 0], [8, 8, 8, 9, 9, 1]]
    assert batch["turn_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch["labels"].tolist() == [[IGNORE, 9, 1] + [IGNORE] * 3, [IGNORE] * 3 + [9, 9, 1]]


def test_questions_are_drawn_anew_each_step():
    row = Row("a", [5], [([10 + i], [30 + i]) for i in range(8)])
    seen = {tuple(collate([row], random.Random(step), questions=3)["turn_ids"][0].tolist()) for step in range(20)}
    assert all(len(ids) == 6 for ids in seen)
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        ({**ROW, "turns": []}, "turns is empty"),
        ({"id": "b", "context": "x"}, "turns is missing"),
        ({**ROW, "turns": [{"question": "Q?"}]}, r"turns\[0\].answer is missing"),
        ({**ROW, "turns": [ROW["turns"][0], {"question": "Q?", "answer": 7}]}, r"turns\[1\].answer is a int"),
        ({**ROW, "turns": [{"question": " ", "answer": "x"}]}, r"turns\[0\].question is empty"),
        ({**ROW, "turns": ["Q?"]}, r"turns\[0\] is a str"),
        ({**ROW, "context": "  "}, "context is empty"),
        ({**ROW, "context": [{"content": "x"}]}, r"context\[0\] must be a document"),
        ({**ROW, "context": None}, "context is missing"),
        ({**ROW, "context_ids": [5, 100_000]}, "context_ids must be a list of token ids"),
        ('{"id": "b", "context"', "this line is no JSON"),
        ("[1]", "a row must be a JSON object"),
        ({**ROW}, "id 'a' is also that of"),
    ],
)
def test_a_malformed_row_names_file_line_and_field(tmp_path, broken, names):
    if isinstance(broken, dict) and broken != ROW:
        broken = {**broken, "id": "b"}
    path = write(tmp_path / "rows.jsonl", ROW, "", broken)
    with pytest.raises(RowError, match=rf"rows.jsonl:3: .*{names}"):
        load_rows(path, Renderer(tiny_tokenizer()))


def test_data_that_is_nowhere_is_said_to_be(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(FileNotFoundError, match=r"no data .*nowhere: not a file or folder, and the Hub says"):
        load_rows(tmp_path / "nowhere", Renderer(tiny_tokenizer()))


def test_contexts_may_be_documents_messages_or_ids(tmp_path):
    tokenizer = tiny_tokenizer()
    turns = ROW["turns"]
    rows = [
        {"id": "documents", "context": [{"name": "a.txt", "text": "Fee: 7."}, {"text": "Term: May."}], "turns": turns},
        {"id": "messages", "context": [{"role": "user", "content": "Fee: 7. <|end|>"}], "turns": turns},
        {"id": "ids", "context_ids": [10, 11, 12], "turns": turns, "other column": {"x": 1}},
    ]
    documents, messages, ids = load_rows(write(tmp_path / "rows.jsonl", *rows), Renderer(tokenizer))
    assert list(documents.context_ids) == render(tokenizer, [("a.txt", "Fee: 7."), ("", "Term: May.")])[0]
    assert list(ids.context_ids) == [10, 11, 12]
    text = tokenizer.decode(messages.context_ids)
    assert text.count("<|end|>") == 1  # the one written inside the message is broken up
    later = tokenizer.decode([*messages.context_ids, *messages.turns[0][0]])
    conversation = [{"role": "user", "content": "Fee: 7. <¦end¦>"}, {"role": "user", "content": turns[0]["question"]}]
    assert later == tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)


def test_messages_without_a_chat_template_are_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", {**ROW, "context": [{"role": "user", "content": "x"}]})
    with pytest.raises(RowError, match=r"rows.jsonl:1: context: .*no chat template"):
        load_rows(path, Renderer(tiny_tokenizer(chat=False)))


def test_splits_come_from_rows_or_files_or_a_seeded_share(tmp_path):
    renderer = Renderer(tiny_tokenizer())
    many = [{**ROW, "id": str(i)} for i in range(20)]
    write(tmp_path / "train-00000-of-00001.jsonl", *many[:15])
    write(tmp_path / "validation-00000-of-00001.jsonl", *many[15:])
    _, held_out = split_rows(load_rows(tmp_path, renderer), 0.5, seed=0)
    assert [row.id for row in held_out] == [str(i) for i in range(15, 20)]
    plain = [Row(str(i), [5], [([6], [7])]) for i in range(40)]
    first, again, other = (split_rows(plain, 0.25, seed)[1] for seed in (0, 0, 1))
    assert len(first) == 10
    assert first == again != other
    assert split_rows(plain, 0, 0)[1] == []


def test_rows_of_a_saved_dataset_are_the_same(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = write(tmp_path / "rows.jsonl", {**ROW, "split": "train"}, {**ROW, "id": "b", "split": "validation"})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    renderer = Renderer(tiny_tokenizer())
    assert load_rows(tmp_path / "saved", renderer) == load_rows(path, renderer)


def test_draws_depend_on_seed_and_step_alone():
    draws = [Draws(seed, [64, 128], [2.0, 4.0, 8.0]) for seed in (3, 3, 4)]
    first, again, other = ([one.at(step) for step in range(200)] for one in draws)
    assert first == again != other
    assert draws[0].at(57) == first[57]
    assert {(draw.length, draw.ratio) for draw in first} == {(t, r) for t in (64, 128) for r in (2.0, 4.0, 8.0)}


def source_of(lengths=(32, 64), seed=0):
    rng = random.Random(1)
    rows = [Row(str(i), [5] * rng.randrange(20, 65), [([6], [7])]) for i in range(37)]
    return rows, DatasetRows(rows, lengths, [2.0, 4.0], seed)


def test_every_row_is_used_once_before_any_is_used_twice():
    rows, source = source_of()
    seen = {32: [], 64: []}
    for step in range(200):
        draw = source.draws.at(step)
        seen[draw.length] += [row.id for row in source.rows(draw, 1, range(1))]
    for length, low in ((32, 0), (64, 33)):
        bucket = [row.id for row in rows if low <= row.tokens <= length]
        turns = [seen[length][start : start + len(bucket)] for start in range(0, len(seen[length]), len(bucket))]
        assert len(turns) > 2
        assert all(sorted(turn) == sorted(bucket) for turn in turns[:-1])
        assert turns[0] != turns[1]


@pytest.mark.parametrize("kind", ["dataset", "iterable"])
def test_processes_share_a_draw_and_split_its_rows(kind):
    def stream(rank, world, start=0):
        rows, source = source_of()
        if kind == "iterable":
            endless = (rows[i % len(rows)] for i in range(10_000))
            source = IterableRows(endless, Draws(0, [32, 64], [2.0, 4.0]))
        return iter(BatchStream(source, start=start, batch=8, micro_batch=2, rank=rank, world=world))

    one = stream(0, 1)
    whole = [[next(one) for _ in range(4)] for _ in range(6)]
    for rank in (0, 1):
        mine = stream(rank, 2)
        for step in range(6):
            for part in range(2):
                batch, expected = next(mine), whole[step][part * 2 + rank]
                assert batch.keys() == expected.keys()
                assert all(torch.equal(torch.as_tensor(batch[k]), torch.as_tensor(expected[k])) for k in batch)
    late = next(stream(0, 1, start=4))
    assert torch.equal(late["context_ids"], whole[4][0]["context_ids"])


def test_slots_are_those_of_the_shortest_row():
    rows = [Row("a", [5] * 40, [([6], [7])]), Row("b", [5] * 36, [([6], [7])])]
    stream = BatchStream(DatasetRows(rows, [64], [4.0], 0), start=0, batch=2, micro_batch=2)
    assert next(iter(stream))["slots"] == 9


def test_rows_that_fit_no_length_are_refused_or_counted():
    rows, _ = source_of()
    assert DatasetRows(rows, [40], [2.0], 0).left_out == sum(row.tokens > 40 for row in rows) > 0
    with pytest.raises(RowError, match=r"none of 37 rows fits the lengths \[8\]"):
        DatasetRows(rows, [8], [2.0], 0)
    starved = IterableRows(iter(rows * 1000), Draws(0, [8], [2.0]), patience=50)
    with pytest.raises(RowError, match="none of 51 rows in a row fits length 8"):
        starved.rows(starved.draws.at(0), 2, range(2))


def test_bucket_lengths_cover_the_data():
    assert bucket_lengths([100, 500, 1000]) == [128, 256, 512, 1000]
    assert bucket_lengths([60, 60]) == [60]


def test_a_length_is_drawn_as_often_as_it_has_rows():
    rows, source = source_of()
    share = fmean(row.tokens > 32 for row in rows)
    assert fmean(source.draws.at(step).length == 64 for step in range(3000)) == pytest.approx(share, abs=0.04)
    assert abs(share - 0.5) > 0.1
