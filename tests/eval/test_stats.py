from __future__ import annotations

import json
import math
import random

import pytest

from still.eval import stats


def spread(counts):
    """Values and clusters from (passes, n) per cluster."""
    values, clusters = [], []
    for cluster, (passes, n) in enumerate(counts):
        values += [1] * passes + [0] * (n - passes)
        clusters += [cluster] * n
    return values, clusters


@pytest.mark.parametrize(
    ("passes", "n", "low", "high"),
    [
        (9, 120, 0.040, 0.136),
        (32, 120, 0.196, 0.352),
        (222, 1251, 0.157, 0.200),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1),
    ],
)
def test_wilson_against_published_values(passes, n, low, high):
    interval = stats.wilson(passes, n)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))


@pytest.mark.parametrize(
    ("p", "df", "value"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 10, 2.2281),
        (0.975, 51, 2.0076),
        (0.95, 5, 2.0150),
        (0.995, 20, 2.8453),
    ],
)
def test_students_t_against_tables(p, df, value):
    assert stats.t_quantile(p, df) == pytest.approx(value, abs=5e-5)
    assert stats.t_tail(value, df) == pytest.approx(1 - p, abs=1e-5)


def test_clustered_rate_by_hand():
    # Four clusters of two: 2/2, 2/2, 1/2, 0/2. Rate 5/8; residual sums .75, .75, -.25, -1.25, squares sum to 2.75;
    # variance 4/3 * 2.75 / 64 = 0.0572917; effective size (15/64) / 0.0572917 = 4.0909; t(3) = 3.18245.
    interval = stats.clustered_rate(*spread([(2, 2), (2, 2), (1, 2), (0, 2)]))
    n, t, p = 4.090909, 3.182446, 0.625
    centre = (p + t * t / (2 * n)) / (1 + t * t / n)
    reach = t * math.sqrt(p * (1 - p) / n + t * t / (4 * n * n)) / (1 + t * t / n)
    assert interval.estimate == p
    assert interval.low == pytest.approx(centre - reach, abs=1e-6)
    assert interval.high == pytest.approx(centre + reach, abs=1e-6)
    assert (interval.n, interval.clusters) == (8, 4)


def test_design_effect_by_hand():
    # the same data: naive variance (15/64) / 8
    assert stats.design_effect(*spread([(2, 2), (2, 2), (1, 2), (0, 2)])) == pytest.approx(
        0.0572917 / (15 / 512), abs=1e-5
    )
    assert math.isnan(stats.design_effect(*spread([(2, 2), (3, 3)])))


def test_clusters_of_one_are_close_to_wilson():
    values = [1] * 70 + [0] * 30
    clustered, plain = stats.clustered_rate(values, range(100)), stats.wilson(70, 100)
    assert clustered.low == pytest.approx(plain.low, abs=0.005)
    assert clustered.high == pytest.approx(plain.high, abs=0.005)


def test_identical_members_count_once_a_cluster():
    values, clusters = spread([(10, 10)] * 14 + [(0, 10)] * 6)
    once = stats.clustered_rate([1] * 14 + [0] * 6, range(20))
    interval = stats.clustered_rate(values, clusters)
    assert interval.low == pytest.approx(once.low, abs=1e-9)
    assert stats.design_effect(values, clusters) == pytest.approx(10 * 20 / 19, abs=1e-6)


@pytest.mark.parametrize("passes", [0, 50])
def test_rates_of_zero_and_one_have_an_honest_width(passes):
    interval = stats.clustered_rate(*spread([(passes, 50)] * 20))
    independent = stats.wilson(20 * passes, 1000)
    assert 0 <= interval.low <= interval.high <= 1
    assert interval.half_width > 2 * independent.half_width
    assert interval.half_width < 0.05
    assert "5.3" in interval.method
    worst = stats.clustered_rate(*spread([(passes, 50)] * 20), assumed_design_effect=50)
    assert worst.half_width > interval.half_width
    assert (interval.low == 0) == (passes == 0)
    assert (interval.high == 1) == (passes == 50)


def test_one_cluster_says_little():
    interval = stats.clustered_rate([1, 1, 1, 0], ["a"] * 4)
    assert interval.high - interval.low > 0.9


def test_coverage_of_the_clustered_interval():
    rng = random.Random("coverage")
    hits, naive = 0, 0
    for _ in range(300):
        counts = []
        for _ in range(20):
            p = rng.betavariate(8, 2)
            counts.append((sum(rng.random() < p for _ in range(30)), 30))
        interval = stats.clustered_rate(*spread(counts))
        plain = stats.wilson(sum(passes for passes, _ in counts), 600)
        hits += interval.low <= 0.8 <= interval.high
        naive += plain.low <= 0.8 <= plain.high
    assert hits / 300 > 0.91
    assert naive / 300 < 0.80


def test_bootstrap_is_seeded_and_agrees_with_the_sandwich():
    rng = random.Random("bootstrap")
    data = spread([(rng.randrange(10, 31), 30) for _ in range(60)])
    first, again = stats.cluster_bootstrap(*data, seed=4), stats.cluster_bootstrap(*data, seed=4)
    assert first == again
    assert first != stats.cluster_bootstrap(*data, seed=5)
    robust = stats.clustered_rate(*data)
    assert first.low == pytest.approx(robust.low, abs=0.015)
    assert first.high == pytest.approx(robust.high, abs=0.015)


def test_macro_weighs_clusters_and_micro_weighs_items():
    data = spread([(90, 100), (0, 1), (1, 1)])
    assert stats.cluster_bootstrap(*data).estimate == pytest.approx(91 / 102)
    assert stats.cluster_bootstrap(*data, macro=True).estimate == pytest.approx((0.9 + 0 + 1) / 3)


def test_bootstrap_of_a_perfect_rate_is_not_a_point():
    interval = stats.cluster_bootstrap(*spread([(30, 30)] * 30))
    assert interval.high - interval.low > 0.01


@pytest.mark.parametrize("few", [2, 19])
def test_fewer_than_twenty_clusters_get_the_interval_by_students_t(few):
    data = spread([(30 - number % 2 * 15, 30) for number in range(few)])
    assert stats.cluster_bootstrap(*data) == stats.clustered_rate(*data)
    uneven = spread([(90, 100) if number % 2 else (0, 1 + number) for number in range(few)])
    macro = stats.cluster_bootstrap(*uneven, macro=True)
    rates = [0.9 if number % 2 else 0.0 for number in range(few)]
    means = stats.clustered_rate(rates, range(few), observations=len(uneven[0]))
    assert (macro.estimate, macro.low, macro.high) == (means.estimate, means.low, means.high)
    assert (macro.n, macro.clusters, macro.method) == (len(uneven[0]), few, f"macro, {means.method}")


def test_few_clusters_of_one_size_and_nearly_one_rate_are_no_coin_flips():
    data = spread([(78 + number % 5, 100) for number in range(10)])
    micro, macro = (stats.cluster_bootstrap(*data, macro=kind) for kind in (False, True))
    assert (macro.low, macro.high) == (pytest.approx(micro.low), pytest.approx(micro.high))
    assert macro.high - macro.low < 0.06


@pytest.mark.parametrize("macro", [False, True])
def test_two_clusters_that_are_apart_say_little(macro):
    interval = stats.cluster_bootstrap(*spread([(29, 30), (15, 30)]), macro=macro)
    assert interval.high - interval.low > 0.9


@pytest.mark.parametrize("macro", [False, True])
def test_twenty_clusters_are_still_resampled(macro):
    data = spread([(10 + number, 30) for number in range(20)])
    found = stats.cluster_bootstrap(*data, macro=macro, seed=1)
    assert found.method == f"{'macro, ' if macro else ''}bootstrap over 20 clusters, 2000 draws, seed 1"
    assert found != stats.cluster_bootstrap(*data, macro=macro, seed=2)


@pytest.mark.parametrize("macro", [False, True])
def test_coverage_of_the_interval_over_five_clusters(macro):
    rng = random.Random("few")
    hits = 0
    for _ in range(300):
        counts = [(sum(rng.random() < p for _ in range(30)), 30) for p in (rng.betavariate(4, 2) for _ in range(5))]
        interval = stats.cluster_bootstrap(*spread(counts), macro=macro, draws=300)
        hits += interval.low <= 4 / 6 <= interval.high
    assert hits / 300 > 0.91


def test_paired_difference_by_hand():
    # Differences 1, 0 | 0, 0 | 1, 1 | 0, -1 in four clusters: mean 0.25, residual sums .5, -.5, 1.5, -1.5,
    # squares sum to 5, variance 4/3 * 5 / 64 = 0.1041667, error 0.322749, t = 0.774597 on 3 degrees.
    a, b = [1, 1, 0, 1, 1, 1, 0, 0], [0, 1, 0, 1, 0, 0, 0, 1]
    result = stats.paired_difference(a, b, [0, 0, 1, 1, 2, 2, 3, 3])
    assert result.interval.estimate == 0.25
    assert result.interval.high == 1
    assert result.interval.low == pytest.approx(0.25 - 3.182446 * 0.322749, abs=1e-5)
    assert result.p_value == pytest.approx(0.4950, abs=5e-4)
    assert (result.only_a, result.only_b) == (3, 1)


def test_pairing_removes_what_both_systems_share():
    rng = random.Random("paired")
    hard = [rng.random() < 0.5 for _ in range(400)]
    a = [float(each) for each in hard]
    b = [float(each and rng.random() < 0.9) for each in hard]
    clusters = [index // 10 for index in range(400)]
    result = stats.paired_difference(a, b, clusters)
    assert result.interval.low > 0
    assert result.p_value < 0.001


def test_equal_systems_differ_by_nothing_give_or_take():
    result = stats.paired_difference([1] * 100, [1] * 100, [index // 5 for index in range(100)])
    assert result.interval.estimate == 0
    assert result.p_value == 1
    assert 0 < result.interval.high < 0.25
    assert result.interval.low == -result.interval.high


def test_mcnemar_exact():
    assert stats.mcnemar(0, 0) == 1
    assert stats.mcnemar(5, 5) == 1
    assert stats.mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert stats.mcnemar(9, 1) == stats.mcnemar(1, 9)
    assert stats.mcnemar(0, 6) == pytest.approx(2 / 64)


def test_kappa_by_hand():
    # 20 both yes, 15 both no, 5 and 10 apart: observed .7, chance .5, kappa .4
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert stats.cohens_kappa(a, b) == pytest.approx(0.4)
    assert stats.cohens_kappa("abab", "abab") == 1
    assert math.isnan(stats.cohens_kappa("aaaa", "aaaa"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.wilson(3, 2), "3 passes of 2"),
        (lambda: stats.wilson(1, 2, confidence=95), "95"),
        (lambda: stats.clustered_rate([1, None], [0, 1]), "unscored"),
        (lambda: stats.clustered_rate([], []), "0 values"),
        (lambda: stats.clustered_rate([1, 0], [0]), "2 values and 1"),
        (lambda: stats.clustered_rate([2], [0]), "is 2"),
        (lambda: stats.paired_difference([1], [1, 0], [0]), "1 and 2"),
        (lambda: stats.mcnemar(-1, 2), "-1"),
        (lambda: stats.cohens_kappa([1], []), "1 and 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_real_judges_show_the_design_effects_that_lab_has(lab):
    rows = json.loads((lab / "runs" / "dual_judge.json").read_text())["per_task_pass_counts_unnamed_order"]
    effects, rates = {}, {}
    for column in ("luna_sonnet", "luna_gpt", "opus_sonnet", "opus_gpt"):
        data = spread([(row[column], row["n"]) for row in rows])
        effects[column], rates[column] = stats.design_effect(*data), stats.clustered_rate(*data)
        boot = stats.cluster_bootstrap(*data)
        assert boot.half_width == pytest.approx(rates[column].half_width, abs=0.004)
    assert min(effects.values()) == pytest.approx(3.9, abs=0.05)
    assert max(effects.values()) == pytest.approx(stats.LAB_DESIGN_EFFECT, abs=0.05)
    assert rates["luna_sonnet"].estimate == pytest.approx(0.818, abs=5e-4)
    assert (rates["luna_sonnet"].n, rates["luna_sonnet"].clusters) == (2858, 52)


def test_real_judges_agree_as_a_hand_count_says(lab):
    runs = json.loads((lab / "runs" / "dual_judge.json").read_text())["exact_pairs"]
    sonnet, gpt = [], []
    for run in runs:
        names = [f"C-{number:03d}" for number in range(1, run["n"] + 1)]
        sonnet += [name not in run["fail_sonnet46"] for name in names]
        gpt += [name not in run["fail_gpt55"] for name in names]
    only_sonnet = sum(a and not b for a, b in zip(sonnet, gpt, strict=True))
    only_gpt = sum(b and not a for a, b in zip(sonnet, gpt, strict=True))
    assert (len(sonnet), only_sonnet + only_gpt) == (170, 7)
    assert stats.wilson(7, 170).high == pytest.approx(0.083, abs=5e-4)
    observed = 163 / 170
    chance = (sum(sonnet) * sum(gpt) + (170 - sum(sonnet)) * (170 - sum(gpt))) / 170**2
    assert stats.cohens_kappa(sonnet, gpt) == pytest.approx((observed - chance) / (1 - chance))
    assert stats.mcnemar(only_sonnet, only_gpt) == 1.0


def test_clusters_that_balance_out_give_no_narrower_interval_than_independent_draws():
    # a pass and a fail in every cluster but one: the clustered variance is far below that of independent draws
    interval = stats.clustered_rate(*spread([(1, 2)] * 20 + [(2, 2)]))
    plain = stats.wilson(22, 42)
    assert interval.low <= plain.low
    assert interval.high >= plain.high
