"""LoRA adapters in both places where they matter: the loop on rows, and rollouts. Skipped where peft is missing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from agent_cases import tiny_agent
from test_train_loop import rows, trainer
from trainer_cases import RUN, exact, matters

from still import models
from still.harness.trainers.config import GrpoConfig, TrainSettings
from still.harness.trainers.grpo import run_grpo
from still.harness.trainers.setup import make_module
from still.harness.trainers.weights import add_adapter, digest, load_weights

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
SETTINGS = TrainSettings(train_policy="lora", lora_rank=4, lr=1e-2, save_every=1, micro_tokens=4000)


def adapted():
    """A module with a fresh adapter."""
    return make_module(tiny_agent(layers=1), None, SETTINGS)[0]


def test_an_adapter_alone_trains_is_saved_and_is_gone_on_with(tmp_path):
    assert digest(adapted()) == digest(adapted())  # whatever was drawn before
    whole = trainer(tmp_path / "whole", module=adapted(), lr=1e-2)
    base = {name: p.clone() for name, p in whole.module.policy.named_parameters() if not p.requires_grad}
    whole.fit()
    after = dict(whole.module.policy.named_parameters())
    assert all("lora" in name for name, p in after.items() if p.requires_grad)
    assert all((after[name] == p).all() for name, p in base.items())
    log = [json.loads(line)["nll"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert log[-1] < log[0]
    saved = tmp_path / "whole" / "checkpoint-6" / "policy"
    assert not (saved / "model.safetensors").exists()

    cut = trainer(tmp_path / "cut", module=adapted(), lr=1e-2)
    cut.args.max_steps = 4
    cut.fit()
    again = trainer(tmp_path / "cut", module=adapted(), lr=1e-2)
    again.fit()
    assert digest(again.module) == digest(whole.module) != digest(adapted())

    other = adapted()
    load_weights(other, tmp_path / "whole" / "checkpoint-6")
    by_peft = peft.PeftModel.from_pretrained(tiny_agent(layers=1).model, saved)
    ids = torch.tensor([rows()[0].input_ids])
    with torch.no_grad():
        wanted = whole.module.eval().policy(ids).logits
        for each in (other.policy, by_peft):
            assert torch.allclose(each.eval()(ids).logits, wanted, atol=1e-6)


def test_rollouts_are_played_with_the_adapter_that_trains(tmp_path):
    config = GrpoConfig(steps=2, tasks_per_step=1, group=2, reward="random", length_cut=1.0, ask=False)
    run = replace(RUN, max_new_tokens=12)
    run_grpo(matters(tmp_path / "lab", (1,)), (), tiny_agent(layers=1), run, config, SETTINGS, tmp_path / "run",
             *exact(), report=lambda _: None)  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["gap"] < 1e-4 for line in log] == [True, True]
    assert (tmp_path / "run" / "trained" / "policy" / "adapter_model.safetensors").is_file()


def test_adapters_of_a_bf16_model_train_in_fp32():
    loaded = tiny_agent(layers=1)
    loaded.model.bfloat16()
    module, _ = make_module(loaded, None, SETTINGS)
    assert {p.dtype for p in module.policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.policy.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_an_adapter_of_a_named_model_is_loaded_over_it(tmp_path):
    loaded = models.load("pocket-agent", device="cpu")
    ids = torch.tensor([[5, 9, 300, 41]])
    adapted = add_adapter(loaded.model, 4)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    adapted.save_pretrained(tmp_path / "policy")
    with torch.no_grad():
        wanted = adapted.eval()(ids).logits
        again = models.load(str(tmp_path / "policy"), device="cpu")
        assert torch.allclose(again.model(ids).logits, wanted, atol=1e-4)
        assert not torch.allclose(models.load("pocket-agent", device="cpu").model(ids).logits, wanted, atol=1e-2)
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    config = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == loaded.name
    (tmp_path / "policy" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone"}))
    with pytest.raises(FileNotFoundError, match="is an adapter of gone, and"):
        models.load(str(tmp_path / "policy"), device="cpu")
