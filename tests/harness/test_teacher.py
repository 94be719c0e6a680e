"""Teachers with private access: the public log shows none of it, and the gate finds what was planted.

All teachers here are scripts; they show mechanics and nothing about a model.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from agent_cases import SteeredPolicy, of, tiny_agent, tiny_agent_tokenizer
from trainer_cases import RUN, ScriptedTeacher, exact, matters, scripted_teacher

from still.eval.tasks import Criterion
from still.harness.policies.batch import Batch
from still.harness.policies.scripted import ScriptedPolicy, ScriptedSession
from still.harness.runs import RunFolder, read_run
from still.harness.trainers.collect import Collector
from still.harness.trainers.config import IsftConfig
from still.harness.trainers.isft import gate_of
from still.harness.trainers.leaks import LeakReport, Said, leaks_of, privilege, transcript
from still.harness.trainers.report import yield_difference
from still.harness.trainers.teacher import PrivateChannel
from still.harness.types import NoRoom
from still.harness.windows import IGNORE, check_rows, rows_of_run


def collect(root, tasks, config=None, run=RUN, **teacher):
    """A round's attempts."""
    config = config or IsftConfig(rollouts=1)
    made = Collector(scripted_teacher(tasks, **teacher), tiny_agent_tokenizer(), run, config, exact(), root, 1)
    return made.collect(tasks)


def said_of(attempt):
    folder = RunFolder(attempt.folder)
    return transcript(read_run(attempt.folder), folder.text)


@pytest.mark.parametrize("backend", [{"backend": "memo"}, {"backend": "kv", "budget": None, "ratio": 8.0}])
def test_a_private_submit_is_cut_out_and_the_public_log_stays_valid(tmp_path, backend):
    tasks = matters(tmp_path / "lab", (1,))
    (attempt,) = collect(tmp_path / "round", tasks, run=replace(RUN, **backend))
    assert attempt.kept
    assert attempt.corrections == 1
    events, channel = read_run(attempt.folder), PrivateChannel(attempt.folder, tasks[0], "round 1 attempt 0")
    assert len(channel.of("submit")) == 1
    public = (tmp_path / "round").rglob("events.jsonl").__next__().read_text()
    assert "PRIVATE-" not in public
    assert "For you alone" not in public
    assert "States the" not in public  # every criterion's title has it
    assert not any("PRIVATE" in path.read_text() for path in RunFolder(attempt.folder).blobs.iterdir())
    turns = of(events, "turn")
    assert [turn["kind"] for turn in turns][-1] == "final"
    assert [turn["kind"] for turn in turns].count("final") == 1  # the failed stop is not there
    rows = rows_of_run(attempt.folder, tiny_agent_tokenizer(), corrected_at=attempt.corrected_at, teacher="scripted")
    check_rows(rows, tiny_agent_tokenizer())
    assert len(rows) == attempt.windows > 1
    assert bool(rows[1].prefix_plan) == (backend["backend"] == "kv")
    last = rows[-1]
    superseded = [span for span in last.spans if span["untrained"] == "superseded"]
    assert len(superseded) == 2  # both flawed drafts stay as context and are not learnt
    assert all(set(last.labels[span["start"] : span["end"]]) == {IGNORE} for span in superseded)
    text = tiny_agent_tokenizer().decode([label for label in last.labels if label != IGNORE])
    assert "Let me check the terms once more." in text


def test_a_private_bit_saves_a_rollout_that_a_plain_resample_does_not(tmp_path):
    tasks = matters(tmp_path / "lab")
    private = collect(tmp_path / "a", tasks, IsftConfig(rollouts=2))
    plain = collect(tmp_path / "b", tasks, IsftConfig(rollouts=2, private="none"))
    assert [attempt.kept for attempt in private] == [True] * 4
    assert [attempt.kept for attempt in plain] == [False] * 4
    assert all(rate < 1 for attempt in plain for rate in attempt.rates)
    gain = yield_difference([a.kept for a in private], [a.kept for a in plain], [a.task for a in plain])
    assert gain.estimate == 1.0  # of a script that mends when told: the measure works, and says nothing of a model


def test_attempts_that_are_done_are_read_and_a_cut_one_is_gone_on_with(tmp_path):
    tasks = matters(tmp_path / "lab", (1,))
    (whole,) = collect(tmp_path / "whole", tasks)
    collect(tmp_path / "cut", tasks)
    folder = tmp_path / "cut" / "collect" / tasks[0].id / "attempt-0"
    expected = [(turn["append_ids"], turn["output_ids"]) for turn in of(read_run(whole.folder), "turn")]
    lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    private = (folder / "private.jsonl").read_bytes().splitlines(keepends=True)
    for count in range(2, len(lines)):
        (folder / "attempt.json").unlink()
        (folder / "events.jsonl").write_bytes(b"".join(lines[:count]))
        turns = sum(json.loads(line)["event"] == "turn" for line in lines[:count])
        kept = [line for line in private if json.loads(line)["turn"] <= turns]  # a turn further, as a kill may leave it
        (folder / "private.jsonl").write_bytes(b"".join(kept) + b'{"kind": "su')
        (again,) = collect(tmp_path / "cut", tasks)
        assert [(t["append_ids"], t["output_ids"]) for t in of(read_run(folder), "turn")] == expected
        assert (again.kept, again.corrected_at) == (whole.kept, whole.corrected_at)
        kinds = [json.loads(line)["kind"] for line in (folder / "private.jsonl").read_bytes().splitlines()]
        assert kinds.count("submit") == 1, "a note that was given before the cut is not given again"
    before = (folder / "events.jsonl").stat().st_mtime_ns
    collect(tmp_path / "cut", tasks)
    assert (folder / "events.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("decoded", [False, True])
def test_attempts_side_by_side_are_those_of_one_by_one(tmp_path, monkeypatch, decoded):
    """Private notes and second attempts included, asked in parallel or decoded in one batch."""
    tasks, loaded = matters(tmp_path / "lab", (1, 2, 3)), tiny_agent(layers=1)
    player, open_at_once = ScriptedTeacher(tasks), []
    step = Batch._step
    monkeypatch.setattr(Batch, "_step", lambda self: open_at_once.append(len(self._open)) or step(self))

    def attempts(name, together):
        here = SteeredPolicy(loaded.tokenizer, lambda: player, 12_000, loaded)
        teacher = here if decoded else scripted_teacher(tasks)
        config = IsftConfig(rollouts=2, keep_per_task=2)
        collector = Collector(teacher, loaded.tokenizer, RUN, config, exact(), tmp_path / name, 1, together)
        return collector.collect(tasks)

    alone, together = attempts("alone", 1), attempts("together", 3)
    assert [replace(a, folder="") for a in together] == [replace(a, folder="") for a in alone]
    assert [(a.task, a.number) for a in alone] == [(task.id, number) for task in tasks for number in (0, 1)]
    assert all(a.kept and a.corrections == 1 for a in alone)
    for one, other in zip(alone, together, strict=True):
        turns = [[(t["append_ids"], t["output_ids"]) for t in of(read_run(a.folder), "turn")] for a in (one, other)]
        assert turns[0] == turns[1]
    assert max(open_at_once, default=0) == (3 if decoded else 0)


def test_an_attempt_whose_teacher_has_no_room_left_fails_alone(tmp_path, monkeypatch):
    tasks, sample, first = matters(tmp_path / "lab"), ScriptedSession.sample, []

    def full(session, limit):
        first[:] = first or [session]
        if session is first[0] and len(session.seen) > 4:
            raise NoRoom("a window of 400 tokens has no room for a turn")
        return sample(session, limit)

    monkeypatch.setattr(ScriptedSession, "sample", full)
    failed, kept = collect(tmp_path / "round", tasks)
    assert (failed.status, failed.kept, failed.rates) == ("failed", False, [])
    assert "400 tokens has no room" in failed.reason
    assert "longer window" in failed.reason
    assert kept.kept


def test_a_teacher_that_mends_nothing_is_told_so_often_and_no_more(tmp_path):
    tasks = matters(tmp_path / "lab", (1,))
    player = ScriptedTeacher(tasks)

    def deaf(seen, limit):
        return player([m for m in seen if "For you alone: not" not in m.content], limit)

    policy = ScriptedPolicy(tiny_agent_tokenizer(), lambda: deaf, 12_000, name="deaf")
    seeds, sample = [], ScriptedSession.sample
    collector = Collector(policy, tiny_agent_tokenizer(), RUN, IsftConfig(rollouts=1), exact(), tmp_path, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedSession, "sample", lambda self, limit: seeds.append(limit.seed) or sample(self, limit))
        (attempt,) = collector.collect(tasks)
    channel = PrivateChannel(attempt.folder, tasks[0], "round 1 attempt 0")
    assert len(channel.of("submit")) == IsftConfig.private_rounds == 2
    assert not attempt.kept
    assert len({line["turn"] for line in channel.of("submit")}) == 1, "all of one turn"
    assert seeds[-3:] == [seeds[-3], seeds[-3] + 1, seeds[-3] + 2], "drawn anew after each"


def test_a_rollback_begins_at_the_last_boundary_of_the_attempt_before(tmp_path):
    tasks = matters(tmp_path / "lab", (1,))
    first, second = collect(tmp_path, tasks, IsftConfig(rollouts=2, private="rollback"))
    assert (first.rolled_back_from, second.rolled_back_from) == (None, 0)
    events, again = read_run(first.folder), read_run(second.folder)
    last = max(n for n, event in enumerate(events) if event["event"] == "compact")
    assert again[: last + 1] == events[: last + 1]
    assert again[-1]["event"] == "end"


def test_the_gate_knows_the_canaries_of_the_attempts_that_a_rollback_goes_on_from(tmp_path):
    tasks = matters(tmp_path / "lab", (1,))
    first, second = collect(tmp_path, tasks, IsftConfig(rollouts=2, private="rollback"))
    log = Path(second.folder) / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert not gate_of([(tasks[0], second)], IsftConfig()).counts()["structural"]
    turn = next(line for line in lines if line["event"] == "turn")  # before the boundary that both have in common
    turn["text"] += f" {PrivateChannel(first.folder, tasks[0], 'round 1 attempt 0').marker}"
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert gate_of([(tasks[0], second)], IsftConfig()).counts()["structural"] == 1
    (Path(second.folder) / "private.jsonl").unlink()  # a rubric that was never shown leaves no line
    assert gate_of([(tasks[0], second)], IsftConfig()).counts()["structural"] == 1


def test_the_neutral_gate_says_the_same_to_all(tmp_path):
    tasks = matters(tmp_path / "lab", (1,))
    for forgets in (True, False):
        (attempt,) = collect(tmp_path / str(forgets), tasks, IsftConfig(rollouts=1, private="gate"), forgets=forgets)
        notes = [event["text"] for event in of(read_run(attempt.folder), "note") if event["why"] == "review"]
        assert len(notes) == 1
        assert "Read the assignment and your deliverables once more" in notes[0]


def test_fewer_graders_than_gradings_are_refused(tmp_path):
    tasks = matters(tmp_path / "lab", (1,))
    with pytest.raises(ValueError, match="2 independent gradings need as many graders"):
        Collector(scripted_teacher(tasks), tiny_agent_tokenizer(), RUN, IsftConfig(), exact()[:1], tmp_path, 1)


def clean(tmp_path):
    """A clean rollout with a correction, its task, and its private texts."""
    tasks = matters(tmp_path / "lab", (1,))
    (attempt,) = collect(tmp_path / "round", tasks)
    channel = PrivateChannel(attempt.folder, tasks[0], "round 1 attempt 0")
    private = [line["text"] for line in channel.lines if "text" in line]
    return said_of(attempt), tasks[0], private, channel.marker, attempt.corrected_at


def test_the_gate_passes_a_clean_set_and_catches_every_planted_leak(tmp_path):
    said, task, private, marker, corrected = clean(tmp_path)
    at = max(place for place, each in enumerate(said) if each.role == "assistant" and each.turn in corrected)
    criterion = task.criteria[0]

    def kinds(messages, used=task, **more):
        found = leaks_of(messages, used, private, [marker], corrected_at=corrected, **more)
        return {leak.kind for leak in found}

    assert kinds(said) == set()

    def planted(text):
        return [*said[:at], replace(said[at], text=f"{said[at].text}\n{text}"), *said[at + 1 :]]

    assert "structural" in kinds(planted(f"as {marker} says"))
    assert "structural" in kinds(planted(private[-1].split("]")[1]))
    assert kinds(planted("The rubric wants more.")) == {"vocabulary"}
    assert kinds(planted("I noticed that the grader would object.")) == {"vocabulary"}
    words = criterion.match_criteria.split()
    assert "copied" in kinds(planted(" ".join(words[:14])), longest_copy=12)
    assert kinds(planted("Also AB-4471-X holds for Zebulon Quartermain.")) == {"clairvoyant"}
    early = [*said[:2], Said("assistant", f"I expect {criterion.expect['value']} here.", 0), *said[2:]]
    assert "clairvoyant" in kinds(early)
    names = [f"{n:02d}.txt" for n in range(1, 9)]
    listing = Said("user", "\n".join(f"documents/{name}" for name in names), -1)
    decisive = replace(task, criteria=(replace(criterion, sources=("05.txt", "07.txt")),))

    def reading(order):
        return [said[0], listing, *(Said("tool", "text", n, name) for n, name in enumerate(order))]

    jump = ["05.txt", "07.txt", *names[:4], "06.txt", "08.txt"]
    assert kinds(reading(names), decisive) == set()
    assert kinds(reading(jump), decisive) == {"order"}
    assert kinds(reading(jump), decisive, usual_order=jump) == set()  # an unprivileged run reads so too


def test_words_that_the_documents_use_are_no_leak(tmp_path):
    said, task, private, marker, _ = clean(tmp_path)
    told = [*said[:-1], Said("tool", "The judge gave her feedback.", 90), Said("assistant", "The judge spoke.", 91)]
    assert leaks_of(told, task, private, [marker]) == []
    assert leaks_of([*said, Said("assistant", "The judge spoke.", 91)], task, private, [marker])[0].what == "judge"


def test_the_report_counts_rollouts_and_the_meter_is_a_mean():
    leak = leaks_of([Said("system", "", -1), Said("user", "", -1), Said("assistant", "the rubric, the rubric", 0)],
                    _task(), [], [])  # fmt: skip
    report = LeakReport(("a", "b"), {"a": leak, "b": []}, {"a": {"3": 0.5}})
    assert report.clean == ["b"]
    assert report.counts()["vocabulary"] == 1
    assert json.loads(json.dumps(report.to_json()))["leaks"]["a"][0]["what"] == "rubric"
    assert privilege([-1.0, -2.0], [-2.0, -4.0]) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="no span"):
        privilege([-1.0], [])


def _task():
    return SimpleNamespace(criteria=(Criterion("C-1", "title", "match"),))


def test_attempts_of_a_task_and_rounds_have_seeds_of_their_own(tmp_path):
    tasks = matters(tmp_path / "lab", (1,))
    attempts = collect(tmp_path / "round", tasks, IsftConfig(rollouts=2, private="none"))
    assert [read_run(each.folder)[0]["config"]["seed"] for each in attempts] == [1000, 1001]


def test_an_attempt_is_kept_if_every_grading_passes_all(tmp_path):

    def fails(rollouts):
        return [SimpleNamespace(pass_rate=0.5, all_pass=False, verdicts=()) for _ in rollouts]

    tasks = matters(tmp_path / "lab", (1,))
    graders = [exact()[0], fails]
    made = Collector(scripted_teacher(tasks), tiny_agent_tokenizer(), RUN, IsftConfig(rollouts=1), graders, tmp_path, 1)
    (attempt,) = made.collect(tasks)
    assert (attempt.all_pass, attempt.kept) == ([True, False], False)
