"""The main job: methods on the same questions of one ledger, scored with paired intervals and their costs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from byheart.answer import answer_all
from byheart.base import Base
from byheart.decode import speaker
from byheart.errors import DataError
from byheart.judges import Judge
from byheart.ledger import Ledger
from byheart.methods import Answer, LearnReport, Method, Settings, method_class
from byheart.progress import Silent
from byheart.record import encoder_record, made_with, run_record
from byheart.retrieve import searchable
from byheart.rows import Question, Split, drawn
from byheart.score import (
    abstained,
    contains,
    exact_match,
    f1_by_label,
    f1_intervals,
    first_hit,
    mcnemar,
    means,
    paired_difference,
    recall_share,
    reciprocal_rank,
    token_f1,
)
from byheart.storage import fingerprint, write_json, write_text

EVALUATED: tuple[Split, ...] = ("validation", "test")
RECALL_AT = (1, 5, 10)
# What is compared between methods, where both have it.
PAIRED = ("em", "f1", "contains", "bertscore", "bleurt", "accuracy", "answer_probability", "hallucination")
_LABEL_RESAMPLES = 1_000
Metrics = dict[str, float]  # one answer's metrics


def compare(
    ledger: Ledger,
    base: Base,
    methods: Sequence[str],
    out: Path,
    settings: Settings,
    *,
    splits: Sequence[Split] = EVALUATED,
    limit: int | None = None,
    judges: Sequence[Judge] = (),
    origin: dict[str, Any] | None = None,
    progress: Silent | None = None,
) -> dict[str, Any]:
    """Answer the ledger's questions with each method and write ``run.json`` and ``answers.jsonl`` to ``out``.

    Run again after a kill, it goes on where it was: index, and answers question by question, are kept in ``out``.

    Args:
        methods: names from :data:`byheart.methods.METHODS`.
        splits: which questions are asked; ``train`` ones never are unless named here.
        limit: ask only so many, drawn by the seed over all kinds.
        judges: further metrics, that need models of their own.
        origin: what the data is and where it came from, for the record.

    Returns:
        The content of ``run.json``.

    Raises:
        DataError: where the ledger has no such question.
    """
    show = progress or Silent()
    questions = choose_questions(ledger, splits, limit, settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    run = run_record(base, settings, origin) | {
        "ledger": _ledger_record(ledger),
        "questions": _question_record(ledger, questions, splits),
        "methods": {},
    }
    answers: dict[str, list[Answer]] = {}
    rows: dict[str, list[Metrics]] = {}
    # A method's own options stand beside them, so that those of others change nothing for it.
    shared = replace(settings, options={}).to_dict()
    for name, method in _made(methods, base, settings, out, run, show).items():
        if estimate := method.estimate(ledger):
            show.say(estimate)
        with show.bar(f"{name}: {method.learns}s", ledger.count(method.learns)) as tick:
            report = method.learn(ledger, tick)
        mark = fingerprint(
            name, *speaker(base), shared, encoder_record(method),
            # Of the ledger as it was learnt: it may have gone on since.
            getattr(method, "stand", ledger.stand), made_with(method), getattr(method, "digest", ""),
        )  # fmt: skip
        with show.bar(f"{name}: questions", len(questions)) as tick:
            answers[name] = answer_all(method, questions, out / "answers" / f"{name}.jsonl", mark, on_done=tick)
        rows[name] = scored(questions, answers[name], judges)
        run["methods"][name] = summarise(questions, answers[name], rows[name], report, settings.seed)
        run["methods"][name] |= made_with(method)
        if "train" in splits and getattr(method, "knows_questions", False):
            run["methods"][name]["notes"] += [
                "learnt from training questions, and was asked them: its figures say what it kept, not what it can do"
            ]
        run["encoder"] = run.get("encoder") or encoder_record(method)
    run["pairs"] = pairs(rows, settings.seed)
    write_json(out / "run.json", run)
    write_answers(out / "answers.jsonl", questions, answers, rows)
    return run


def _made(
    names: Sequence[str], base: Base, settings: Settings, out: Path, run: dict[str, Any], show: Silent
) -> dict[str, Method]:
    """The methods, before any of them works: what cannot work on this base is left out and named.

    Raises:
        DataError: where none is left.
    """
    made: dict[str, Method] = {}
    for name in names:
        try:
            made[name] = method_class(name)(base, settings, out)
        except DataError as error:
            run.setdefault("methods_left_out", {})[name] = str(error)
            show.say(f"left out: {error}")
            if len(names) == len(run["methods_left_out"]):
                raise
    return made


def choose_questions(ledger: Ledger, splits: Sequence[Split], limit: int | None, seed: int) -> list[Question]:
    """The questions to ask, in the ledger's order; ``limit`` draws that many by the seed.

    A question that is answerable but has no answers cannot be scored and is left out (``byheart ledger check`` lists
    them).

    Raises:
        DataError: where none is left.
    """
    found = [q for q in ledger.questions(splits) if q.answers or not q.answerable]
    if not found:
        raise DataError(f"{ledger.path}: no questions of split {' or '.join(splits)} to ask")
    return drawn(found, limit, seed)


# -- scoring -------------------------------------------------------------------------------------------------


def question_metrics(question: Question, answer: Answer) -> Metrics:
    """One answer's metrics, each between 0 and 1. A skipped question has none.

    For a question that has no answer, the right one is to abstain, and ``em``, ``f1`` and ``contains`` say whether
    that happened (SQuAD 2.0's convention). ``hallucination`` is 1 where an answer does not stand in the passages that
    were read for it.
    """
    if answer.skipped is not None:
        return {}
    values: Metrics = {}
    if question.answerable:
        values["em"] = exact_match(answer.text, question.answers)
        values["f1"] = token_f1(answer.text, question.answers)
        values["contains"] = contains(answer.text, question.answers)
    else:
        values["em"] = values["f1"] = values["contains"] = abstained(answer.text)
    values["abstained"] = abstained(answer.text)
    if answer.evidence and not values["abstained"]:
        read = "\n".join(map(searchable, answer.evidence))
        values["hallucination"] = 1.0 - contains(read, [answer.text])
    if answer.reference is not None:
        values["answer_probability"] = math.exp(answer.reference)
    if answer.token_accuracy is not None:
        values["token_accuracy"] = answer.token_accuracy
    if question.answers and answer.choice is not None and answer.choice_calibrated is not None:
        values["accuracy"] = float(answer.choice in question.answers)
        values["accuracy_calibrated"] = float(answer.choice_calibrated in question.answers)
    if answer.ranked is not None and question.documents:
        for k in RECALL_AT:
            values[f"recall@{k}"] = recall_share(answer.ranked[:k], question.documents)
        values["mrr"] = reciprocal_rank(first_hit(answer.ranked, question.documents))
    return values


def scored(questions: Sequence[Question], answers: Sequence[Answer], judges: Sequence[Judge] = ()) -> list[Metrics]:
    """All answers' metrics; what judges say of an answerable question's answer stands beside the others."""
    rows = [question_metrics(q, a) for q, a in zip(questions, answers, strict=True)]
    judged = [n for n, (q, a) in enumerate(zip(questions, answers, strict=True)) if q.answerable and a.skipped is None]
    for judge in judges:
        values = judge.scores([answers[n].text for n in judged], [questions[n].answers for n in judged])
        for n, value in zip(judged, values, strict=True):
            rows[n][judge.name] = value
    return rows


def summarise(
    questions: Sequence[Question], answers: Sequence[Answer], rows: Sequence[Metrics], report: LearnReport, seed: int
) -> dict[str, Any]:
    """A method's entry in ``run.json``: means with 95 % bootstrap intervals, over all questions and kind by kind.

    Args:
        rows: what :func:`scored` gives.
    """
    asked = [a for a in answers if a.skipped is None]
    metrics, intervals = means(rows, seed)
    labelled = [(q.answers, a.choice) for q, a in zip(questions, answers, strict=True) if q.answers and a.choice]
    if labelled:
        given = [choice for _, choice in labelled]
        # Of several right choices, the one that was chosen.
        truth = [choice if choice in right else right[0] for right, choice in labelled]
        metrics |= f1_by_label(truth, given)
        bounds = f1_intervals(truth, [given], resamples=_LABEL_RESAMPLES, seed=seed)
        intervals |= {name: list(found) for name, found in bounds.items()}
    kinds = sorted({q.kind for q in questions})
    by_kind = {}
    for kind in kinds:
        of_kind = [row for q, row in zip(questions, rows, strict=True) if q.kind == kind]
        kind_metrics, kind_intervals = means(of_kind, seed)
        by_kind[kind] = {"questions": len(of_kind), "metrics": kind_metrics, "intervals": kind_intervals}
    return {
        "metrics": metrics,
        "intervals": intervals,
        "by_kind": by_kind if len(kinds) > 1 else {},
        "asked": len(asked),
        "skipped": dict(Counter(a.skipped for a in answers if a.skipped is not None)),
        "write_seconds": report.seconds,
        "bytes": report.bytes,
        "left_out": report.skipped,
        "notes": list(report.notes),
        "query_ms": 1000 * _mean([a.seconds for a in asked]),
        "prompt_tokens": _mean([a.prompt_tokens for a in asked]),
        "new_tokens": _mean([a.new_tokens for a in asked]),
    }


def pairs(rows: Mapping[str, Sequence[Metrics]], seed: int) -> list[dict[str, Any]]:
    """Differences between every two methods on the questions that both answered, with intervals and p-values."""
    found = []
    for theirs, ours in combinations(rows, 2):
        for metric in PAIRED:
            both = [
                (a[metric], b[metric])
                for a, b in zip(rows[ours], rows[theirs], strict=True)
                if metric in a and metric in b
            ]
            if not both:
                continue
            one, two = [a for a, _ in both], [b for _, b in both]
            difference, interval = paired_difference(one, two, seed=seed)
            entry: dict[str, Any] = {"method": ours, "against": theirs, "metric": metric, "questions": len(both)}
            entry |= {"difference": difference, "interval": list(interval)}
            if set(one) | set(two) <= {0.0, 1.0}:
                entry["mcnemar_p"] = mcnemar(one, two)
            found.append(entry)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# -- the record ----------------------------------------------------------------------------------------------


def write_answers(
    path: Path, questions: Sequence[Question], answers: dict[str, list[Answer]], rows: Mapping[str, Sequence[Metrics]]
) -> None:
    """``answers.jsonl``: a row a question and method, with its metrics."""
    lines = []
    for place, question in enumerate(questions):
        for name, given in answers.items():
            answer = given[place]
            row = {"method": name, "kind": question.kind, "question_text": question.question} | asdict(answer)
            row |= {"answers": question.answers, "metrics": rows[name][place]}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def _ledger_record(ledger: Ledger) -> dict[str, Any]:
    return {
        "name": ledger.path.name,
        "revision": ledger.revision,
        "documents": ledger.count("document"),
        "facts": ledger.count("fact"),
        "questions": ledger.count("question"),
    }


def _question_record(ledger: Ledger, questions: Sequence[Question], splits: Sequence[Split]) -> dict[str, Any]:
    return {
        "asked": len(questions),
        "of": sum(1 for _ in ledger.questions(splits)),
        "splits": list(splits),
        "kinds": dict(Counter(q.kind for q in questions)),
    }
