"""Metrics over answers, paired intervals and tests: each a plain function over numbers or strings."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Scripts, as Unicode names begin, that put no spaces between words.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI")
# What counts as declining to answer, normalised. An empty answer counts too (SQuAD 2.0's convention).
ABSTENTIONS = frozenset(
    {
        "",
        "unknown",
        "unanswerable",
        "no answer",
        "not known",
        "not stated",
        "not given",
        "not mentioned",
        "not specified",
        "none",
        "i dont know",
        "i do not know",
        "it is unknown",
        "it is not known",
        "not enough information",
    }
)


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces (Rajpurkar et al. 2016).

    A text of nothing but articles keeps them, or the answer "A" would count as no answer at all.
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()) or " ".join(text.split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 where the answer's normal form is that of one of ``golds``, else 0."""
    return float(any(normalize(answer) == normalize(gold) for gold in golds))


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """The best F1 of bags of normalised words against one of ``golds`` (Rajpurkar et al. 2016)."""
    return max((_f1(normalize(answer).split(), normalize(gold).split()) for gold in golds), default=0.0)


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold))


def contains(answer: str, golds: Sequence[str]) -> float:
    """1 where one of ``golds`` stands in the answer as whole words, both normalised, else 0."""
    padded = f" {normalize(answer)} "
    return float(any(normalize(gold) and f" {normalize(gold)} " in padded for gold in golds))


def begins(answer: str, gold: str) -> float:
    """1 where the answer begins with ``gold``, both normalised and without marks, else 0.

    As whole words, but in scripts that put no spaces between them (:func:`unspaced`).
    """
    form = _unmarked if _unmarked(gold) else normalize  # of nothing but marks, these are what is said
    said, wanted = form(answer), form(gold)
    return float(f"{said} ".startswith(wanted if unspaced(wanted[-1:]) else f"{wanted} "))


def unspaced(character: str) -> bool:
    """Whether a character is of a script whose words run on into each other, so that nothing tells where one ends."""
    return bool(character) and unicodedata.name(character, "").startswith(_UNSPACED)


def _unmarked(text: str) -> str:
    """The normal form without any script's punctuation."""
    return normalize("".join(c for c in text if not unicodedata.category(c).startswith("P")))


def abstained(answer: str) -> float:
    """1 where the answer declines to answer, else 0."""
    return float(normalize(answer) in ABSTENTIONS)


def f1_by_label(truth: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """``micro_f1`` and ``macro_f1`` of single-label classification over the labels that occur in ``truth``.

    A prediction outside those labels is a miss of the true label and a false alarm of none of them, as in
    scikit-learn's ``f1_score(labels=...)``.
    """
    labels = sorted(set(truth))
    if not labels:
        return {"micro_f1": math.nan, "macro_f1": math.nan}
    hits, misses, alarms = Counter[str](), Counter[str](), Counter[str]()
    for true, given in zip(truth, predicted, strict=True):
        if true == given:
            hits[true] += 1
        else:
            misses[true] += 1
            alarms[given] += 1
    total = sum(hits.values())
    false_alarms = sum(alarms[label] for label in labels)
    micro = 2 * total / (2 * total + false_alarms + sum(misses.values()))
    each = [2 * hits[x] / max(2 * hits[x] + misses[x] + alarms[x], 1) for x in labels]
    return {"micro_f1": micro, "macro_f1": sum(each) / len(each)}


def f1_intervals(
    truth: Sequence[str], runs: Sequence[Sequence[str]], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The 95 % bootstrap intervals over rows of what :func:`f1_by_label` gives, as a mean over several runs.

    Where all rows are right in all runs, or none is, they are those of that share (:func:`mean_interval`).

    Args:
        truth: (rows), the right labels.
        runs: of each run what it predicted for these rows.
    """
    number = {label: n for n, label in enumerate(sorted(set(truth)))}
    if not number:
        return dict.fromkeys(("micro_f1", "macro_f1"), (math.nan, math.nan))
    count = len(number)
    right = np.array([number[one] for one in truth])
    given = [np.array([number.get(one, count) for one in run]) for run in runs]  # one more for what is no label
    shares = {float(np.mean([one[n] == right[n] for one in given])) for n in range(len(right))}
    if len(shares) == 1 and shares <= {0.0, 1.0}:
        return dict.fromkeys(("micro_f1", "macro_f1"), mean_interval([*shares] * len(right)))
    generator = np.random.default_rng(seed)
    found = np.zeros((resamples, 2))
    for n in range(resamples):
        weights = np.bincount(generator.integers(0, len(truth), len(truth)), minlength=len(truth))
        true = np.bincount(right, weights, count)
        for one in given:
            hits = np.bincount(right, weights * (one == right), count)
            both = true + np.bincount(one, weights, count)[:count]  # hits count twice in it
            there = true > 0  # a label that these rows lack is none
            found[n] += 2 * hits.sum() / both[there].sum(), (2 * hits[there] / both[there]).mean()
    low, high = np.quantile(found / len(given), [0.025, 0.975], axis=0)
    return {name: (float(low[n]), float(high[n])) for n, name in enumerate(("micro_f1", "macro_f1"))}


def first_hit(ranked: Sequence[str], wanted: Sequence[str]) -> int | None:
    """The rank (from 1) of the first of ``ranked`` that is in ``wanted``; None where none is."""
    return next((rank for rank, one in enumerate(ranked, 1) if one in set(wanted)), None)


def recall_share(found: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of ``wanted`` that is in ``found``; recall@k where ``found`` are the first k hits."""
    return len(set(found) & set(wanted)) / len(set(wanted))


def reciprocal_rank(rank: int | None) -> float:
    """1 / rank; 0 where nothing was found. Its mean is the MRR."""
    return 0.0 if rank is None else 1.0 / rank


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani 1993, ch. 13).

    For paired differences, give the differences question by question.
    """
    means = _resampled_means(np.asarray(values, dtype=np.float64), resamples, seed)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def mean_interval(
    values: Sequence[float], *, seed: int = 0, batches: Sequence[int] | None = None
) -> tuple[float, float]:
    """The 95 % interval of a mean of shares: bootstrap, but exact (Clopper and Pearson 1934) where all n are alike.

    Resampling 200 misses gives 200 misses, an interval of no width, although the share may well be 0.01.

    Args:
        batches: which batch each value is of, where they came in several that stand or fall together: these are then
            resampled, too (Davison and Hinkley 1997, section 3.8), and the wider interval is taken, since a handful of
            batches says little about how they differ. Where all are alike, each value counts.
    """
    if len(set(values)) == 1 and 0 <= values[0] <= 1:
        # The share of cases in which another draw would have given something else, and by 1 at most.
        other = 1 - 0.025 ** (1 / len(values))
        return values[0] * (1 - other), values[0] + (1 - values[0]) * other
    low, high = bootstrap_interval(values, seed=seed)
    if batches is None:
        return low, high
    _, places = np.unique(batches, return_inverse=True)
    sums, counts = np.bincount(places, values), np.bincount(places)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    among = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return min(low, float(among[0])), max(high, float(among[1]))


def means(
    rows: Sequence[dict[str, float]], seed: int, batches: Sequence[int] | None = None
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The mean of each metric over the rows that have it, and its 95 % interval.

    Args:
        batches: see :func:`mean_interval`.
    """
    found: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        places = [n for n, row in enumerate(rows) if name in row]
        values = [rows[n][name] for n in places]
        found[name] = sum(values) / len(values)
        of = None if batches is None else [batches[n] for n in places]
        intervals[name] = list(mean_interval(values, seed=seed, batches=of))
    return found, intervals


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Mean of ``ours - theirs`` over the same questions, with its 95 % paired interval.

    Bootstrap; where no question tells the two apart, what so many questions can still hide of either sign (as in
    :func:`mean_interval`), which is for shares.
    """
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    if len(differences) and not differences.any() and 0 <= min(ours) <= max(ours) <= 1:
        edge = 1 - 0.025 ** (1 / len(differences))
        return 0.0, (-edge, edge)
    return float(differences.mean()), bootstrap_interval(differences.tolist(), seed=seed)


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Exact two-sided p-value of McNemar's test for two methods' right (1) and wrong (0) answers."""
    only_ours = sum(a > b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(a < b for a, b in zip(ours, theirs, strict=True))
    if only_ours + only_theirs == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_ours, only_ours + only_theirs, 0.5).pvalue)


def _resampled_means(values: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    if len(values) == 0:
        return np.full(1, math.nan)
    generator = np.random.default_rng(seed)
    # A thousand resamples at a time: 10,000 x 10,000 questions would take 800 MB at once.
    step = max(1, min(1_000, 20_000_000 // len(values)))
    means = [
        values[generator.integers(0, len(values), (min(step, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, step)
    ]
    return np.concatenate(means)


def harmonic_mean(values: Sequence[float]) -> float:
    """n / Σ 1/v; 0 where a value is 0 (MEMIT's score S of ES, PS and NS)."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def generation_entropy(text: str) -> float:
    """GE: (2/3 · H₂ + 4/3 · H₃) / 2 of the text's word n-grams, in bits, times 100 (Meng et al. 2022).

    Low where a model repeats itself.
    """
    words = text.split()
    return 100 * (2 / 3 * _ngram_entropy(words, 2) + 4 / 3 * _ngram_entropy(words, 3)) / 2


def _ngram_entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def reference_score(text: str, references: Sequence[str]) -> float:
    """RS: cosine of TF-IDF vectors of the text and all references together, times 100 (Meng et al. 2022).

    Document frequencies come from the references, so that words common to all of them weigh little.
    """
    documents = [Counter(normalize(one).split()) for one in references]
    frequency = Counter(word for document in documents for word in document)
    weight = {word: math.log((1 + len(documents)) / (1 + n)) + 1 for word, n in frequency.items()}
    new = math.log(1 + len(documents)) + 1
    ours = {word: n * weight.get(word, new) for word, n in Counter(normalize(text).split()).items()}
    theirs = {word: n * weight[word] for word, n in sum(documents, Counter[str]()).items()}
    length = math.sqrt(sum(v * v for v in ours.values()) * sum(v * v for v in theirs.values()))
    return 100 * sum(v * theirs.get(word, 0.0) for word, v in ours.items()) / length if length else 0.0
