"""The steps a cleaning pipeline is made of.

A step is a dataclass of its settings. :class:`Edit` steps change a text, :class:`Filter` steps give a reason to remove
a document; both see one document at a time. The two that look for repetitions remember what they have seen, from
``begin()`` on, and take documents in batches. Packages do what has its own literature: ftfy repairs encodings,
py3langid knows languages, markdown-it renders Markdown, rensa makes MinHash signatures.
"""

from __future__ import annotations

import functools
import hashlib
import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any, NamedTuple

from ..extras import require
from .corpora import Document
from .near_duplicates import NearDuplicates, check_settings


class Removed(NamedTuple):
    """Takes a document's place in what a step returns.

    Attributes:
        reason: to print.
        repeats: name of the document that it repeats, where that is the reason.
        similarity: of the two.
    """

    reason: str
    repeats: str | None = None
    similarity: float = 1.0


class Step:
    """One step; a subclass is a dataclass, checked in ``__post_init__``, its docstring says what it does."""

    def begin(self) -> None:
        """Forgets what was seen before."""

    def process(self, documents: Sequence[Document]) -> list[Document | Removed]:
        """What becomes of each document, in order."""
        raise NotImplementedError


class Edit(Step):
    """A step that changes texts."""

    def edit(self, text: str) -> str:
        """The text as it should be."""
        raise NotImplementedError

    def process(self, documents: Sequence[Document]) -> list[Document | Removed]:
        done: list[Document | Removed] = []
        for document in documents:
            text = self.edit(document.text)
            if text == document.text:
                done.append(document)
            elif text.strip():
                done.append(Document(document.name, text, document.metadata))
            else:
                done.append(Removed("nothing is left of it"))
        return done


class Filter(Step):
    """A step that removes documents."""

    def reason(self, document: Document) -> str | None:
        """Why to remove it; None to keep it."""
        raise NotImplementedError

    def process(self, documents: Sequence[Document]) -> list[Document | Removed]:
        reasons = map(self.reason, documents)
        return [Removed(reason) if reason else document for document, reason in zip(documents, reasons)]


@dataclass
class NormalizeUnicode(Edit):
    """The same character always as the same code points (Unicode Standard Annex 15)."""

    form: str = "NFC"

    def __post_init__(self) -> None:
        _choice("form", self.form, ("NFC", "NFD", "NFKC", "NFKD"))

    def edit(self, text: str) -> str:
        return unicodedata.normalize(self.form, text)


@dataclass
class RepairEncoding(Edit):
    """Undoes text that was decoded with the wrong encoding, such as â€œ for “ (ftfy)."""

    def edit(self, text: str) -> str:
        if text.isascii():
            return text
        ftfy = require("ftfy", "repairing encodings", "data")
        return ftfy.fix_text(text, _only_encoding(ftfy))


@functools.cache
def _only_encoding(ftfy: Any) -> Any:
    """ftfy's settings with everything off that is no matter of encoding; other steps, or nobody, asked for those."""
    return ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
    )


_LINE_ENDS = re.compile("\r\n?|[\u0085\u2028\u2029]")
_CONTROLS = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]"  # a terminal's colours and movements, before the escape itself is gone
    "|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    "|[\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff]"
    "|[\ud800-\udfff]"
)


@dataclass
class RemoveControlCharacters(Edit):
    """Takes out what is not text: control and direction marks, terminal escapes, byte-order marks, lone surrogates.

    Tabs and line feeds stay; other line ends become line feeds. Joiners stay: Persian, Hindi and emoji need them.
    """

    def edit(self, text: str) -> str:
        return _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))


@dataclass
class RemoveMarkup(Edit):
    """Leaves what a reader of an HTML page sees: no tags, scripts, styles and comments; entities as characters.

    Only names of HTML elements count as tags, so ``List<int>`` and ``a < b`` stay. Markdown and LaTeX stay as well.

    Args:
        markdown: renders Markdown first, and leaves what a reader of that sees (markdown-it-py).
    """

    markdown: bool = False

    def edit(self, text: str) -> str:
        if self.markdown:
            text = (
                require("markdown_it", "rendering Markdown", "data")
                .MarkdownIt("commonmark")
                .enable("table")
                .render(text)
            )
        if "&" in text:
            text = _AMPERSAND.sub("&amp;", text)
        if not _TAG.search(text):
            return html.unescape(text) if "&" in text else text
        comments_end = text.rfind("-->")
        page = _Page()
        page.feed(
            _LESS.sub(
                lambda less: "<" if text.startswith("!--", less.end()) and less.start() < comments_end else "&lt;", text
            )
        )
        page.close()
        return page.text()


_BLOCKS = frozenset(
    "address article aside blockquote body br caption center dd details dialog dir div dl dt fieldset "
    "figcaption figure footer form frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html legend li main menu "
    "nav ol optgroup option p pre search section summary table tbody tfoot thead title tr ul".split()
)
_UNSEEN = frozenset(("script", "style", "template", "noscript"))
_ELEMENTS = (
    _BLOCKS
    | _UNSEEN
    | frozenset(
        "a abbr acronym applet area audio b base basefont bdi bdo big button canvas cite code col colgroup data "
        "datalist del dfn em embed font frame i iframe img input ins kbd label link map mark meta meter "
        "noframes object output param picture progress q rp rt ruby s samp select slot small source span strike "
        "strong sub sup svg td textarea th time track tt u var video wbr math".split()
    )
)
_KNOWN = rf"/?(?:{'|'.join(sorted(_ELEMENTS))})(?:[\s/][^<>]*)?>"
_TAG = re.compile(rf"<(?:{_KNOWN}|!--|!DOCTYPE\b)", re.IGNORECASE)
# What begins no entity and no tag, nor anything unseen: html.parser reads "&copy=1" and "<int" its own way.
_AMPERSAND = re.compile(r"&(?!(?:#\d+|#x[0-9a-f]+|[a-z]\w{1,30});)", re.IGNORECASE)
_LESS = re.compile(rf"<(?!{_KNOWN}|!DOCTYPE\b[^<>]*>)", re.IGNORECASE)
_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*\n")


class _Page(HTMLParser):
    """Collects the text of a page; a block begins and ends a line, cells of a table are parted by tabs."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._unseen = 0

    def text(self) -> str:
        lines = (line.rstrip() for line in "".join(self._parts).split("\n"))
        return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._unseen += tag in _UNSEEN
        self._lay_out(tag)

    def handle_endtag(self, tag: str) -> None:
        self._unseen -= tag in _UNSEEN and self._unseen > 0
        if tag != "br":
            self._lay_out(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self._lay_out(tag)

    def handle_data(self, data: str) -> None:
        between_blocks = data.isspace() and self._parts and self._parts[-1].endswith("\n")
        if not self._unseen and not between_blocks:
            self._parts.append(data)

    def _lay_out(self, tag: str) -> None:
        if tag in ("td", "th"):
            if self._parts and not self._parts[-1].endswith(("\n", "\t")):
                self._parts.append("\t")
        elif tag == "br" or (tag in _BLOCKS and self._parts and not self._parts[-1].endswith("\n")):
            self._parts.append("\n")


@dataclass
class FilterLanguage(Filter):
    """Keeps documents in one language (py3langid).

    Args:
        language: its ISO 639 code.
        minimum_probability: below it a document is removed too.
        characters: how many of a document's first are looked at; the answer rarely needs more.
    """

    language: str = "en"
    minimum_probability: float = 0.8
    characters: int = 2000

    def __post_init__(self) -> None:
        _range("minimum_probability", self.minimum_probability, 0, 1)
        _range("characters", self.characters, 1)
        if not re.fullmatch("[a-z]{2,3}", self.language):
            raise ValueError(f"language: got {self.language!r}, expected an ISO 639 code such as 'en'")

    def begin(self) -> None:
        labels = _language_identifier().labels
        if self.language not in labels:
            raise ValueError(f"language: {self.language!r} is none that py3langid knows: {', '.join(sorted(labels))}")

    def reason(self, document: Document) -> str | None:
        language, probability = _language_identifier().classify(document.text[: self.characters])
        if language == self.language and probability >= self.minimum_probability:
            return None
        return f"language {language} ({probability:.2f})"


@functools.cache
def _language_identifier() -> Any:
    langid = require("py3langid.langid", "telling languages apart", "data")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@dataclass
class FilterLength(Filter):
    """Removes what is too short or too long; a limit of None is none."""

    min_characters: int = 1
    max_characters: int | None = None
    min_words: int = 0
    max_words: int | None = None

    def __post_init__(self) -> None:
        for least, most in (("min_characters", "max_characters"), ("min_words", "max_words")):
            low, high = getattr(self, least), getattr(self, most)
            _range(least, low, 0)
            if high is not None:
                _range(most, high, low)

    def reason(self, document: Document) -> str | None:
        limits = [("characters", len(document.text), self.min_characters, self.max_characters)]
        if self.min_words or self.max_words is not None:
            limits.append(("words", len(document.text.split()), self.min_words, self.max_words))
        for unit, length, least, most in limits:
            if length < least:
                return f"{length} {unit}, fewer than {least}"
            if most is not None and length > most:
                return f"{length} {unit}, more than {most}"
        return None


@dataclass
class RemoveExactDuplicates(Step):
    """Removes a text that came before (BLAKE2b of 16 bytes; a document kept takes about 150 bytes and its name).

    Args:
        ignore_case: capitals make no difference.
        ignore_whitespace: neither do spaces and line ends.
    """

    ignore_case: bool = False
    ignore_whitespace: bool = False

    def begin(self) -> None:
        self._seen: dict[bytes, str] = {}

    def process(self, documents: Sequence[Document]) -> list[Document | Removed]:
        done: list[Document | Removed] = []
        for document in documents:
            text = document.text.casefold() if self.ignore_case else document.text
            text = " ".join(text.split()) if self.ignore_whitespace else text
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            first = self._seen.get(digest)
            if first is None:
                self._seen[digest] = document.name
                done.append(document)
            else:
                done.append(Removed(f"repeats {first}", first))
        return done


@dataclass
class RemoveNearDuplicates(Step):
    """Removes what says nearly the same as a document before it; settings as for :class:`NearDuplicates`."""

    threshold: float = 0.8
    shingle_size: int = 5
    unit: str = "word"
    num_hashes: int = 128
    verify: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self.threshold, self.shingle_size, self.unit, self.num_hashes)

    def begin(self) -> None:
        settings = (self.threshold, self.shingle_size, self.unit, self.num_hashes, self.verify, self.seed)
        self._finder = NearDuplicates(*settings)
        self._names: list[str] = []

    def process(self, documents: Sequence[Document]) -> list[Document | Removed]:
        self._names += [document.name for document in documents]
        done: list[Document | Removed] = []
        for document, repeat in zip(documents, self._finder.add([document.text for document in documents])):
            if repeat is None:
                done.append(document)
            else:
                first = self._names[repeat.of]
                done.append(Removed(f"repeats {first} (similarity {repeat.similarity:.2f})", first, repeat.similarity))
        return done


@dataclass
class NormalizeSpelling(Edit):
    """One spelling where English has two (breame's table of 1,730 words), or a table of your own.

    Args:
        to: "american" or "british".
        table: words in lower case and what to write for them, in place of that table. Capitals are kept.
    """

    to: str = "american"
    table: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        _choice("to", self.to, ("american", "british"))
        self._words: Mapping[str, str] | None = self.table

    def edit(self, text: str) -> str:
        if self._words is None:
            spellings = require("breame.data.spelling_constants", "normalising spelling", "data")
            american = self.to == "american"
            self._words = spellings.BRITISH_ENGLISH_SPELLINGS if american else spellings.AMERICAN_ENGLISH_SPELLINGS
        words = self._words

        def replace(match: re.Match[str]) -> str:
            word = match[0]
            other = words.get(word.lower())
            if other is None:
                return word
            return (
                other.upper()
                if word.isupper() and len(word) > 1
                else other.capitalize()
                if word[0].isupper()
                else other
            )

        return _WORD.sub(replace, text)


_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


def _choice(name: str, value: object, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(accepted)}")


def _range(name: str, value: Any, least: float, most: float = float("inf")) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(
            f"{name}: got {value!r}, expected a number from {least}" + (f" to {most}" if most < 1e300 else "")
        )
