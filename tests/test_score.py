"""Metrics and intervals against their formulas and other implementations."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from byheart.score import (
    abstained,
    begins,
    bootstrap_interval,
    contains,
    exact_match,
    f1_by_label,
    f1_intervals,
    first_hit,
    mcnemar,
    mean_interval,
    normalize,
    paired_difference,
    recall_share,
    reciprocal_rank,
    token_f1,
)


def test_squad_normal_form():
    # The steps of the SQuAD evaluation: lower case, punctuation out, articles out, white space mended.
    assert normalize("The  Panthers' \n defense.") == "panthers defense"
    assert normalize("A theatre, an art; the end") == "theatre art end"
    assert normalize("U.S.") == "us"
    assert normalize("A.") == "a" and exact_match("the", ["A"]) == 0 and not abstained("A")


def test_exact_match_and_f1_take_the_best_alias():
    assert exact_match("the Eiffel Tower!", ["Eiffel tower", "La tour"]) == 1
    assert exact_match("Eiffel", ["Eiffel tower"]) == 0
    # Two of three words right, both gold words found: P = 2/3, R = 1.
    assert token_f1("old Eiffel Tower", ["Eiffel tower"]) == pytest.approx(0.8)
    assert token_f1("blue", ["red", "light blue"]) == pytest.approx(2 / 3)
    assert token_f1("", ["red"]) == 0
    # A word counts as often as it stands in both.
    assert token_f1("no no no", ["no"]) == pytest.approx(0.5)


def test_contains_looks_for_whole_words():
    assert contains("It was 12 May 1976, in Rome", ["May 1976"]) == 1
    assert contains("Theodore", ["Theo"]) == 0
    assert contains("anything", [""]) == 0


def test_abstaining():
    assert all(abstained(t) for t in ("", "Unknown.", "I don't know", "not stated"))
    assert not abstained("Unknown Pleasures")


# The example of scikit-learn's f1_score documentation: macro 0.2666..., micro 0.3333...
def test_label_f1_on_scikit_learns_published_example():
    found = f1_by_label([*"012012"], [*"021001"])
    assert found["macro_f1"] == pytest.approx(0.26666, abs=1e-4)
    assert found["micro_f1"] == pytest.approx(0.33333, abs=1e-4)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcx")), min_size=1, max_size=40))
def test_label_f1_is_scikit_learns(rows):
    truth, given_ = [a for a, _ in rows], [b for _, b in rows]
    labels = sorted(set(truth))
    found = f1_by_label(truth, given_)
    for average in ("micro", "macro"):
        expected = f1_score(truth, given_, labels=labels, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(expected)


def test_intervals_of_label_f1_are_those_of_resampled_rows():
    draw = random.Random(3)
    truth = ["c", *(draw.choice("aab") for _ in range(59))]  # a third of resamples lack "c"
    runs = [[one if draw.random() < right else draw.choice("abcx") for one in truth] for right in (0.7, 0.3)]
    found = f1_intervals(truth, runs, resamples=2_000)
    for name in ("micro_f1", "macro_f1"):
        means = []
        for _ in range(2_000):
            rows = draw.choices(range(60), k=60)
            each = [f1_by_label([truth[n] for n in rows], [run[n] for n in rows])[name] for run in runs]
            means.append(sum(each) / 2)
        assert found[name] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.015)
    # Resampling rows that are all right, or all wrong, would give an interval of no width.
    for said, value in (("abc", 1.0), ("bca", 0.0), ("xxx", 0.0)):
        assert f1_intervals([*"abc"], [[*said]]) == dict.fromkeys(("micro_f1", "macro_f1"), mean_interval([value] * 3))
    # A label that a resample lacks is none of its labels.
    assert f1_intervals([*"aab"], [[*"aac"]])["macro_f1"][1] == 1
    assert all(math.isnan(one) for one in f1_intervals([], [[]])["macro_f1"])


def test_mean_reciprocal_rank_on_the_textbook_example():
    # Plurals of cat, torus and virus, right at ranks 3, 2 and 1: MRR = (1/3 + 1/2 + 1) / 3 = 11/18.
    queries = [
        (["catten", "cati", "cats"], "cats"),
        (["torii", "tori", "toruses"], "tori"),
        (["viruses", "virii"], "viruses"),
    ]
    ranks = [first_hit(ranked, [right]) for ranked, right in queries]
    assert ranks == [3, 2, 1]
    assert sum(map(reciprocal_rank, ranks)) / 3 == pytest.approx(11 / 18)
    assert reciprocal_rank(first_hit(["a"], ["b"])) == 0
    assert recall_share(["a", "b"], ["b", "c"]) == 0.5


def test_mcnemar_is_the_exact_binomial_test():
    # 1 against 9 discordant pairs: 2 * (C(10,0) + C(10,1)) / 2^10.
    ours, theirs = [1.0] * 9 + [0.0] + [1.0] * 5, [0.0] * 9 + [1.0] + [1.0] * 5
    assert mcnemar(ours, theirs) == pytest.approx(22 / 1024)
    assert mcnemar([1, 0], [1, 0]) == 1.0
    # Agresti's approval ratings, 150 against 86 discordant of 1600: z^2 = 17.36.
    ours, theirs = [1.0] * 150 + [0.0] * 86, [0.0] * 150 + [1.0] * 86
    assert mcnemar(ours, theirs) == pytest.approx(stats.chi2.sf(17.36, 1), rel=0.35)


def test_bootstrap_is_scipys_percentile_interval():
    values = np.random.default_rng(1).exponential(size=200)
    ours = bootstrap_interval(values.tolist())
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=2).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_none_of_n_leaves_room_for_doubt():
    low, high = mean_interval([0.0] * 226)
    assert (low, high) == pytest.approx((0, stats.binomtest(0, 226).proportion_ci(method="exact").high))
    low, high = mean_interval([1.0] * 40)
    assert (low, high) == pytest.approx((stats.binomtest(40, 40).proportion_ci(method="exact").low, 1))
    assert mean_interval([0.0, 1.0, 1.0]) == bootstrap_interval([0.0, 1.0, 1.0])
    # Ten that stand or fall together are one observation, not ten.
    batches = [n // 10 for n in range(200)]
    together = mean_interval([float(batch % 2) for batch in batches], batches=batches)
    alone = bootstrap_interval([float(n % 2) for n in range(20)])
    assert together == pytest.approx(alone, abs=0.05) and together[1] - together[0] > 0.3
    # Two batches that came out alike do not say that all would.
    alike = [0.0, 1.0, 1.0, 1.0] * 2
    assert mean_interval(alike, batches=[0] * 4 + [1] * 4) == bootstrap_interval(alike)
    # All alike, and neither none nor all: nearly nothing where there is one.
    assert mean_interval([0.3]) == pytest.approx((0.0075, 0.9825))
    low, high = mean_interval([0.5] * 100)
    assert (low, high) == pytest.approx((0.482, 0.518), abs=1e-3)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval((generator.random(80) < 0.3).astype(float).tolist(), resamples=500)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_paired_interval_is_narrower_than_two_single_ones():
    generator = np.random.default_rng(4)
    hard = generator.random(300)
    ours, theirs = (hard < 0.5).astype(float), (hard < 0.42).astype(float)
    nothing, bounds = paired_difference([0.0, 1.0] * 50, [0.0, 1.0] * 50)
    assert nothing == 0 and bounds == pytest.approx((-0.036, 0.036), abs=1e-3)
    assert paired_difference([0.0, 0.5] * 50, [0.0, 0.5] * 50)[1] == bounds
    difference, (low, high) = paired_difference(ours.tolist(), theirs.tolist())
    assert difference == pytest.approx(ours.mean() - theirs.mean())
    assert 0 < low < difference < high
    single = bootstrap_interval(ours.tolist())
    assert high - low < single[1] - single[0]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("Vellmora” it says", "Vellmora"),
        ("भारत। और", "भारत"),
        ("القاهرة، مصر", "القاهرة"),
        ("北京。它是", "北京"),
        ("北京是", "北京"),
    ],
)
def test_an_object_is_said_in_any_script(said, wanted):
    assert begins(said, wanted) == 1
    assert begins("Vellmorans", "Vellmora") == begins("भारतीय", "भारत") == begins("上海", "北京") == 0
    assert begins("… and", "…") == 1 and begins("— and", "…") == 0
