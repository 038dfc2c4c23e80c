"""Clean text: of results, as it is made, and cut at stop strings; with the tokenizers of all three libraries."""

import pytest
import torch
import transformers

from fastformer.data import BPETokenizer, CharTokenizer
from fastformer.generation import TextStreamer, to_text
from tests.generation.pairs import models

tokenizers = pytest.importorskip("tokenizers")

TEXT = "the quick brown fox, naïve 😀 日本, jumps over the lazy dog. ROMEO: who is there?\n" * 8
PAD_TEXT, END_TEXT = "<pad>", "<|endoftext|>"


@pytest.fixture(scope="module")
def kinds():
    """One byte-level vocabulary of 300 tokens in each library's tokenizer."""
    ours = BPETokenizer.train([TEXT], vocab_size=299)
    plain = ours._tokenizer
    plain.add_special_tokens([PAD_TEXT])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=END_TEXT, pad_token=PAD_TEXT)
    return {"fastformer": ours, "tokenizers": plain, "transformers": theirs}


@pytest.fixture(scope="module")
def pair():
    return models(vocab_size=300, eos_token_id=0, bos_token_id=0, n_positions=128)


@pytest.fixture(params=["fastformer", "tokenizers", "transformers"])
def tokenizer(request, kinds):
    return kinds[request.param]


def encode(kinds, *texts):
    """Left-padded ids and mask."""
    rows = [kinds["fastformer"].encode(text) for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([[299] * (length - len(row)) + row for row in rows])
    return ids, (ids != 299).long()


def test_special_tokens_and_padding_are_removed(kinds, tokenizer):
    prompt, _ = encode(kinds, "the fox", "who is there, naïve 😀?")
    new = torch.tensor([[*kinds["fastformer"].encode(" jumps")[:3], 0, 299, 299]] * 2)
    end = kinds["fastformer"].decode(new[0, :3].tolist())
    out = torch.cat((prompt, new), 1)
    ids = {"eos_token_id": 0, "pad_token_id": 299}
    assert to_text(out, tokenizer, skip_prompt=prompt, **ids) == [end, end]
    assert to_text(out, tokenizer, skip_prompt=prompt.shape[1], **ids) == [end, end]
    assert to_text(out, tokenizer, **ids) == ["the fox" + end, "who is there, naïve 😀?" + end]
    assert to_text(new[0], tokenizer, **ids) == [end]
    after = torch.cat((new, prompt), 1)  # what follows an end token is no text of the model's
    assert to_text(torch.cat((prompt, after), 1), tokenizer, skip_prompt=prompt, eos_token_id=0) == [end, end]
    with pytest.raises(ValueError, match="skip_prompt"):
        to_text(out, tokenizer, skip_prompt=-1)


def test_text_is_cut_at_the_first_stop_string(kinds, tokenizer):
    ids, _ = encode(kinds, "ROMEO: the dog. ROMEO: jumps", "no stop")
    found = to_text(ids, tokenizer, skip_prompt=0, stop_strings=["jumps", ". R"], pad_token_id=299)
    assert found == ["ROMEO: the dog", "no stop"]
    assert to_text(ids, tokenizer, stop_strings="no stop", pad_token_id=299)[1] == ""


def test_a_vocabulary_of_characters():
    tokenizer = CharTokenizer.from_text("abc ")
    assert to_text([[1, 2, 3], [3, 2]], tokenizer, skip_prompt=1) == ["bc", "b"]
    assert to_text([1, 2], tokenizer) == ["ab"] and to_text([], tokenizer) == []


def test_streamed_text_is_the_text(kinds, tokenizer, pair):
    ids, _ = encode(kinds, "the lazy 日本")
    for skip_prompt in (True, False):
        pieces = []
        streamer = TextStreamer(tokenizer, pieces.append, skip_prompt=skip_prompt)
        for seed in range(2):  # a streamer serves one text after the other
            pieces.clear()
            out = pair[0].generate(
                ids, max_new_tokens=40, do_sample=True, seed=seed, eos_token_id=[], streamer=streamer
            )
            start = ids.shape[1] if skip_prompt else 0
            wanted = kinds["fastformer"].decode(out[0].tolist())[len("the lazy 日本") if skip_prompt else 0 :]
            assert "".join(pieces) == wanted == to_text(out, tokenizer, skip_prompt=start, eos_token_id=[])[0]
            assert len(pieces) > 10


def word_pieces():
    """Llama's kind: a word carries its space as ▁, and the first one of a text loses it; bytes for what is unknown."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=299, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT.replace("😀", "")], trainer)
    return tokenizer


def test_spaces_survive_where_a_first_token_loses_its_own():
    tokenizer = word_pieces()
    text = "the lazy dog jumps over the brown fox, who is there? the quick"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    pieces = []
    streamer = TextStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([ids[:4]]))
    for token in ids[4:]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    continuation = text[len(tokenizer.decode(ids[:4])) :]
    assert "".join(pieces) == continuation and len(pieces) > 10
    assert to_text(ids, tokenizer, skip_prompt=4) == [continuation]


@pytest.mark.parametrize("stop", [" over", "x, w", "dog j", "e", "q"])
def test_a_stop_string_ends_at_its_token_wherever_the_spaces_are(stop):
    from fastformer.generation.stopping import StopStrings

    tokenizer = word_pieces()
    text = "the lazy dog jumps over the brown fox, who is there? the quick"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    stops = StopStrings([stop], tokenizer)
    ended = [stops.completed(ids[: n + 1]) for n in range(len(ids))]
    assert ended.index(True) == next(n for n in range(len(ids)) if stop in tokenizer.decode(ids[: n + 1]))
    assert sum(ended) == len({n for n in range(len(ids)) if tokenizer.decode(ids[: n + 1]).count(stop)
                              > tokenizer.decode(ids[:n]).count(stop)})  # fmt: skip


def test_a_streamer_gives_whole_characters_in_order_and_no_special_tokens(kinds):
    tokenizer = kinds["fastformer"]
    pieces = []
    streamer = TextStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([tokenizer.encode("the")]))
    for token in [*tokenizer.encode(" 🎭 fox"), 0, 299]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == " 🎭 fox" and not any("\ufffd" in piece for piece in pieces)
    with pytest.raises(ValueError, match="one text, not 2"):
        streamer.put(torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("stop", ["fox", "o", "x, ju", ["zzz", "ver t"]])
def test_a_streamer_hands_on_nothing_of_a_stop_string(kinds, stop):
    tokenizer = kinds["fastformer"]
    text = "the ffo fox, jumps over the dog"
    pieces = []
    streamer = TextStreamer(tokenizer, pieces.append, stop_strings=stop)
    streamer.put(torch.tensor([[5]]))
    for token in tokenizer.encode(text):
        streamer.put(torch.tensor([token]))
        strings = [stop] if isinstance(stop, str) else stop
        assert not any(s in "".join(pieces) for s in strings)
    streamer.end()
    assert "".join(pieces) == text[: min(text.find(s) for s in strings if s in text)]


def test_what_might_have_been_a_stop_string_comes_out_at_the_end(kinds):
    pieces = []
    streamer = TextStreamer(kinds["fastformer"], pieces.append, stop_strings="dog!")
    streamer.put(torch.tensor([[5]]))
    streamer.put(torch.tensor(kinds["fastformer"].encode("the dog")))
    assert "".join(pieces) == "the "
    streamer.end()
    assert "".join(pieces) == "the dog"


def test_the_default_streamer_prints(kinds, capsys):
    streamer = TextStreamer(kinds["fastformer"])
    streamer.put(torch.tensor([[5]]))
    streamer.put(torch.tensor(kinds["fastformer"].encode("the dog")))
    streamer.end()
    assert capsys.readouterr().out == "the dog"


def test_the_streamers_of_transformers_work(kinds, pair, capsys):
    ids, _ = encode(kinds, "the lazy dog")
    theirs = transformers.TextStreamer(kinds["transformers"], skip_prompt=True)
    out = pair[0].generate(ids, max_new_tokens=20, eos_token_id=[], streamer=theirs)
    wanted = kinds["fastformer"].decode(out[0, ids.shape[1] :].tolist())
    assert capsys.readouterr().out == wanted + "\n"


def free_text(pair, kinds, ids, mask):
    out = pair[0].generate(ids, attention_mask=mask, max_new_tokens=40, eos_token_id=[])
    return out, to_text(out, kinds["fastformer"], skip_prompt=ids, eos_token_id=[])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_stop_strings_end_texts_where_transformers_does(kinds, pair, num_beams):
    ours, theirs = pair
    ids, mask = encode(kinds, "the lazy dog", "who", "brown fox: jumps")
    texts = free_text(pair, kinds, ids, mask)[1]
    readable = [[t[i : i + n] for i in (4, 9, 15) for n in (1, 2, 3)] for t in texts]
    tried = 0
    for stops in ([a, b, c] for a, b, c in zip(*readable)):
        if any("\ufffd" in s or not s.isascii() for s in stops):
            continue
        tried += 1
        arguments = {"attention_mask": mask, "max_new_tokens": 40, "num_beams": num_beams, "pad_token_id": 299}
        arguments |= {"stop_strings": stops, "tokenizer": kinds["transformers"]}
        wanted = theirs.generate(ids, do_sample=False, **arguments)
        assert torch.equal(ours.generate(ids, **arguments), wanted)
        assert num_beams > 1 or wanted.shape[1] < ids.shape[1] + 40
    assert tried >= 2


def test_a_stop_string_in_the_prompt_does_not_count(kinds, pair):
    ours, _ = pair
    ids, _ = encode(kinds, "ROMEO: who is there?\nROMEO:")
    wanted = ours.generate(ids, max_new_tokens=10, eos_token_id=[])
    arguments = {"max_new_tokens": 10, "eos_token_id": [], "stop_strings": "ROMEO:"}
    for tokenizer in kinds.values():
        assert torch.equal(ours.generate(ids, tokenizer=tokenizer, **arguments), wanted)


def test_stop_strings_and_end_tokens_fill_with_padding(kinds, pair):
    ours, _ = pair
    ids, mask = encode(kinds, "the lazy dog", "who")
    out, texts = free_text(pair, kinds, ids, mask)
    stop = next(c for c in texts[0][6:] if c.isascii() and c not in texts[1])
    found = ours.generate(
        ids, attention_mask=mask, max_new_tokens=40, eos_token_id=[], pad_token_id=299, stop_strings=stop,
        tokenizer=kinds["tokenizers"],
    )  # fmt: skip
    assert torch.equal(found[1], out[1])
    ended = int((found[0, ids.shape[1] :] != 299).sum())
    assert ended < 40 and (found[0, ids.shape[1] + ended :] == 299).all()
    assert to_text(found, kinds["fastformer"], skip_prompt=ids, stop_strings=stop, pad_token_id=299) == [
        *(texts[0][: texts[0].index(stop)], texts[1]),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"stop_strings": "x"}, "tokenizer"), ({"stop_strings": ["x", ""], "tokenizer": 1}, "at least one character")],
)
def test_stop_strings_that_cannot_be_found(pair, arguments, message):
    with pytest.raises(ValueError, match=f"^stop_strings: .*{message}"):
        pair[0].generate(torch.tensor([[7]]), **arguments)
