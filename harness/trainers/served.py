"""Rollouts from a vLLM server that holds this run's weights: written to a folder, and loaded there.

    VLLM_SERVER_DEV_MODE=1 vllm serve POLICY --served-model-name policy                                # whole weights
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve POLICY --served-model-name policy --enable-lora      # an adapter
    still grpo ... --policy POLICY --rollouts server:policy --base-url http://localhost:8000/v1

Server and trainer share a file system. Whole weights are loaded in place and the server's prefix cache is emptied; an
adapter is loaded under a name of its own each time, so that nothing cached for another one fits it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from uuid import uuid4

import torch

from ..policies.local import LocalPolicy
from ..policies.server import ServerConfig
from ..policies.token_server import TokenServerPolicy
from .loop import agreed, barrier, world
from .sharding import gather, whole_state

PROBE = "The parties agree as follows: the term begins on the first day of March and ends after three years."
FAR = 0.1
"""Nats a token between the server's log-probabilities and ours at which it serves another model: bf16 is at 0.02."""
BEHIND = 0.02
"""Share of the way that the weights have gone since the first load by which the server may be off."""


@dataclass
class ServedRollouts:
    """Makes the policy that plays a step: on the server, with the weights as they are here.

    Args:
        server: the vLLM server and the model's name there.
        folder: where weights are written for it.

    Attributes:
        name: under which the server has the weights now.
    """

    server: ServerConfig
    folder: Path
    name: str = ""
    _first: tuple[torch.Tensor, float] | None = field(default=None, repr=False)

    def __call__(self, loaded: Any, window: int | None) -> TokenServerPolicy:
        """Load the weights there, and give the policy; every process calls this, and one of them loads.

        Raises:
            ValueError: the server is not there, does not take weights, or serves another model.
        """
        here, model = LocalPolicy(loaded, window), loaded.model
        adapter, before = hasattr(model, "peft_config"), self.name
        self.name = f"{self.server.model}-{uuid4().hex[:8]}" if adapter else self.server.model
        self.name = agreed(self.name)
        policy = TokenServerPolicy(replace(self.server, model=self.name, window=here.window), loaded.tokenizer)
        policy.name, policy.bytes_per_token, policy.ends = self.server.model, here.bytes_per_token, here.ends
        state = whole_state(model)  # of shards, which every process has some of
        gather(model)
        if world()[0] == 0:
            place = self.folder / self.name
            shutil.rmtree(place, ignore_errors=True)
            model.save_pretrained(place, state_dict=state)
            self._load_adapter(place, before) if adapter else self._load_whole(place)
            self._check(policy, model)
            for old in self.folder.iterdir():  # an adapter stays for as long as it plays: vLLM may read it again
                if not adapter or old != place:
                    shutil.rmtree(old)
        barrier()
        return policy

    def _load_whole(self, place: Path) -> None:
        root = str(self.server.base_url).rstrip("/").removesuffix("/v1")
        mend = "start vLLM with VLLM_SERVER_DEV_MODE=1, or train an adapter (--train-policy lora)"
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(place.resolve())}}
        self._post(f"{root}/collective_rpc", call, mend)
        self._post(f"{root}/reset_prefix_cache", {}, mend)

    def _load_adapter(self, place: Path, before: str) -> None:
        address = str(self.server.base_url).rstrip("/")
        mend = "start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and a --max-lora-rank that fits"
        call = {"lora_name": self.name, "lora_path": str(place.resolve())}
        self._post(f"{address}/load_lora_adapter", call, mend)
        if before:
            self._post(f"{address}/unload_lora_adapter", {"lora_name": before}, mend)

    def _post(self, url: str, body: dict[str, Any], mend: str) -> None:
        asked = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(asked, timeout=self.server.timeout):
                pass
        except HTTPError as problem:
            said = problem.read(500).decode(errors="replace")
            mend = f"; {mend}" if problem.code == 404 else ""
            raise ValueError(f"{url} answered {problem.code} {said}{mend}") from problem
        except OSError as problem:
            raise ValueError(f"{url} does not answer ({problem}): is the server running there?") from problem

    @torch.no_grad()
    def _check(self, policy: TokenServerPolicy, model: Any) -> None:
        """Refuse a server whose log-probabilities of a sentence are not those of the weights that it was given."""
        ids = policy.tokenizer.encode(PROBE, add_special_tokens=False)
        reply = policy.client.completions.create(
            model=policy.config.model, prompt=ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        found = getattr(reply.choices[0], "prompt_logprobs", None)
        if not found:
            raise ValueError(f"the server of {policy.name} gave no prompt_logprobs: rollouts need a vLLM server")
        theirs = torch.tensor([each[str(token)]["logprob"] for token, each in zip(ids[1:], found[1:], strict=True)])
        training = model.training
        logits = model.eval()(input_ids=torch.tensor([ids], device=model.device)).logits[0, :-1].float().cpu()
        model.train(training)
        ours = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        apart = (theirs - ours).abs().mean().item()
        if not apart <= FAR:
            raise ValueError(
                f"the server's {policy.name} is {apart:.3g} nats a token apart from the weights that were just loaded "
                f"there: it serves another model, or leaves a part of it out (vllm serve --model-impl transformers)"
            )
        self._first = first, noise = self._first or (ours, apart)
        moved = (ours - first).abs().mean().item()
        if apart > 3 * noise + BEHIND * moved:
            raise ValueError(
                f"the server's {policy.name} does not follow the weights: they have moved by {moved:.3g} nats a token, "
                f"and it is {apart:.3g} apart, {noise:.3g} at first. On CPUs vLLM packs the head of a model with tied "
                f"embeddings once and for all: train an adapter (--train-policy lora)"
            )
