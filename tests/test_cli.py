"""Every verb of the command at tiny size, on real files; help is complete; mistakes are named with their remedy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastformer
from fastformer import cli, extras
from fastformer.training.checkpoint import load_state
from fastformer.training.logs import read_metrics

TEXT = "HAMLET:\nTo be, or not to be: that is the question:\nWhether 'tis nobler in the mind to suffer\n\n" * 40
TINY = [
    *("--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "16"),
    *("--data.block-size", "16", "--data.batch-size", "4", "--run.eval-windows", "8", "--run.device", "cpu"),
]


def fails(arguments, capsys, status):
    """Standard error of a command that must fail with ``status``."""
    try:
        assert cli.main(arguments) == status
    except SystemExit as exit:  # tyro's
        assert exit.code == status
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "hamlet.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """A finished `fastformer pretrain`."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    settings = ["--run.max-steps", "6", "--run.save-every", "3", "--optimizer.learning-rate", "1e-2"]
    assert cli.main(["pretrain", "--data.path", str(text), "--run.out", str(out), *TINY, *settings]) == 0
    return out


def test_help_lists_every_verb_and_each_explains_itself(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert cli.main([]) == 0
    assert capsys.readouterr().out == listed
    for verb, function in cli.VERBS.items():
        assert f"  {verb} " in listed and function.__doc__ in listed
    for verb, options in {
        "demo": ["--minutes", "--tokenizer", "--out", "--seed", "--device"],
        "pretrain": ["--model.n-layer", "--data.path", "--optimizer.accumulate", "--run.resume", "--config"],
        "finetune": ["--task", "--model", "--data.path", "--lora.rank", "--freeze", "--run.resume", "--config"],
        "rl": ["--algorithm", "--environment", "--seeds", "--ppo.clip", "--policy.text-encoder", "--run.resume"],
        "align": ["--algorithm", "--data.task", "--rollout.group-size", "--policy.kl-limit", "--lora.rank"],
        "generative": ["--family", "--gan.loss", "--vae.free-bits", "--data.path", "--run.resume", "--config"],
        "search": ["--search.trials", "--search.learning-rate", "--data.columns.label", "--search.pruning"],
        "generate": ["--model", "--prompt", "--max-new-tokens", "--temperature", "--top-k", "--seed"],
        "evaluate": ["--model", "--data", "--task", "--stride", "--metrics", "--baselines", "--slices"],
        "tokenize": ["--source", "--out", "--tokenizer", "--vocab-size"],
        "doctor": ["usage: fastformer doctor"],
    }.items():
        with pytest.raises(SystemExit) as exit:
            cli.main([verb, "--help"])
        shown = capsys.readouterr().out
        assert exit.value.code == 0 and all(option in shown for option in options), verb
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastformer {fastformer.__version__}\n"


def test_the_module_is_the_command():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "fastformer", "pretain"], capture_output=True, text=True, cwd=root, timeout=120
    )
    assert done.returncode == 2 and "there is no 'pretain'. Did you mean pretrain?" in done.stderr
    assert "Traceback" not in done.stderr


def test_pretrain_leaves_a_run(run):
    names = {path.name for path in run.iterdir()}
    assert names == {"checkpoint", "checkpoint-3", "metrics.jsonl", "tensorboard", "loss.png", "run.png"}
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "run.png"))
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert load_state(run / "checkpoint")["config"]["optimizer"]["learning_rate"] == 1e-2


def test_generate_writes_what_the_seed_says(run, capsys):
    command = ["generate", "--model", str(run), "--prompt", "HAMLET:", "--max-new-tokens", "40", "--top-k", "5"]
    texts = []
    for seed in ("0", "0", "1"):
        assert cli.main([*command, "--seed", seed]) == 0
        shown = capsys.readouterr()
        assert "[40 tokens in " in shown.err
        texts.append(shown.out)
    # 7 + 40 characters and the line's end, more than the 16 of the context.
    assert all(t.startswith("HAMLET:") and len(t) == 48 for t in texts)
    assert texts[0] == texts[1] != texts[2]
    greedy = []
    for seed in ("0", "1"):
        cli.main([*command, "--temperature", "0", "--seed", seed])
        greedy.append(capsys.readouterr().out)
    assert greedy[0] == greedy[1]
    # Beams write as much, at once; a stop string ends the text, and is no part of it.
    beams = [*command, "--temperature", "0", "--num-beams", "3", "--no-repeat-ngram-size", "4"]
    assert cli.main(beams) == 0
    written = capsys.readouterr().out
    assert len(written) == 48
    fourgrams = [written[7 + i : 11 + i] for i in range(5)]
    assert len(set(fourgrams)) == len(fourgrams)
    stop = greedy[0][20:22]
    assert cli.main([*command, "--temperature", "0", "--stop", stop, "zzz"]) == 0
    assert capsys.readouterr().out == greedy[0][: greedy[0].index(stop, 7)] + "\n"


def test_resume_goes_on_and_an_existing_run_is_safe(run, text, tmp_path, capsys):
    command = ["pretrain", "--data.path", str(text), *TINY, "--optimizer.learning-rate", "1e-2", "--run.no-tensorboard"]
    assert "holds a checkpoint already; continue it with --run.resume" in fails(
        [*command, "--run.out", str(run)], capsys, 1
    )
    assert "no checkpoint at" in fails([*command, "--run.out", str(tmp_path), "--run.resume"], capsys, 1)
    out = tmp_path / "run"
    assert cli.main([*command, "--run.out", str(out), "--run.max-steps", "4"]) == 0
    assert cli.main([*command, "--run.out", str(out), "--run.max-steps", "7", "--run.resume"]) == 0
    assert [r["step"] for r in read_metrics(out) if "loss" in r] == [1, 2, 3, 4, 5, 6, 7]
    assert load_state(out / "checkpoint")["step"] == 7


def test_a_config_file_with_flags_over_it_and_byte_pairs(text, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        f"data: {{path: {text}, tokenizer: bpe, vocab_size: 300, block_size: 16}}\n"
        f"model: {{n_layer: 1, n_embd: 16}}\nrun: {{out: {tmp_path / 'run'}, max_steps: 5, tensorboard: false}}\n"
    )
    assert cli.main(["pretrain", "--config", str(tmp_path / "run.yaml"), "--run.max-steps", "2"]) == 0
    config = load_state(tmp_path / "run" / "checkpoint")["config"]
    assert config["run"]["max_steps"] == 2 and config["model"]["n_embd"] == 16
    capsys.readouterr()
    generate = ["generate", "--model", str(tmp_path / "run" / "checkpoint"), "--prompt", "Whether", "--seed", "0"]
    assert cli.main([*generate, "--max-new-tokens", "30"]) == 0
    assert capsys.readouterr().out.startswith("Whether")
    (tmp_path / "run.yaml").write_text("modle: {n_layer: 1}\n")
    assert "unknown setting modle" in fails(["pretrain", "--config", str(tmp_path / "run.yaml")], capsys, 1)


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["pretrain", "--model.n-layr", "2"], 2, "--model.n-layer"),
        (["pretrain", "--model.n-layer", "two"], 2, "--model.n-layer"),
        (["pretrain", "--model.n-embd", "30"], 2, "model.n_embd: got 30, expected a multiple of model.n_head"),
        (["pretrain", "--data.path", "nowhere.txt"], 1, "'nowhere.txt' does not exist"),
        (["pretrain", "--config"], 1, "--config: needs the name of a YAML file"),
        (["generate", "--model", "nowhere"], 1, "no checkpoint at nowhere"),
        (["demo", "--minutes", "-1"], 2, "minutes: got -1.0, expected more than 0"),
        (["demo", "--device", "cuda:99"], 1, "run.device: 'cuda:99' was asked for"),
        (["doctor", "--now"], 1, "takes no arguments; got --now"),
    ],
)
def test_mistakes_are_named(arguments, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = fails(arguments, capsys, status)
    assert message in " ".join(error.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_the_model_cannot_read(run, capsys):
    error = fails(["generate", "--model", str(run), "--prompt", "Ω"], capsys, 1)
    assert "character 'Ω' (U+03A9) at position 0" in error
    assert "prompt: is empty" in fails(["generate", "--model", str(run), "--prompt", ""], capsys, 1)


def test_a_missing_package_says_how_to_get_it(capsys, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    error = fails(["demo"], capsys, 1)
    assert "fastformer demo needs the package 'tyro', which is not installed: pip install 'fastformer[train]'" in error


def test_doctor_reports(capsys):
    assert cli.main(["doctor"]) == 0
    assert fastformer.__version__ in capsys.readouterr().out


def test_bench_hands_its_arguments_over(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(cli.subprocess, "call", lambda command, cwd: calls.append((command[1:], cwd)) or 3)
    assert cli.main(["bench", "layer_norm"]) == 3
    assert calls == [(["-m", "benchmarks", "layer_norm"], Path(__file__).parents[1])]
    monkeypatch.setattr(cli, "__file__", "/somewhere/site-packages/fastformer/cli.py")
    assert "come with the repository" in fails(["bench"], capsys, 1)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_demo(tokenizer, tmp_path, capsys):
    """The main job, seconds long: everything it promises to leave, and a loss that both libraries agree on."""
    out = tmp_path / "demo"
    arguments = ["demo", "--minutes", "0.05", "--out", str(out), "--tokenizer", tokenizer, "--device", "cpu"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("checkpoint", "tensorboard", "metrics.jsonl", "loss.png", "speed.png", "report.md", "results.json")
    }
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("loss", "speed"))
    results = json.loads((out / "results.json").read_text())
    losses = results["race"]["losses"]
    assert len(losses) >= 3 and max(abs(a - b) for a, b in losses) <= 1e-3
    assert results["race"]["same_text"]
    report = (out / "report.md").read_text()
    for part in (f"validation loss {results['training']['validation_loss']:.3f}", "ratio", "![speed](speed.png)"):
        assert part in report
    assert "torch.nn" in shown and "tokens/s" in shown
    assert ("yardstick" in shown) == (tokenizer == "char")
    if tokenizer == "char":
        assert cli.main(["generate", "--model", str(out), "--prompt", "ROMEO:", "--max-new-tokens", "5"]) == 0
