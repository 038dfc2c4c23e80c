"""The readers on a few lines in the format of each package, and that nothing held out was trained on."""

import pytest

from examples.datasets import (
    TOPICS,
    evenly,
    help_pages,
    long_paragraphs,
    movie_reviews,
    package_descriptions,
    paragraphs,
    pronunciations,
    split,
    split_pronunciations,
    unlabelled_reviews,
    wordnet_glosses,
)
from tests.examples.small_data import sentiment


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_reviews_by_the_sign_of_their_rating(tmp_path):
    file = written(tmp_path / "r.txt", "1\t2.27\tA ''true''\tgem.\n2\t-0.6\tTepid\n3\t0.0\tNeither\nbroken\n\n")
    assert movie_reviews(file) == [
        {"text": 'A "true"\tgem.', "label": "positive"},
        {"text": "Tepid", "label": "negative"},
    ]


def test_reviews_are_unpacked_from_the_archive_in_the_package(tmp_path):
    sentiment(tmp_path / "cache")
    assert len(movie_reviews()) == 152  # one in twenty has no sentiment
    assert len(unlabelled_reviews()) == 60


def test_glosses_have_the_topic_of_their_lexicographer_file(tmp_path):
    file = written(
        tmp_path / "data.noun",
        "  1 This software and database is being provided | to you\n"
        '02084071 05 n 03 dog 0 domestic_dog 0 001 @ 02083346 n 0000 | a member of the genus Canis; "the dog"  \n'
        "15113229 28 n 01 time 0 000 | an amount of time | and more  \n",
    )
    assert len(TOPICS) == 26
    assert wordnet_glosses(file) == [
        {"text": 'a member of the genus Canis; "the dog"', "label": "animal"},
        {"text": "an amount of time | and more", "label": "time"},
    ]


def test_pronunciations_lose_stress_and_comments_and_keep_variants(tmp_path):
    lines = [
        "aalborg AO1 L B AO0 R G # place, danish",
        "aalborg(2) AA1 L B AO0 R G",
        "'em AH0 M",
        *("read R IY1 D", "read(2) R EH1 D", "read(3) R EH0 D"),
    ]
    file = written(tmp_path / "d", "\n".join(lines) + "\n")
    assert pronunciations(file) == [
        {"source": "aalborg", "targets": ["AO L B AO R G", "AA L B AO R G"]},
        {"source": "'em", "targets": ["AH M"]},
        {"source": "read", "targets": ["R IY D", "R EH D"]},
    ]


def test_words_are_split_as_the_published_results_split_them():
    words = [{"source": f"w{i}", "targets": ["A"]} for i in range(50)]
    parts = split_pronunciations(words)
    assert [e["source"] for e in parts.validation] == ["w0", "w20", "w40"]
    assert [e["source"] for e in parts.test] == ["w1", "w2", "w21", "w22", "w41", "w42"]
    assert len(parts.train) == 41 and not {e["source"] for e in parts.train} & {"w0", "w1", "w2"}


def test_paragraphs_are_those_with_an_id_and_the_first_of_each():
    html = (
        "<title>no</title><script>document.write(\"<p id='s'>no</p>\")</script><p>no id</p>"
        '<h2 id="hd_1"><a name="x"></a>Heading &amp; more</h2>'
        '<p class="c" id="par_1">One <span>two</span>\n   three<br>four</p> between <p id="par_1">again</p>'
        '<p id="par_2"><img src="x"></p>'
    )
    assert paragraphs(html) == {"hd_1": "Heading & more", "par_1": "One two three four"}


def test_help_is_aligned_by_page_and_id(tmp_path):
    pages = {
        "en/a.html": '<p id="1">Open the file</p><p id="2">Only here</p><p id="3">123 + 4</p><p id="4">Name</p>',
        "de/a.html": '<p id="3">123 + 4</p><p id="1">Öffnen Sie die Datei</p><p id="4">Name</p>',
        "en/sub/b.html": '<p id="1">Close it</p><p id="9">Open the file</p><p id="8">Yes</p>',
        "de/sub/b.html": f'<p id="1">Schließen</p><p id="9">Öffnen Sie die Datei</p><p id="8">{"Ja, " * 20}</p>',
        "en/c.html": '<p id="1">No such page</p>',
    }
    for name, html in pages.items():
        written(tmp_path / name, html)
    assert help_pages(tmp_path / "en", tmp_path / "de") == [
        {"source": "Open the file", "target": "Öffnen Sie die Datei", "page": "a.html"},
        {"source": "Close it", "target": "Schließen", "page": "sub/b.html"},
    ]


def test_descriptions_are_unwrapped_and_kept_once(tmp_path):
    file = written(
        tmp_path / "Translation-en",
        "Package: foo\nDescription-md5: 1\nDescription-en: editor of\tfiles\n It edits\n files.\n .\n Features:\n"
        "  * fast\n  * small\n\n"
        "Package: foo-dbg\nDescription-md5: 1\nDescription-en: editor of files\n It edits\n files.\n .\n Features:\n"
        "  * fast\n  * small\n\n"
        "Package: empty\nDescription-en: nothing more\n",
    )
    (found,) = package_descriptions(file)
    assert found == {
        "source": "It edits files.\nFeatures:\n* fast\n* small",
        "target": "editor of files",
        "package": "foo",
    }
    assert long_paragraphs({"source": "short\n" + "x" * 61}) == ["x" * 61]


def numbered(count):
    return [{"text": f"text {chr(97 + i % 26)}{chr(97 + i // 26)}", "group": str(i // 3)} for i in range(count)]


def test_split_keeps_groups_together_and_does_not_move_when_there_is_more():
    first = split(numbered(300), lambda e: e["group"])
    groups = [{e["group"] for e in part} for part in (first.train, first.validation, first.test)]
    assert sum(map(len, groups)) == 100 and not groups[0] & groups[1] and not groups[0] & groups[2]
    assert 10 <= len(first.test) <= 60 and 3 <= len(first.validation) <= 40
    more = split(numbered(600), lambda e: e["group"])
    assert all(e in more.test for e in first.test) and all(e in more.train for e in first.train)


def test_split_leaves_out_what_resembles_a_training_example():
    examples = numbered(200)
    parts = split(examples, lambda e: e["text"])
    copies = [{"text": parts.test[0]["text"].upper().replace(" ", "  ")}, {"text": "Take 12"}, {"text": "take 7"}]
    again = split([*examples, *copies], lambda e: e["text"], lambda e: [e["text"]])
    held_out = {e["text"].casefold() for e in (*again.test, *again.validation)}
    trained = {" ".join(e["text"].casefold().split()) for e in again.train}
    assert not held_out & trained
    assert ("take 12" in held_out) + ("take 7" in held_out) != 1  # alike but for digits: not on both sides


def test_split_of_too_little_is_refused():
    with pytest.raises(ValueError, match="too few to split"):
        split(numbered(2), lambda e: "same")


@pytest.mark.parametrize("count, expected", [(0, list("abcdef")), (3, list("ace")), (9, list("abcdef"))])
def test_evenly(count, expected):
    assert evenly("abcdef", count) == expected
