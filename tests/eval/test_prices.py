from __future__ import annotations

import asyncio

import pytest

from still.eval.prices import Budget, BudgetEnded, Price, Prices
from still.eval.verdicts import Tokens


def test_cached_uncached_written_and_output_tokens_have_prices_of_their_own():
    price = Price(input=3.0, output=15.0, cached=0.3, cache_write=3.75)
    tokens = Tokens(input=10_000, cached=6_000, cache_write=1_000, output=200)
    assert price.of(tokens) == pytest.approx((3_000 * 3 + 6_000 * 0.3 + 1_000 * 3.75 + 200 * 15) / 1e6)
    assert Price(3.0, 15.0).of(tokens) == pytest.approx((10_000 * 3 + 200 * 15) / 1e6)


def test_the_table_is_found_by_name_and_dated_family_and_nothing_is_guessed():
    prices = Prices()
    assert prices.find("claude-sonnet-4-6").input == 3.0
    assert prices.find("claude-sonnet-4-6-20260217") == prices.find("claude-sonnet-4-6")
    assert prices.find("gpt-5.5-2026-04-01") == prices.find("gpt-5.5")
    assert prices.find("gpt-5.5-mini") is None
    assert prices.find("my-model") is None


def test_the_users_table_is_added_and_wins(tmp_path):
    file = tmp_path / "prices.toml"
    file.write_text('["gpt-5.5"]\ninput = 1\noutput = 2\n[my-model]\ninput = 0\noutput = 0\n')
    prices = Prices.load(file)
    assert prices.find("gpt-5.5") == Price(1, 2)
    assert prices.find("my-model").of(Tokens(10, output=10)) == 0
    assert prices.find("claude-opus-4-8").output == 25.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[m]\ninput = 1\n", "'m'"),
        ("[m]\ninput = 1\noutput = 2\nreasoning = 3\n", "'m'"),
        ("[m]\ninput = -1\noutput = 2\n", "0 or more"),
        ("[m]\ninput = 'x'\noutput = 2\n", "0 or more"),
        ("m = 1", "'m'"),
        ("[m", "no TOML"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path, text, message):
    file = tmp_path / "prices.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        Prices.load(file)


def test_a_budget_never_lets_in_what_might_go_over_it():
    async def main():
        budget, calls = Budget(tokens=1000), 0

        async def call():
            nonlocal calls
            await budget.hold(200, 0.0)
            calls += 1
            await asyncio.sleep(0)
            budget.settle(200, 0.0, Tokens(input=100, output=20), None)

        ended = await asyncio.gather(*(call() for _ in range(20)), return_exceptions=True)
        return budget, calls, [each for each in ended if each]

    budget, calls, ended = asyncio.run(main())
    assert calls == 7
    assert budget.spent_tokens == 840
    assert len(ended) == 13
    assert all(isinstance(each, BudgetEnded) for each in ended)
    assert "840 of 1,000 tokens" in str(ended[0])


def test_calls_under_way_are_waited_for_before_a_budget_ends():
    async def main():
        budget = Budget(dollars=1.0)
        await budget.hold(0, 0.9)
        second = asyncio.create_task(budget.hold(0, 0.9))
        await asyncio.sleep(0.01)
        assert not second.done()
        budget.settle(0, 0.9, Tokens(), 0.05)
        await second
        budget.settle(0, 0.9, Tokens(), 0.9)
        with pytest.raises(BudgetEnded, match=r"\$0.9500 of \$1 spent"):
            await budget.hold(0, 0.9)

    asyncio.run(main())


@pytest.mark.parametrize("limits", [{"dollars": 0}, {"dollars": -1}, {"tokens": 0}])
def test_a_budget_of_nothing_is_a_mistake(limits):
    with pytest.raises(ValueError, match="more than 0"):
        Budget(**limits)
