"""Editing benchmarks: CounterFact and zsRE from their files, as facts to edit in and probes to score afterwards."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from byheart.errors import DataError
from byheart.formats import read_objects
from byheart.rows import SUBJECT_PLACE, Fact, first_reason, told_apart, whole_words, with_place

# What runs and reports call the unedited model.
UNEDITED = "closed"
ProbeKind = Literal["edit", "paraphrase", "neighbourhood", "portability"]


@dataclass(frozen=True)
class Probe:
    """A prompt with what is scored behind it: the wanted continuation first, then, where there is one, its rival.

    The wanted one is the new object for ``edit`` and ``paraphrase``; for ``neighbourhood`` it is the true one, which
    must not move; for ``portability`` what follows from the new object.
    """

    kind: ProbeKind
    prompt: str
    wanted: str
    rival: str | None = None


@dataclass(frozen=True)
class Case:
    """One record: the fact to edit in, the probes of what became of it, prompts to write on from, and its group.

    ``group`` is the relation, or the kind of source; ``references`` are texts about the new object (for RS).
    """

    fact: Fact
    probes: tuple[Probe, ...]
    group: str = ""
    generate: tuple[str, ...] = ()
    references: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Records:
    """A file's cases, and of records that hold nothing to edit (no target, no subject in the prompt) the reason.

    ``left_out`` is by place, ``FILE:LINE``.
    """

    cases: list[Case]
    left_out: dict[str, str] = field(default_factory=dict)


class _Unusable(Exception):  # noqa: N818 (no error: the rest of the file goes on)
    """Why a record holds nothing to edit."""


def counterfact(data: Path, references: Path | None = None) -> Records:
    """CounterFact (Meng et al. 2022): JSON lines in the published nesting; a folder is searched for the full records.

    Args:
        references: JSON lines of ``{"object": ..., "texts": [...]}``: what texts about an object say, for RS.

    Raises:
        DataError: names file, line and reason.
    """
    path = _file(data, ("counterfact_full.jsonl", "counterfact.jsonl", "counterfact.json"))
    texts: dict[str, tuple[str, ...]] = {}
    for number, row in () if references is None else read_objects(references, ("object", "texts")):
        if not isinstance(row["texts"], list) or not all(isinstance(text, str) for text in row["texts"]):
            raise DataError(f'{references}:{number}: "texts" must be a list of texts')
        texts[str(row["object"])] = tuple(row["texts"])
    return _records(path, ("requested_rewrite",), lambda number, row: _counterfact_case(path, number, row, texts))


def _counterfact_case(path: Path, number: int, row: dict[str, Any], texts: dict[str, tuple[str, ...]]) -> Case:
    try:
        edit = row["requested_rewrite"]
        new, true = _target(edit["target_new"]["str"]), _target(edit["target_true"]["str"])
        if not true:
            raise _Unusable("there is no true target")
        fact = _fact(f"cf-{row['case_id']}", edit["subject"], edit["prompt"], new, true)
        probes = [Probe("edit", fact.filled(), new, true)]
        probes += [Probe("paraphrase", prompt, new, true) for prompt in _texts(row, "paraphrase_prompts")]
        probes += [Probe("neighbourhood", prompt, true, new) for prompt in _texts(row, "neighborhood_prompts")]
        return Case(
            fact,
            tuple(probes),
            edit.get("relation_id") or "",
            tuple(dict.fromkeys(_texts(row, "generation_prompts"))),
            texts.get(new, ()),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}:{number}: not a CounterFact record ({error!r})") from None


def zsre(data: Path) -> Records:
    """zsRE as used for editing (Mitchell et al. 2022; with portability, Yao et al. 2023): JSON lines.

    Raises:
        DataError: names file, line and reason.
    """
    path = _file(data, ("zsre_eval.jsonl", "zsre_mend_eval.json", "zsre.jsonl"))
    return _records(path, ("subject", "src", "alt"), lambda number, row: _zsre_case(path, number, row))


def _zsre_case(path: Path, number: int, row: dict[str, Any]) -> Case:
    try:
        subject, question = row["subject"], row["src"]
        prompt = with_place(question.replace("{", "(").replace("}", ")"), subject) if subject else None
        if prompt is None:
            raise _Unusable(f"the question does not hold its subject {subject!r}")
        fact = _fact(f"zsre-{number}", subject, prompt, _target(row["alt"]), None)
        probes = [Probe("edit", fact.filled(), fact.object)]
        if rephrase := _text(row, "rephrase"):
            probes.append(Probe("paraphrase", rephrase, fact.object))
        if (loc := _text(row, "loc")) and (answer := _text(row, "loc_ans")):
            # The published prompt: the question behind its mark, with a question mark.
            probes.append(Probe("neighbourhood", loc + "?", answer))
        port = row.get("portability") or {}
        if (asked := _text(port, "New Question")) and (answer := _text(port, "New Answer")):
            probes.append(Probe("portability", asked, answer))
        return Case(fact, tuple(probes))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}:{number}: not a zsRE record ({error!r})") from None


def question_cases(path: Path) -> Records:
    """Edits taken from documents' questions: a question that names its document's title, and its first answer.

    Reads JSON lines with ``title``, ``question`` and ``answers`` (SQuAD's form flattened, or a ledger's questions
    joined with their pages). Questions that do not name their title have no subject to edit and are left out.
    """
    return _records(path, ("title", "question"), lambda number, row: _question_case(path, number, row))


def _question_case(path: Path, number: int, row: dict[str, Any]) -> Case:
    try:
        title, question = _text(row, "title").replace("_", " "), _text(row, "question")
    except TypeError as error:
        raise DataError(f"{path}:{number}: {error}") from None
    answers = row.get("answers") or []
    answers = answers.get("text", []) if isinstance(answers, dict) else answers
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f'{path}:{number}: "answers" must be texts')
    named = re.search(whole_words(title), question, re.IGNORECASE) if title else None
    if named is None or SUBJECT_PLACE in question:
        raise _Unusable("the question does not name its document's title")
    if not answers:
        raise _Unusable("the question has no answer")
    # The subject as the question spells it: Natural Questions writes everything small.
    prompt = question[: named.start()] + SUBJECT_PLACE + question[named.end() :]
    fact = _fact(f"question-{number}", named.group(), prompt, _target(answers[0]), None)
    return Case(fact, (Probe("edit", fact.filled(), fact.object),), "questions")


def same_subject(cases: Sequence[Case], size: int, sets: int, seed: int) -> list[list[Case]]:
    """Batches of ``size`` facts about one subject, made from the records' own subjects, relations and new objects.

    Each takes the subject of one record and the prompts and new objects of records with other relations
    (MEMIT-Merge; Dong et al. 2025).

    Raises:
        DataError: where the records have fewer relations.
    """
    draw = random.Random(seed)
    by_relation: dict[str, list[Case]] = {}
    for case in cases:
        by_relation.setdefault(case.group or case.fact.prompt, []).append(case)
    relations = sorted(by_relation)
    if len(relations) < size:
        raise DataError(f"--same-subject {size}: the records are of {len(relations)} relations only")
    made = []
    for owner in draw.sample(list(cases), min(sets, len(cases))):
        subject = owner.fact.subject
        batch = []
        for relation in draw.sample(relations, size):
            case = draw.choice(by_relation[relation])
            fact = case.fact.model_copy(update={"id": f"{owner.fact.id}-{case.fact.id}", "subject": subject})
            batch.append(
                Case(fact, (Probe("edit", fact.filled(), fact.object, case.fact.former_object),), "same subject")
            )
        made.append(batch)
    return made


@dataclass(frozen=True)
class Crossing:
    """A case's prompt about the subject of another case: ``own`` and ``other`` are their places.

    ``reworded`` is the case's first paraphrase about it, which no edit has seen in any form; None where there is none.
    """

    own: int
    other: int
    prompt: str
    reworded: str | None = None


def crossed(cases: Sequence[Case], seed: int) -> list[Crossing]:
    """Each case's prompt about the subject of another, drawn so that subjects, prompts and objects of the two differ.

    What an edit says there leaks: the first one's object is said of whoever its prompt is about, the other's to
    whatever its subject is asked. Nothing of a case that finds no other, nor of a prompt that is edited.
    """
    order = list(range(len(cases)))
    random.Random(seed).shuffle(order)
    edited = {(case.fact.subject, case.fact.prompt) for case in cases}
    found = []
    for place, n in enumerate(order):
        fact = cases[n].fact
        for m in order[place + 1 :] + order[:place]:
            other = cases[m].fact
            same = (getattr(fact, name) == getattr(other, name) for name in ("subject", "prompt", "object"))
            if not any(same) and (other.subject, fact.prompt) not in edited:
                asked = fact.model_copy(update={"subject": other.subject}).filled()
                paraphrases = (probe.prompt for probe in cases[n].probes if probe.kind == "paraphrase")
                named = next((prompt for prompt in paraphrases if fact.subject in prompt), None)
                reworded = named.replace(fact.subject, other.subject) if named else None
                found.append(Crossing(n, m, asked, reworded))
                break
    return sorted(found, key=lambda crossing: crossing.own)


def _records(path: Path, needed: Iterable[str], make: Callable[[int, dict[str, Any]], Case]) -> Records:
    records = Records([])
    seen: Counter[str] = Counter()
    for number, row in read_objects(path, needed):
        try:
            case = make(number, row)
            # Two files put together share ids, say; told apart, each is looked at.
            fact = case.fact.model_copy(update={"id": told_apart(case.fact.id, seen)})
            records.cases.append(replace(case, fact=fact))
        except _Unusable as why:
            records.left_out[f"{path.name}:{number}"] = str(why)
    if not records.cases:
        first = next((f"{place}: {reason}" for place, reason in records.left_out.items()), "it is empty")
        raise DataError(f"{path}: holds no record to edit ({first})")
    return records


def _target(text: Any) -> Any:
    """As it is learnt: some rows of zsRE have a space before their targets, which would be another first token."""
    if text is None:
        raise _Unusable("there is no target")
    return text.strip() if isinstance(text, str) else text


def _text(row: dict[str, Any], name: str) -> str:
    """A text, without white space around it, as facts are learnt; blank where there is none."""
    text = row.get(name)
    if not isinstance(text, str | None):
        raise TypeError(f'"{name}" must be a text')
    return (text or "").strip()


def _texts(row: dict[str, Any], name: str) -> list[str]:
    found = row.get(name, [])
    if not isinstance(found, list) or not all(isinstance(text, str) and text.strip() for text in found):
        raise TypeError(f'"{name}" must be a list of texts, none of them blank')
    return [text.strip() for text in found]


def _fact(id: str, subject: str, prompt: str, new: str, true: str | None) -> Fact:
    if not all(isinstance(text, str) for text in (subject, prompt, new)):
        raise TypeError("subject, prompt and target must be texts")
    try:
        return Fact(id=id, subject=subject, prompt=prompt.strip(), object=new, former_object=true)
    except ValidationError as error:
        raise _Unusable(first_reason(error)) from None


def _file(data: Path, names: Iterable[str]) -> Path:
    if not data.exists():
        raise DataError(f"--data {data}: no such file or folder")
    if data.is_file():
        return data
    found = next((data / name for name in names if (data / name).is_file()), None)
    if found is None:
        raise DataError(f"--data {data}: holds none of {', '.join(names)}; name the file")
    return found
