"""Rollouts from a server that is given the weights: over real HTTP, with a second copy of a tiny model behind it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from agent_cases import of, tiny_agent
from safetensors.torch import load_file
from test_policies import Handler, Server
from trainer_cases import RUN, exact, matters

from still.cli import main
from still.harness.policies.server import ServerConfig
from still.harness.runs import read_run
from still.harness.trainers.config import GrpoConfig, TrainSettings
from still.harness.trainers.grpo import run_grpo
from still.harness.trainers.served import ServedRollouts

SETTINGS = TrainSettings(lr=1e-3, save_every=1, micro_tokens=4000)
CONFIG = GrpoConfig(steps=3, tasks_per_step=1, group=2, reward="random", length_cut=1.0, ask=False)


class Vllm(Handler):
    """The endpoints of a vLLM server through which its weights are exchanged; what it knows besides is a real model."""

    def reply(self, body):
        if self.path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            state = self.load(body["kwargs"]["weights_path"])
            self.server.loaded.model.load_state_dict(state, strict=False)
            return {}
        if self.path == "/reset_prefix_cache":
            self.server.emptied = True
            return {}
        if self.path.endswith("_lora_adapter"):
            self.server.adapters = [*getattr(self.server, "adapters", []), (self.path[4:], body["lora_name"])]
            if "lora_path" in body:
                self.adapt(body["lora_path"])
            return {}
        reply = super().reply(body)
        if "prompt_logprobs" in body:
            reply["choices"][0]["prompt_logprobs"] = self.scores(body["prompt"])
        return reply

    def load(self, place):
        return load_file(f"{place}/model.safetensors")

    def adapt(self, place):
        peft = pytest.importorskip("peft")
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(self.server.bare), place).eval()
        self.server.loaded = replace(self.server.loaded, model=adapted)

    @torch.no_grad()
    def scores(self, ids):
        found = self.server.loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [None, *({str(t): {"logprob": float(found[i, t])}} for i, t in enumerate(ids[1:]))]


@pytest.fixture
def server():
    with Server(loaded=copy.deepcopy(tiny_agent(layers=1)), handler=Vllm) as server:
        server.bare = copy.deepcopy(server.loaded.model)
        yield server
        server.shutdown()


def served(server, folder):
    return ServedRollouts(ServerConfig("policy", server.url), folder / "served")


def grpo(root, tasks, server, settings=SETTINGS, config=CONFIG):
    run = replace(RUN, max_new_tokens=12)
    run_grpo(tasks, (), tiny_agent(layers=1), run, config, settings, root, exact()[0], exact()[1],
             report=lambda _: None, policy_of=served(server, root))  # fmt: skip
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_played_with_the_weights_that_it_trains(tmp_path, server):
    log = grpo(tmp_path / "run", matters(tmp_path / "lab", (1,)), server)
    assert [line["gap"] < 1e-4 for line in log] == [True] * 3  # a stale server would be further off: lr is 1e-3
    assert server.emptied
    for number in range(3):
        for path in (tmp_path / "run" / "rollouts" / f"step-{number:04d}").rglob("events.jsonl"):
            assert {turn["version"] for turn in of(read_run(path.parent), "turn")} == {number}
    assert not list((tmp_path / "run" / "served").iterdir())


def test_a_step_that_draws_again_loads_its_weights_once(tmp_path, server):
    config = replace(CONFIG, steps=1, refill=1, reward="rubric")
    with pytest.raises(ValueError, match=r"no group of step 0 has any variance \(2 with equal rewards"):
        grpo(tmp_path / "run", matters(tmp_path / "lab"), server, config=config)
    assert sum(body.get("method") == "reload_weights" for body in server.requests) == 1


def test_an_adapter_is_loaded_under_a_name_of_its_own_each_time(tmp_path, server):
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    settings = replace(SETTINGS, train_policy="lora", lora_rank=4, lr=1e-2)
    log = grpo(tmp_path / "run", matters(tmp_path / "lab", (1,)), server, settings, replace(CONFIG, steps=2))
    assert [line["gap"] < 1e-4 for line in log] == [True] * 2
    (load, first), (again, second), (unload, gone) = server.adapters
    assert (load, again, unload) == ("load_lora_adapter", "load_lora_adapter", "unload_lora_adapter")
    assert gone == first != second
    assert {body["model"] for body in server.requests if "prompt" in body} == {first, second}
    assert [place.name for place in (tmp_path / "run" / "served").iterdir()] == [second]


def test_a_server_that_keeps_a_part_of_the_old_weights_is_found(tmp_path, server, monkeypatch):
    loaded, rollouts = tiny_agent(layers=1), served(server, tmp_path)
    rollouts(loaded, 512)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(1e-3)
    rollouts(loaded, 512)
    load = Vllm.load

    def all_but_the_norm(self, place):
        state = load(self, place)
        return {name: tensor for name, tensor in state.items() if not name.endswith("model.norm.weight")}

    monkeypatch.setattr(Vllm, "load", all_but_the_norm)
    with torch.no_grad():
        loaded.model.model.norm.weight.add_(0.01)
    with pytest.raises(ValueError, match="does not follow the weights"):
        rollouts(loaded, 512)


def test_another_model_a_server_that_takes_no_weights_and_none_at_all_are_refused(tmp_path, server, monkeypatch):
    loaded = tiny_agent(layers=1)
    monkeypatch.setattr(Vllm, "scores", lambda self, ids: [None, *({str(t): {"logprob": -9.0}} for t in ids[1:])])
    with pytest.raises(ValueError, match=r"nats a token apart .* serves another model"):
        served(server, tmp_path)(loaded, 512)
    monkeypatch.setattr(Vllm, "scores", lambda self, ids: None)
    with pytest.raises(ValueError, match="gave no prompt_logprobs"):
        served(server, tmp_path)(loaded, 512)
    monkeypatch.setattr(Vllm, "do_POST", lambda self: self.answer(404, {"detail": "Not Found"}))
    with pytest.raises(ValueError, match=r"answered 404 .* VLLM_SERVER_DEV_MODE=1"):
        served(server, tmp_path)(loaded, 512)
    with pytest.raises(ValueError, match="does not answer"):
        ServedRollouts(ServerConfig("policy", "http://127.0.0.1:9/v1"), tmp_path)(loaded, 512)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--rollouts vllm", "it is local, or server:NAME"),
        ("--rollouts server:x", "no --base-url says where"),
        ("--rollouts server:x --base-url http://127.0.0.1:9/v1 --backend kv", "leave --rollouts local"),
        ("--rollouts server:x --base-url http://127.0.0.1:9/v1 --rollout-temperature 0.7", "temperature is 0.7"),
    ],
)
def test_what_a_server_cannot_play_is_refused(tmp_path, capsys, flags, said):
    matters(tmp_path / "lab", (1,))
    common = ["--policy", "pocket-agent", "--backend", "memo", "--budget", "64t", "-o", str(tmp_path / "run")]
    assert main(["grpo", str(tmp_path / "lab"), *common, *flags.split()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
