"""A corpus as shards in two parts: streamed, whole or not there, and what ``pretrain`` makes of it."""

import json
from dataclasses import replace

import pytest

from fastformer import cli
from fastformer.data import TokenizeConfig, is_tokenized, load_corpus, load_tokenized, split_documents, tokenize
from fastformer.training import DataConfig, ModelConfig, RunConfig, TrainConfig
from fastformer.training.pretrain import prepare_data, pretrain

TEXT = "HAMLET:\nTo be, or not to be: that is the question:\nWhether 'tis nobler in the mind to suffer\n\n" * 40


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "hamlet.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_records_are_streamed_and_some_held_out_whole(tmp_path, capsys):
    records = [{"body": f"{i:03d} " + "to be or not to be " * (1 + i % 3)} for i in range(60)]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["--source", str(source), "--text-field", "body", "--tokenizer", "char", "--validation-fraction", "0.2"]
    assert cli.main(["tokenize", *arguments, "--out", str(tmp_path / "shards")]) == 0
    assert capsys.readouterr().out.count("TokenShards(") == 2
    data = load_tokenized(tmp_path / "shards")
    tokenizer = data.train.tokenizer()
    train, held_out = ([tokenizer.decode(d) for d in part] for part in (data.train, data.validation))
    assert sorted(train + held_out) == [record["body"] for record in records]
    assert 0.15 < data.validation.characters / len(data) < 0.25
    whole = load_corpus(source, text_field="body")
    assert held_out == [document.text for document in split_documents(whole, 0.2)[1]]  # what pretrain holds out


def test_pretrain_reads_and_resumes_on_shards(text, tmp_path):
    config = TokenizeConfig(source=str(text), out=str(tmp_path / "shards"), vocab_size=300)
    data = tokenize(config)
    assert is_tokenized(config.out) and not is_tokenized(tmp_path) and len(data) == len(TEXT)
    run = TrainConfig(
        model=ModelConfig(n_layer=1, n_head=2, n_embd=16),
        data=DataConfig(path=config.out, block_size=16, batch_size=4),
        run=RunConfig(out=str(tmp_path / "run"), device="cpu", max_steps=2, eval_windows=8, tensorboard=False),
    )
    assert pretrain(run, quiet=True).validation_loss > 0
    longer = replace(run, run=replace(run.run, max_steps=3, resume=True))
    assert pretrain(longer, quiet=True).steps == 3
    with pytest.raises(ValueError, match="block_size: 4000 does not fit the training text"):
        prepare_data(replace(run.data, block_size=4000))
    other = tokenize(replace(config, out=str(tmp_path / "other"), vocab_size=290)).train.tokenizer()
    with pytest.raises(ValueError, match="tokenizer: is not the one that made"):
        prepare_data(run.data, other)


def test_whole_or_not_at_all(text, tmp_path):
    config = TokenizeConfig(source=str(text), out=str(tmp_path / "shards"), vocab_size=300)
    tokenize(config)
    again = TokenizeConfig(source=str(text), out=str(tmp_path / "again"), tokenizer=f"{config.out}/train")
    assert tokenize(again).train.tokenizer().vocab_size == 300
    before = sorted(tmp_path.rglob("*"))
    for changes, error, message in (
        ({}, FileExistsError, "shards exists already"),
        ({"out": str(tmp_path / "new"), "vocab_size": 5}, ValueError, "vocab_size: got 5"),
        ({"out": str(tmp_path / "new"), "tokenizer": "words"}, ValueError, "tokenizer: got 'words'"),
        ({"out": str(tmp_path / "new"), "validation_fraction": 0.0}, ValueError, r"validation_fraction: got 0\.0"),
        ({"out": str(tmp_path / "new"), "source": str(tmp_path / "none.txt")}, FileNotFoundError, "none"),
    ):
        with pytest.raises(error, match=message):
            tokenize(replace(config, **changes))
    assert sorted(tmp_path.rglob("*")) == before
