"""Every cleaning step: what it changes or removes, what it leaves alone, which settings it refuses."""

import pytest

from fastformer.data.cleaning_steps import (
    FilterLanguage,
    FilterLength,
    NormalizeSpelling,
    NormalizeUnicode,
    RemoveControlCharacters,
    RemoveExactDuplicates,
    RemoveMarkup,
    RemoveNearDuplicates,
    RepairEncoding,
)
from fastformer.data.corpora import Document
from fastformer.data.pii import MaskPII


def documents(*texts):
    return [Document(f"d{number}", text) for number, text in enumerate(texts)]


def test_unicode_forms():
    assert NormalizeUnicode().edit("e\u0301 ﬁ") == "é ﬁ"
    assert NormalizeUnicode("NFKC").edit("e\u0301 ﬁ") == "é fi"
    with pytest.raises(ValueError, match="form: got 'nfc', expected one of NFC, NFD, NFKC, NFKD"):
        NormalizeUnicode("nfc")


@pytest.mark.parametrize(
    "text, repaired",
    [
        ("The Mona Lisa doesnâ€™t have eyebrows.", "The Mona Lisa doesn’t have eyebrows."),
        ("schÃ¶n", "schön"),
        ("“quoted” — ﬁne &amp; ｗｉｄｅ\x07", "“quoted” — ﬁne &amp; ｗｉｄｅ\x07"),  # no matter of encoding
        ("plain", "plain"),
    ],
)
def test_encodings(text, repaired):
    pytest.importorskip("ftfy", reason="the package ftfy is not installed")
    assert RepairEncoding().edit(text) == repaired


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("a\x00b\x07c\x7f\x85d", "abc\nd"),
        ("one\r\ntwo\rthree\u2028four\tfive\n", "one\ntwo\nthree\nfour\tfive\n"),
        ("\ufeffzero\u200bwidth \u202eright\u202c", "zerowidth right"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\ud800lone", "lone"),
        ("👩\u200d💻 می\u200cخواهم", "👩\u200d💻 می\u200cخواهم"),  # joiners carry meaning
    ],
)
def test_control_characters(text, cleaned):
    assert RemoveControlCharacters().edit(text) == cleaned


@pytest.mark.parametrize(
    "markup, text",
    [
        ("<p>Hello <b>wor</b>ld &amp; all</p><p>two<br>three</p>", "Hello world & all\ntwo\nthree"),
        ("<html><style>p {}</style><script>if (a < b) x();</script><body>seen<!-- not seen --></body>", "seen"),
        ("<table><tr><td>1</td><td>2</td></tr><tr><td>3</td><td>4</td></tr></table>", "1\t2\n3\t4"),
        ('<A HREF="x">Link</A> and List<int> stays, a < b too', "Link and List<int> stays, a < b too"),
        ("fish &amp; chips &#8364;5 &copy=1 AT&T", "fish & chips €5 &copy=1 AT&T"),
        ("<p>unclosed <!-- comment", "unclosed <!-- comment"),
        ("no markup:  List<int>\n\n\n\na<x> c", "no markup:  List<int>\n\n\n\na<x> c"),
        ("# Title\n*em* \\alpha $x<y$  \n", "# Title\n*em* \\alpha $x<y$  \n"),
    ],
)
def test_markup(markup, text):
    assert RemoveMarkup().edit(markup) == text


def test_markdown_where_it_is_asked_for():
    pytest.importorskip("markdown_it", reason="the package markdown-it-py is not installed")
    text = "# Title\n\nSome *words*, a [link](http://x.y) and `a < b`.\n\n- one\n- two\n"
    assert RemoveMarkup(markdown=True).edit(text) == "Title\nSome words, a link and a < b.\none\ntwo"


def test_language():
    pytest.importorskip("py3langid", reason="the package py3langid is not installed")
    english = "This is a sentence in the English language, and it is long enough to be recognised as such."
    german = "Das ist ein deutscher Satz, der hier eigentlich nicht stehen sollte, weil sonst alles englisch ist."
    step = FilterLanguage("en", 0.8)
    step.begin()
    kept, removed, unsure = step.process(documents(english, german, "a b"))
    assert kept.text == english and removed.reason.startswith("language de (1.00")
    assert unsure.reason.startswith("language ")
    assert FilterLanguage("de").process(documents(german))[0].text == german
    with pytest.raises(ValueError, match=r"language: 'xx' is none that py3langid knows: .*de, .*en"):
        FilterLanguage("xx").begin()


@pytest.mark.parametrize("settings", [{"language": "English"}, {"minimum_probability": 80}, {"characters": 0}])
def test_language_settings(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: got"):
        FilterLanguage(**settings)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"min_characters": 11}, None),
        ({"min_characters": 12}, "11 characters, fewer than 12"),
        ({"max_characters": 10}, "11 characters, more than 10"),
        ({"min_words": 3}, "2 words, fewer than 3"),
        ({"max_words": 1}, "2 words, more than 1"),
    ],
)
def test_length(settings, reason):
    assert FilterLength(**settings).reason(Document("d", "hello world")) == reason


def test_length_settings():
    with pytest.raises(ValueError, match="max_words: got 4, expected a number from 5"):
        FilterLength(min_words=5, max_words=4)


def test_exact_duplicates():
    step = RemoveExactDuplicates()
    step.begin()
    first = step.process(documents("a b", "A  b", "a b"))
    assert [getattr(entry, "repeats", "") for entry in first] == ["", "", "d0"]
    assert step.process(documents("a b"))[0].reason == "repeats d0", "remembered from batch to batch"
    step.begin()
    assert step.process(documents("a b"))[0].text == "a b", "and forgotten in the next run"
    step = RemoveExactDuplicates(ignore_case=True, ignore_whitespace=True)
    step.begin()
    assert step.process(documents("a b", " A\nB "))[1].repeats == "d0"


def test_near_duplicates_name_the_document_they_repeat():
    pytest.importorskip("rensa", reason="the package rensa is not installed")
    text = " ".join(f"word{n}" for n in range(200))
    step = RemoveNearDuplicates()
    step.begin()
    step.process(documents("something else entirely in a batch of its own"))
    kept, removed = step.process([Document("one", text), Document("two", text + " and a tail")])
    assert kept.name == "one" and removed.repeats == "one" and 0.9 < removed.similarity < 1
    assert removed.reason == f"repeats one (similarity {removed.similarity:.2f})"
    with pytest.raises(ValueError, match="threshold: got 8"):
        RemoveNearDuplicates(threshold=8)


def test_spelling():
    step = NormalizeSpelling(table={"colour": "color", "per cent": "percent"})
    assert step.edit("Colour, COLOUR; colours, discolour") == "Color, COLOR; colours, discolour"
    with pytest.raises(ValueError, match="to: got 'us'"):
        NormalizeSpelling("us")
    pytest.importorskip("breame", reason="the package breame is not installed")
    assert NormalizeSpelling().edit("The colour of Aluminium") == "The color of Aluminum"
    assert NormalizeSpelling("british").edit("The color of the theater") == "The colour of the theatre"


@pytest.mark.parametrize(
    "text, masked",
    [
        ("jane.doe+x@mail.example.co.uk, a@b", "<EMAIL>, a@b"),
        ("IBAN DE89 3704 0044 0532 0130 00 or GB82WEST12345698765432.", "IBAN <IBAN> or <IBAN>."),
        ("DE88 3704 0044 0532 0130 00", "DE88 3704 0044 0532 0130 00"),  # its check digits are wrong
        ("4111 1111 1111 1111 and 5500-0000-0000-0004", "<CARD> and <CARD>"),
        ("4111 1111 1111 1112", "4111 1111 1111 1112"),  # Luhn says no
        ("192.168.1.10, 2001:db8::ff00:42:8329, fe80::1.", "<IP>, <IP>, <IP>."),
        ("999.1.1.1 at 12:30:45, version 1.2.3.4.5", "999.1.1.1 at 12:30:45, version 1.2.3.4.5"),
        ("Call +1 650-253-0000 or +49 30 901820", "Call <PHONE> or <PHONE>"),
        ("In 1984 and 2,000,000 others", "In 1984 and 2,000,000 others"),
    ],
)
def test_personal_data(text, masked):
    for package in ("phonenumbers", "stdnum"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    assert MaskPII().edit(text) == masked


def test_personal_data_settings():
    pytest.importorskip("phonenumbers", reason="the package phonenumbers is not installed")
    national = "Call (650) 253-0000 or a@b.org"
    assert MaskPII(kinds=["phone"]).edit(national) == national
    assert MaskPII(kinds=["phone"], region="US").edit(national) == "Call <PHONE> or a@b.org"
    with pytest.raises(ValueError, match="kinds: got 'name', expected some of email, iban, card, ip, phone"):
        MaskPII(kinds=["name"])
    with pytest.raises(ValueError, match="region: got 'usa'"):
        MaskPII(region="usa")


def test_a_text_of_which_nothing_is_left_is_removed():
    (removed,) = RemoveMarkup().process(documents("<p><br></p>"))
    assert removed.reason == "nothing is left of it"
