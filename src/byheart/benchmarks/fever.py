"""FEVER by page: claims grouped by the page that decides them, ranked, filled up, split; from any of its copies."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from byheart.errors import DataError, UsageError, first_line
from byheart.formats import read_objects
from byheart.rows import Document, drawn, told_apart

LABELS = ("supports", "refutes", "not enough info")
Part = Literal["train", "validation"]
How = Literal["claim", "page"]
_THIRD = LABELS[2]
# Words in the names of files that hold no claims that could be used.
_WORD = re.compile("[a-z]+")
_OTHER = {"page", "pages", "passage", "passages", "test"}
# Of a page's claims, or of the pages, the share that is learnt from.
_TRAIN_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim with its label and the page that it is grouped with (one of the third class: that it was drawn for)."""

    id: str
    text: str
    label: str
    page: str | None
    part: Part | None = None


@dataclass(frozen=True)
class Fever:
    """Pages and claims, ready to learn from (``train``) and to measure on (``validation``).

    Attributes:
        counts: what was dropped or filled up, by reason.
    """

    pages: tuple[Document, ...]
    claims: tuple[Claim, ...]
    counts: dict[str, int] = field(default_factory=dict)

    def part(self, part: Part) -> list[Claim]:
        """The claims of one part."""
        return [claim for claim in self.claims if claim.part == part]


def load_fever(data: Path, *, top: int = 99, how: How = "claim", seed: int = 0, limit: int | None = None) -> Fever:
    """The ``top`` pages with most claims, their text and their claims.

    A page without text, or without claims to learn from, is dropped and the next one moves up. For each page half as
    many claims of the third class (which no page decides) as it decides itself are drawn, without repeats. A page of
    which only supported or only refuted claims are known keeps those alone: nobody has written the others.

    Args:
        data: a folder with the official files (``train.jsonl``, ``*dev*.jsonl`` and ``wiki-pages/``), the Hub's copy
            of them (JSONL or parquet), or ``pages.jsonl`` beside ``claims*.jsonl``.
        how: ``claim`` splits each page's claims 70/30, label by label; ``page`` splits the pages, so that claims are
            measured on pages of which no claim was learnt. Official files that name their split keep it with
            ``claim``.
        limit: measure on so many claims, drawn by the seed.

    Raises:
        DataError: where files are missing or a line is bad.
    """
    if not data.is_dir():
        raise DataError(f"--data {data}: no such folder")
    counts: Counter[str] = Counter()
    claims = _unrepeated(_claims(data, counts), counts)
    ranked = Counter(claim.page for claim in claims if claim.page)
    order = [page for page, _ in sorted(ranked.items(), key=lambda item: (-item[1], item[0]))]
    learnable = {claim.page for claim in claims if claim.part != "validation"}
    texts = _pages(data, set(order))
    pages: list[Document] = []
    for page in order:
        if len(pages) == top:
            break
        if page not in texts:
            counts["pages without text"] += 1
        elif page not in learnable:
            counts["pages without claims to learn from"] += 1
        else:
            pages.append(texts[page])
    if not pages:
        raise DataError(f"--data {data}: no page has both text and claims")
    kept = {page.id for page in pages}
    own = [claim for claim in claims if claim.page in kept]
    spare = [claim for claim in claims if claim.page is None]
    counts["claims of other pages"] = len(claims) - len(own) - len(spare)
    filled = _filled(own, spare, random.Random(f"{seed}/fill"), counts)
    split = _by_claim if how == "claim" else _by_page
    found = list(split(filled, random.Random(f"{seed}/split")))
    for part in ("train", "validation"):
        if len({claim.label for claim in found if claim.part == part}) < 2:
            raise DataError(f"--data {data}: too few claims on {len(pages)} pages: {part} has fewer than two labels")
    decided = {claim.label for claim in found if claim.part == "train"} & {*LABELS[:2]}
    if len(decided) < 2:
        raise DataError(
            f"--data {data}: too few claims on {len(pages)} pages: none to learn from of {' or '.join(LABELS[:2])}"
        )
    asked = {claim.id for claim in drawn([claim for claim in found if claim.part == "validation"], limit, seed)}
    found = [claim for claim in found if claim.part == "train" or claim.id in asked]
    return Fever(tuple(pages), tuple(found), dict(counts))


# -- reading -------------------------------------------------------------------------------------------------


def _files(data: Path) -> dict[Path, str]:
    """The folder's files, and those that the Hub keeps in folders of its own, by the names that say what they hold."""
    found = {path for path in data.iterdir() if path.suffix in (".jsonl", ".gz", ".parquet")}
    found |= set(data.rglob("*.parquet"))
    return {path: str(path.relative_to(data)) for path in sorted(found) if path.is_file()}


def _claims(data: Path, counts: Counter[str]) -> Iterator[Claim]:
    files = {path: name for path, name in _files(data).items() if not _OTHER & set(_WORD.findall(name))}
    if not files:
        raise DataError(f"--data {data}: holds no files of claims (.jsonl or .parquet)")
    named = set(map(_part_of, files.values()))
    for path, name in files.items():
        part = _part_of(name) if named >= {"train", "validation"} else None
        for number, row in _rows(path, ("claim", "label")):
            if row["label"] in ("", None):
                counts["claims without a label"] += 1  # the Hub's unlabelled splits
            else:
                yield _claim(path, number, row, part)


def _part_of(name: str) -> Part | None:
    if "train" in name:
        return "train"
    return "validation" if "dev" in name or "valid" in name else None


def _rows(path: Path, needed: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix != ".parquet":
        yield from read_objects(path, needed)
        return
    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError("--data: parquet files need the extra: pip install 'byheart[hub]'") from None
    try:
        found = load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # datasets raises many types, also its own; each ends in one sentence
        raise DataError(f"{path}: not a parquet file that can be read ({first_line(error)})") from error
    for key in needed:
        if key not in found.column_names:
            raise DataError(f'{path}: has no column "{key}"')
    yield from enumerate((dict(row) for row in found), 1)


def _claim(path: Path, number: int, row: dict[str, Any], part: Part | None) -> Claim:
    text, label = row["claim"], row["label"]
    known = isinstance(label, str) and label.lower() in LABELS
    if not isinstance(text, str) or not text.strip() or not known:
        raise DataError(f"{path}:{number}: a claim needs a text and one of the labels {', '.join(LABELS)}")
    third = label.lower() == _THIRD
    page = None if third else _page_of(row)
    if page is None and not third:
        raise DataError(f'{path}:{number}: "evidence" names no page')
    return Claim(str(row.get("id", f"{path.name}-{number}")), " ".join(text.split()), label.lower(), page, part)


def _page_of(row: dict[str, Any]) -> str | None:
    """The page of a claim in any of the three forms: named, the Hub's column, or the first of the evidence sets."""
    named = row.get("page") or row.get("evidence_wiki_url")
    if named:
        return _name(named)
    evidence = row.get("evidence")
    for some in evidence if isinstance(evidence, list) else ():
        for piece in some if isinstance(some, list) else ():
            if isinstance(piece, list) and len(piece) >= 3 and piece[2]:
                return _name(piece[2])
    return None


def _name(page: Any) -> str:
    """A page's name, composed: the files' claims and pages do not write accents alike."""
    return unicodedata.normalize("NFC", str(page))


def _pages(data: Path, wanted: set[str]) -> dict[str, Document]:
    """The wanted pages that have a text; a dump is streamed."""
    files = sorted((data / "wiki-pages").rglob("*.jsonl"))
    files += [path for path, name in _files(data).items() if "pages" in _WORD.findall(name)]
    if not files:
        raise DataError(f"--data {data}: holds no pages (wiki-pages/ or pages.jsonl)")
    found: dict[str, Document] = {}
    for path in files:
        for number, row in _rows(path, ("text",)):
            id = row.get("page_id", row.get("id"))
            if id is None:
                raise DataError(f'{path}:{number}: "id" is missing')
            if (page := _name(id)) in wanted and isinstance(row["text"], str) and row["text"].strip():
                title = str(row.get("title") or _plain(page).replace("_", " "))
                found[page] = Document(id=page, title=title, text=" ".join(_plain(row["text"]).split()))
    return found


def _plain(text: str) -> str:
    """FEVER writes brackets and colons as -LRB-, -RRB- and -COLON-."""
    for written, meant in (("-LRB-", "("), ("-RRB-", ")"), ("-LSB-", "["), ("-RSB-", "]"), ("-COLON-", ":")):
        text = text.replace(written, meant)
    return text


def _unrepeated(claims: Iterable[Claim], counts: Counter[str]) -> list[Claim]:
    """Each wording once: the same claim must not be learnt and measured. (The Hub has a row an evidence sentence.)

    Claims that files give the same id are told apart by a number behind it.
    """
    kept: dict[str, Claim] = {}
    for claim in claims:
        text = claim.text.lower()
        other = kept.get(text)
        if other is None:
            kept[text] = claim
        elif other.id != claim.id:
            counts["claims worded as another"] += 1
            if claim.part == "validation" and other.part == "train":
                kept[text] = claim
    seen: Counter[str] = Counter()
    return [replace(claim, id=told_apart(claim.id, seen)) for claim in kept.values()]


# -- filling up and splitting --------------------------------------------------------------------------------


def _filled(own: list[Claim], spare: list[Claim], draw: random.Random, counts: Counter[str]) -> list[Claim]:
    by_page: dict[str, list[Claim]] = defaultdict(list)
    for claim in own:
        by_page[claim.page or ""].append(claim)
    left: dict[Part | None, list[Claim]] = defaultdict(list)
    for claim in spare:
        left[claim.part].append(claim)
    for some in left.values():
        draw.shuffle(some)
    found = list(own)
    for page, claims in sorted(by_page.items()):
        for part in sorted({claim.part for claim in claims}, key=str):
            wanted = -(-sum(claim.part == part for claim in claims) // 2)
            taken, left[part] = left[part][:wanted], left[part][wanted:]
            found += [replace(claim, page=page) for claim in taken]
            counts["claims of the third class drawn for pages"] += len(taken)
            counts["claims of the third class that are lacking"] += wanted - len(taken)
    return found


def _by_claim(claims: list[Claim], draw: random.Random) -> Iterator[Claim]:
    groups: dict[tuple[str, str], list[Claim]] = defaultdict(list)
    for claim in claims:
        if claim.part:
            yield claim
        else:
            groups[claim.page or "", claim.label].append(claim)
    owed = 0.0
    last = {page: label for page, label in sorted(groups) if label != _THIRD}
    learnable = {claim.page for claim in claims if claim.part == "train" and claim.label != _THIRD}
    for (page, label), some in sorted(groups.items()):
        draw.shuffle(some)
        # What rounding takes from one group the next one gets.
        owed += _TRAIN_SHARE * len(some)
        count = max(0, min(round(owed), len(some)))
        if label == last.get(page) and page not in learnable:
            count = max(count, 1)  # of each page one claim at least that it decides is learnt
        owed -= count
        if count and label != _THIRD:
            learnable.add(page)
        yield from (replace(claim, part="train" if n < count else "validation") for n, claim in enumerate(some))


def _by_page(claims: list[Claim], draw: random.Random) -> Iterator[Claim]:
    pages = sorted({claim.page or "" for claim in claims})
    draw.shuffle(pages)
    train = set(pages[: round(_TRAIN_SHARE * len(pages))])
    yield from (replace(claim, part="train" if claim.page in train else "validation") for claim in claims)
