from __future__ import annotations

import asyncio

import pytest
from judge_server import JudgeServer, make_task

from still.eval.grade import GradeConfig, Grader
from still.eval.judges import ExactJudge, JudgeConfig, find_judge, load_judges

pytest.importorskip("openai")


@pytest.mark.parametrize(
    ("name", "place", "variable"),
    [
        ("gpt-5.5", "api.openai.com", "OPENAI_API_KEY"),
        ("claude-sonnet-4-6", "api.anthropic.com", "ANTHROPIC_API_KEY"),
        ("gemini-3.1-pro", "generativelanguage.googleapis.com", "GEMINI_API_KEY"),
        ("mistral-large", "api.mistral.ai", "MISTRAL_API_KEY"),
        ("deepseek-v4-flash", "api.deepseek.com", "DEEPSEEK_API_KEY"),
    ],
)
def test_models_of_known_providers_are_found_by_name(monkeypatch, name, place, variable):
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match=variable):
        find_judge(name)
    monkeypatch.setenv(variable, "secret")
    judge = find_judge(name)
    assert place in judge.config.base_url
    assert judge.name == judge.config.model == name
    assert "secret" not in repr(judge.identity()) + repr(judge.config)


def test_a_server_of_ones_own_needs_no_key_and_takes_one(monkeypatch):
    monkeypatch.delenv("STILL_JUDGE_API_KEY", raising=False)
    assert find_judge("m@https://judge.internal/v1").config.api_key_env == ""
    monkeypatch.setenv("STILL_JUDGE_API_KEY", "k")
    assert find_judge("m@https://judge.internal/v1").config.api_key_env == "STILL_JUDGE_API_KEY"
    judge = find_judge("Qwen/Qwen3-32B@http://localhost:8000/v1")
    assert (judge.name, judge.config.base_url) == ("Qwen/Qwen3-32B", "http://localhost:8000/v1")
    assert isinstance(find_judge("exact"), ExactJudge)


def test_an_unknown_name_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"no judge is called 'oracle'.*exact.*gpt-"):
        find_judge("oracle")
    config = JudgeConfig("mine", "m", "http://h/v1")
    with pytest.raises(ValueError, match="your table: mine"):
        find_judge("oracle", {"mine": config})
    assert find_judge("mine", {"mine": config}).config == config


def test_a_table_of_judges(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    file = tmp_path / "judges.toml"
    file.write_text(
        '[cheap]\nmodel = "m"\nbase_url = "http://h/v1"\nmax_tokens = 500\nrequests_per_minute = 60\n'
        'extra = {reasoning_effort = "low"}\n[strong]\nmodel = "gpt-5.5"\nconcurrency = 4\n'
    )
    table = load_judges(file)
    assert table["cheap"].extra == {"reasoning_effort": "low"}
    assert (table["strong"].base_url, table["strong"].concurrency) == ("https://api.openai.com/v1", 4)
    assert find_judge("strong", table).name == "strong"


def test_a_table_wants_the_keys_of_those_judges_alone_that_are_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    (tmp_path / "judges.toml").write_text("[one]\nmodel = 'gpt-5.5'\n[other]\nmodel = 'claude-sonnet-4-6'\n")
    table = load_judges(tmp_path / "judges.toml")
    assert find_judge("one", table).config.model == "gpt-5.5"
    with pytest.raises(ValueError, match="ANTHROPIC_API_KEY"):
        find_judge("other", table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nbase_url = 'http://h'", "needs a table with a model"),
        ("[a]\nmodel = 'm'\nbase_url = 'http://h'\nkey = 'x'", r"unknown settings \['key'\]"),
        ("[a]\nmodel = 'm'\nbase_url = 'h'", "write http"),
        ("[a]\nmodel = 'm'\nbase_url = 'http://me:secret@h/v1'", "carries a secret"),
        ("[a]\nmodel = 'm'\nbase_url = 'http://h/v1?key=secret'", "carries a secret"),
        ("[a]\nmodel = 'm'\nbase_url = 'http://h'\nstructured = 'yes'", "structured 'yes'"),
        ("[a]\nmodel = 'm'\nbase_url = 'http://h'\nconcurrency = 0", "concurrency"),
        ("[a]\nmodel = 'm'\nbase_url = 'http://h'\nconcurrency = '8'", "concurrency '8'; it is a whole number"),
        ("[a]\nmodel = 'm'\nbase_url = 'http://h'\ntimeout = true", "timeout True; it is a number"),
        ("[a]\nmodel = 7\nbase_url = 'http://h'", "model 7; it is a text"),
        ("[a]\nmodel = 'm'\nbase_url = 'http://h'\nextra = 'x'", "extra 'x'; it is a table"),
        ("[a]\nmodel = 'unheard-of'", "no judge is called 'unheard-of'"),
        ("[a", "no TOML"),
    ],
)
def test_a_table_that_cannot_work_is_refused(tmp_path, text, message):
    file = tmp_path / "judges.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as problem:
        load_judges(file)
    assert "secret@" not in str(problem.value)
    assert "=secret" not in str(problem.value)


def test_what_is_sent_is_what_the_config_says():
    with JudgeServer() as server:

        async def ask(**settings):
            from still.eval.client import OpenAIJudge

            judge = OpenAIJudge(JudgeConfig("j", "model-7", server.url, **settings))
            async with Grader(judge, GradeConfig()) as grader:
                return await grader.grade(make_task(1), {"a.md": "text"})

        grading = asyncio.run(ask(max_tokens=99, extra={"reasoning_effort": "low"}, cache_marks=True))
        asyncio.run(ask(temperature=None, structured="none"))
    first, second = (each.body for each in server.log)
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("model-7", 0.0, 99)
    assert first["reasoning_effort"] == "low"
    assert first["response_format"]["json_schema"]["strict"] is True
    assert first["messages"][-1]["content"][0]["cache_control"] == {"type": "ephemeral"}
    assert {"temperature", "max_tokens", "response_format"} & second.keys() == set()
    assert grading.verdicts[0].tokens.input == 100


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 50, "completion_tokens": 7}, (50, 0, 0, 7, 0)),
        (
            {"prompt_tokens": 50, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 40},
             "completion_tokens_details": {"reasoning_tokens": 3}},
            (50, 40, 0, 7, 3),
        ),
        ({"prompt_tokens": 50, "completion_tokens": 7, "prompt_cache_hit_tokens": 30}, (50, 30, 0, 7, 0)),
        (
            {"prompt_tokens": 50, "completion_tokens": 7, "cache_read_input_tokens": 8,
             "cache_creation_input_tokens": 9},
            (50, 8, 9, 7, 0),
        ),
        (
            {"prompt_tokens": 50, "completion_tokens": 7, "cache_read_input_tokens": 900,
             "cache_creation_input_tokens": 9},
            (959, 900, 9, 7, 0),
        ),
        (None, (0, 0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_tokens_are_read_under_every_providers_names(usage, counts):
    from judge_server import Answer, verdicts

    from still.eval.client import OpenAIJudge

    async def ask(url):
        async with Grader(OpenAIJudge(JudgeConfig("j", "m", url))) as grader:
            return await grader.grade(make_task(1), {"a.md": "text"})

    with JudgeServer(lambda asked: Answer(verdicts(asked.ids), usage=usage)) as server:
        tokens = asyncio.run(ask(server.url)).verdicts[0].tokens
    assert (tokens.input, tokens.cached, tokens.cache_write, tokens.output, tokens.reasoning) == counts


def test_one_judge_serves_several_event_loops():
    with JudgeServer() as server:
        judge = find_judge(f"m@{server.url}")

        async def once(prefix):
            grader = Grader(judge)
            grading = await grader.grade(make_task(3, prefix), {"a.md": "text"})
            await grader.aclose()
            return grading.n_unscored

        assert [asyncio.run(once(f"C-{number}-")) for number in range(3)] == [0, 0, 0]
