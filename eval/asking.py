"""One judge put to work: criteria to calls, answers to verdicts, and every verdict to the cache as it comes.

What an answer leaves open is asked again, only that, with a word on what was wrong at the end of the prompt, where it
does not disturb the prefix; criteria whose answer was of no use at all are asked again in halves. What stays open is
unscored.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .answers import Answer, Said, parse_answer
from .deliverables import Sheet
from .judges import Judge, JudgeError, Reply
from .lanes import Lane, Retry
from .prices import Budget, BudgetEnded, Price
from .prompting import Prompt, messages
from .tasks import Criterion
from .verdict_store import Kept, VerdictStore, verdict_key
from .verdicts import CriterionVerdict, State, Tokens

_UNSCORED: dict[str, State] = {"refused": "refused", "rejected": "rejected", "fatal": "stopped"}
_UNANSWERED = ("throttled", "transient")
_HOPELESS, _SILENT, _RECONSIDER = 8, 5, 60.0
"""Calls given up, or time-outs one after another (by then the lane has narrowed from 8 calls to one), before a server
that never answered is left alone, and seconds until it is tried again."""
_OUTPUT = 400  # tokens that a verdict is taken to need until the judge has shown what it needs


@dataclass
class Ledger:
    """What a run asked of a judge and what that cost.

    Attributes:
        fresh: tokens of this run's calls, those of answers that were of no use included.
        reused: tokens that verdicts from the cache had cost when they were made.
        dollars: for the fresh ones; None where the price is unknown.
        verdicts: given in this run by calls.
        cached: given by the cache.
        troubles: calls that failed, by kind, and answers of no use ("malformed").
        stopped: why calls were no longer made, or "".
    """

    fresh: Tokens = field(default_factory=Tokens)
    reused: Tokens = field(default_factory=Tokens)
    dollars: float | None = 0.0
    verdicts: int = 0
    cached: int = 0
    troubles: Counter[str] = field(default_factory=Counter)
    stopped: str = ""

    def record(self) -> dict[str, Any]:
        """For result files."""
        return {
            "tokens": asdict(self.fresh),
            "reused_tokens": asdict(self.reused),
            "cost": self.dollars,
            "fresh_verdicts": self.verdicts,
            "cached_verdicts": self.cached,
            "troubles": dict(self.troubles),
        }


@dataclass(frozen=True)
class Batch:
    """Criteria that go into one call.

    Attributes:
        sheet: the files that they are judged on.
        system, shared: the beginning of the prompt, the same for every batch on the sheet.
        base: what their verdicts depend on besides the criterion and the seed.
        ledger: where the run counts what this judge cost it.
        criteria: in the order in which they are asked.
        seed: of that order; None is the rubric's.
    """

    sheet: Sheet
    system: str
    shared: str
    base: str
    ledger: Ledger
    criteria: tuple[Criterion, ...]
    seed: int | None = None


class Asker:
    """A judge with its lane, its price and its cache.

    Args:
        judge: one that reads prompts.
        prompt: the one that it reads.
        lane: shared by all judges of a provider.
        store: where verdicts are kept.
        budget: shared by all judges of a run.
        price: None where it is unknown.
        reasks: how often what an answer left open is asked again.
        retry: when a call is given up.
    """

    def __init__(
        self,
        judge: Judge,
        prompt: Prompt,
        lane: Lane,
        store: VerdictStore,
        budget: Budget,
        price: Price | None,
        reasks: int = 2,
        retry: Retry | None = None,
    ):
        self.judge, self.prompt, self.lane, self.store = judge, prompt, lane, store
        self.budget, self.price, self.reasks, self.retry = budget, price, reasks, retry or Retry()
        self.stopped = ""
        self._stopped_until = math.inf
        self._answered, self._given_up = False, 0
        self._silence = self._silent_until = 0.0  # seconds in which no call was under way but those that failed
        self._output = _OUTPUT
        config = getattr(judge, "config", None)
        self._cache_marks = bool(config and config.cache_marks)
        self._timeout = config.timeout if config else math.inf

    def find(self, batch: Batch, criterion: Criterion) -> CriterionVerdict | None:
        """The cached verdict, or None."""
        kept = self.store.get(self._key(batch, criterion))
        if kept is None:
            return None
        batch.ledger.cached += 1
        batch.ledger.reused += kept.tokens
        return self._verdict(batch, criterion, kept, cached=True)

    async def ask(self, batch: Batch, told: Callable[[CriterionVerdict], None]) -> dict[str, CriterionVerdict]:
        """Judge a batch; every criterion gets a verdict, "unscored" where nothing else can be said.

        Args:
            batch: criteria that are not in the cache.
            told: called with each verdict as soon as it is final.
        """
        return await self._ask(batch, batch.criteria, self.reasks, (), told)

    async def _ask(
        self,
        batch: Batch,
        criteria: Sequence[Criterion],
        reasks: int,
        problems: Sequence[str],
        told: Callable[[CriterionVerdict], None],
    ) -> dict[str, CriterionVerdict]:
        state: State = "malformed"
        answer, tokens = Answer({}), Tokens()
        try:
            reply = await self._call(batch, criteria, problems)
            answer, tokens = self._read(batch, reply, criteria), reply.tokens
            reason = "; ".join(answer.problems)
        except BudgetEnded as ended:
            state, reason, reasks = "stopped", str(ended), 0
        except JudgeError as trouble:
            state, reason = _UNSCORED.get(trouble.trouble, "error"), str(trouble)
            reasks = reasks if state == "refused" else 0
        found = self._commit(batch, criteria, answer.said, tokens)
        for verdict in found.values():
            told(verdict)
        left = [each for each in criteria if each.id not in found]
        if left and reasks:
            split = len(left) if found else (len(left) + 1) // 2
            parts = [left[start : start + split] for start in range(0, len(left), split)]
            for more in await asyncio.gather(
                *(self._ask(batch, part, reasks - 1, answer.problems[:5], told) for part in parts)
            ):
                found |= more
            return found
        if state == "stopped":
            batch.ledger.stopped = reason
        for each in left:
            found[each.id] = CriterionVerdict(
                each.id, each.title, "unscored", reason, judge=self.judge.name, state=state, cost=0.0, seed=batch.seed
            )
            told(found[each.id])
        return found

    async def _call(self, batch: Batch, criteria: Sequence[Criterion], problems: Sequence[str]) -> Reply:
        """One answer, through lane and budget.

        Raises:
            JudgeError: there is none.
            BudgetEnded: it might go over the budget.
        """
        question = self.prompt.question(criteria)
        if problems:
            question += f"\nYour last answer could not be used: {'; '.join(problems)}. Answer again, with JSON alone.\n"
        characters = len(batch.system) + len(batch.shared) + len(question)

        estimate = Tokens(input=characters // 3, output=self._output * len(criteria))
        spent, cost = Tokens(), 0.0

        def pay(tokens: Tokens) -> None:
            nonlocal spent, cost
            more, dollars = self._spend(batch, tokens, len(criteria), estimate)
            spent, cost = spent + more, cost + dollars

        async def attempt() -> Reply:
            if self.stopped and time.monotonic() < self._stopped_until:
                raise JudgeError("fatal", self.stopped)
            self.stopped, began = "", time.monotonic()
            try:
                chat = messages(batch.system, batch.shared, question, self._cache_marks)
                reply = await self.judge.ask(chat, self.prompt.schema)
            except JudgeError as trouble:
                batch.ledger.troubles[trouble.trouble] += 1
                if trouble.trouble == "fatal":
                    self.stopped, self._stopped_until = str(trouble), math.inf
                if trouble.tokens is not None:  # a refusal is billed like an answer
                    pay(trouble.tokens)
                self._count_silence(trouble, began)
                raise
            self._answered = True
            pay(reply.tokens)
            return reply

        held = estimate.total, self.price.of(estimate) if self.price else 0.0
        await self.budget.hold(*held)
        try:
            return await self.lane.run(attempt, estimate.total, self.retry)
        except JudgeError as trouble:
            self._count_given_up(trouble)
            raise
        finally:
            self.budget.settle(*held, spent, cost)

    def _count_silence(self, trouble: JudgeError, began: float) -> None:
        """Leave a server alone that takes calls and never answers, long before any call has had all its attempts."""
        if trouble.trouble not in _UNANSWERED:
            return
        now = time.monotonic()
        self._silence += now - max(began, self._silent_until)
        self._silent_until = now
        if self._silence >= _SILENT * self._timeout:
            self._leave_alone(f"no call was answered in {self._silence:.3g} s", trouble)

    def _count_given_up(self, trouble: JudgeError) -> None:
        """Leave a server alone that never answered: a wrong address costs a minute then, not a night."""
        if trouble.trouble not in _UNANSWERED:
            return
        self._given_up += 1
        if self._given_up >= _HOPELESS:
            self._leave_alone(f"{self._given_up} calls were given up and none was answered", trouble)

    def _leave_alone(self, why: str, trouble: JudgeError) -> None:
        if not self._answered and not self.stopped:
            self.stopped, self._stopped_until = f"{why}; the last one: {trouble}", time.monotonic() + _RECONSIDER

    def _spend(self, batch: Batch, tokens: Tokens, criteria: int, estimate: Tokens) -> tuple[Tokens, float]:
        """Count an answer, and say what the budget bears; a server that counts nothing costs what was estimated."""
        cost, known = self._cost(tokens), batch.ledger.dollars
        batch.ledger.fresh += tokens
        batch.ledger.dollars = None if cost is None or known is None else known + cost
        self._output = max(self._output, tokens.output // criteria)
        spent = tokens if tokens.input else estimate
        return spent, self._cost(spent) or 0.0

    def _cost(self, tokens: Tokens) -> float | None:
        """US dollars; None where the price is unknown, or the server did not count."""
        return self.price.of(tokens) if self.price and tokens.input else None

    def _read(self, batch: Batch, reply: Reply, criteria: Sequence[Criterion]) -> Answer:
        if reply.finish == "length":
            answer = Answer({}, ("the answer was cut off before its end; be shorter",))
        else:
            answer = parse_answer(reply.text, [each.id for each in criteria], self.prompt.is_labs)
        if answer.problems:
            batch.ledger.troubles["malformed"] += 1
        return answer

    def _commit(
        self, batch: Batch, criteria: Sequence[Criterion], said: dict[str, Said], tokens: Tokens
    ) -> dict[str, CriterionVerdict]:
        """Verdicts of one answer, in the cache before anybody hears of them."""
        judged = [each for each in criteria if each.id in said]
        if not judged:
            return {}
        kept = []
        for each, share in zip(judged, tokens.share(len(judged)), strict=True):
            one = said[each.id]
            held = [(quote, batch.sheet.holds(quote)) for quote in one.quotes]
            evidence = tuple(quote for quote, there in held if there)
            misquotes = tuple(quote for quote, there in held if not there)
            kept.append(Kept(one.label, one.reason, evidence, misquotes, self.judge.name, share))
        self.store.put((self._key(batch, each), one) for each, one in zip(judged, kept, strict=True))
        batch.ledger.verdicts += len(judged)
        return {each.id: self._verdict(batch, each, one) for each, one in zip(judged, kept, strict=True)}

    def _verdict(self, batch: Batch, criterion: Criterion, kept: Kept, cached: bool = False) -> CriterionVerdict:
        return CriterionVerdict(
            criterion.id,
            criterion.title,
            kept.label,
            kept.reason,
            kept.evidence,
            kept.misquotes,
            self.judge.name,
            cached=cached,
            tokens=kept.tokens,
            cost=self._cost(kept.tokens),
            seed=batch.seed,
        )

    def _key(self, batch: Batch, criterion: Criterion) -> bytes:
        return verdict_key(batch.base, batch.seed, criterion.id, criterion.title, criterion.match_criteria)
