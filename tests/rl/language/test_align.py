"""Whole runs at tiny size: each algorithm learns, resumes to the bit, and stops where the policy is led astray."""

import json

import pytest
import torch

import fastformer
from fastformer.data import load_tokenizer
from fastformer.rl.language import Rewards, align, prepare
from fastformer.rl.language.rewards import longer
from fastformer.rl.language.run import load_reward
from fastformer.training.logs import read_metrics
from tests.rl.language.small import config_for, copying, save_base, share_of


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def run(algorithm, base, out, rewards=None, **changes):
    config = config_for(algorithm, base, out, **changes)
    return align(config, task=copying(), rewards=rewards or share_of("7"), quiet=True)


def weights_of(directory):
    return fastformer.from_pretrained(directory).state_dict()


SETTINGS = {
    "grpo": {"policy": {"kl_coefficient": 0.01}},
    "grpo-lora": {"lora": 8, "rate": 3e-2},
    "rloo": {"policy": {"kl_coefficient": 0.01}, "optimizer": {"accumulate": 1}},
    "ppo": {"policy": {"kl_coefficient": 0.01}, "rollout": {"epochs": 2}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_reward_rises(name, base, tmp_path):
    if "lora" in name:  # with so small a frozen head the adapters would have nothing to work with
        base = save_base(tmp_path / "base", deviation=0.2)
    result = run(name.partition("-")[0], base, tmp_path, steps=24, **SETTINGS[name])
    rows = [r for r in read_metrics(tmp_path) if "reward" in r]
    first, last = (sum(r["reward"] for r in part) / len(part) for part in (rows[:3], rows[-3:]))
    assert last > first + 0.1 and result.metrics["held_out_reward"] > first
    steps = [r for r in read_metrics(tmp_path) if "ratio" in r]
    assert len(steps) == 24 and all(abs(r["ratio"] - 1) < 0.3 and 0 <= r["clip_fraction"] <= 1 for r in steps)
    wanted = {"entropy", "length", "truncated", "empty", "groups_alike", "reward_share", "rollouts_per_second"}
    assert all(wanted <= set(r) and r["sampling_difference"] < 1e-4 for r in rows)
    if "policy" in SETTINGS[name]:
        assert all(r["rollout_kl_k3"] >= 0 for r in rows) and rows[-1]["rollout_kl_k3"] > rows[0]["rollout_kl_k3"]
    assert (tmp_path / "alignment.png").stat().st_size > 5000
    model = fastformer.from_pretrained(tmp_path / ("merged" if "lora" in name else "checkpoint"))
    assert model.config.n_embd == 32


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_rewards_that_tell_nothing_apart_change_nothing(algorithm, base, tmp_path):
    run(algorithm, base, tmp_path, {"same": lambda prompts, completions, **columns: [0.3] * len(prompts)})
    before, after = weights_of(base), weights_of(tmp_path / "checkpoint")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(r["groups_alike"] == 1 for r in read_metrics(tmp_path) if "groups_alike" in r)


@pytest.mark.parametrize("name", ["grpo-lora", "ppo"])
def test_a_run_that_resumes_in_the_middle_of_a_rollout_repeats_the_one_that_never_stopped(name, base, tmp_path):
    # Three steps on a rollout of which the run stops after the second.
    settings = {**SETTINGS[name], "rollout": {"epochs": 3}}
    if name == "grpo-lora":
        settings["policy"] = {"kl_coefficient": 0.1}
    for out, steps in (("whole", (8,)), ("parts", (5, 8))):
        for last in steps:
            options = {**settings, "run": {"resume": last == 8 and out == "parts"}}
            run(name.partition("-")[0], base, tmp_path / out, steps=last, **options)
    timed = ("tokens_per_second", "rollouts_per_second", "sampling_seconds", "mfu", "peak_memory")
    whole, parts = (
        [{k: v for k, v in r.items() if k not in timed} for r in read_metrics(tmp_path / out)]
        for out in ("whole", "parts")
    )
    kept = [r for r in parts if not (r["step"] == 5 and "held_out_reward" in r)]  # measured where it stopped
    assert sorted(map(json.dumps, kept)) == sorted(map(json.dumps, whole))


def test_a_reward_that_is_hacked_and_what_stops_it(base, tmp_path):
    # Copying a digit and then rambling on: the proxy likes length, the truth is the copied digit alone.
    sft = tmp_path / "sft"
    config = config_for("sft", base, sft, steps=50, rate=1e-2, data={"batch_size": 4})
    learnt = align(config, task=copying_all(), quiet=True)
    assert learnt.metrics["true_reward"] > 0.9
    hacked, guarded = tmp_path / "hacked", tmp_path / "guarded"
    proxy = {"long": longer(6)}

    def rewarded(out, **changes):
        options = {"optimizer": {"accumulate": 1}, "data": {"batch_size": 16}, "rollout": {"temperature": 1.5}}
        config = config_for("grpo", sft, out, steps=24, **options, **changes)
        return align(config, task=copying_all(), rewards=proxy, quiet=True)

    free = rewarded(hacked).metrics
    assert free["held_out_reward"] > 0.7 and free["true_reward"] < 0.2  # the proxy rose from 1 / 6, the truth fell
    result = rewarded(guarded, policy={"kl_limit": 0.3})
    assert result.stopped == "kl" and result.steps < 12 and result.metrics["true_reward"] > free["true_reward"]
    result = rewarded(tmp_path / "patient", run={"eval_every": 2, "patience": 3, "keep_best": True})
    assert result.stopped == "patience" and result.best > 0.7  # the truth is what is kept the best of


def copying_all():
    """Ten questions to train on, and the same to measure on: what is asked is whether the skill is kept."""
    task = copying()
    return type(task)(task.train + task.held_out, task.train + task.held_out, task.verifier)


def pairs(count=64):
    return [{"prompt": f"{n % 10}=", "chosen": f"{n % 10}", "rejected": f"{(n * 7 + 1) % 10}a"} for n in range(count)]


@pytest.mark.parametrize(("name", "lora"), [("dpo", 0), ("dpo", 8), ("reward", 0)])
def test_preferences_are_learnt(name, lora, base, tmp_path):
    config = config_for(name, base, tmp_path, steps=30, lora=lora, rate=2e-2 if lora else 3e-3)
    result = align(config, pairs=pairs(), quiet=True)
    assert result.metrics["held_out_accuracy"] > 0.9 and result.validation_loss < 0.65
    noted = [r for r in read_metrics(tmp_path) if "margin" in r]
    assert noted[0]["margin"] < noted[-1]["margin"]
    if name == "dpo":
        assert noted[0]["margin"] == pytest.approx(0, abs=1e-5)  # the policy is the reference
    else:
        scores = load_reward(str(tmp_path))(["3=", "4="], ["3", "1a"])
        assert scores[0] > scores[1]


def test_an_error_in_a_reward_stops_the_run_and_names_the_sample(base, tmp_path):
    def broken(prompts, completions, **columns):
        return [float("nan") if i == 5 else 0.0 for i in range(len(prompts))]

    with pytest.raises(ValueError, match=r"reward 'broken': returned nan for sample 5 \(prompt '\d=', completion"):
        run("grpo", base, tmp_path, {"broken": broken})
    with pytest.raises(ValueError, match="reward: nothing is rewarded"):
        align(config_for("grpo", base, tmp_path), task=type(copying())(copying().train, copying().held_out, None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"batch_size": 3}}, "data.batch_size: 3 times optimizer.accumulate 2 does not divide the 16 comp"),
        ({"rollout": {"group_size": 1}}, "rollout.group_size: got 1; grpo compares 2 or more"),
        ({"rollout": {"max_new_tokens": 31}}, r"data example 0: a prompt of 2 tokens; expected 1 to 1"),
        ({"policy": {"clip_low": 0}}, r"policy.clip_low: got 0, expected in \(0, 1\]"),
        ({"rollout": {"end": "ab"}}, "rollout.end: 'ab' is 2 tokens"),
    ],
)
def test_settings_that_do_not_fit(changes, message, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare(config_for("grpo", base, tmp_path, **changes), task=copying(), quiet=True)


def test_pairs_that_teach_nothing_and_rows_too_long(base, tmp_path):
    config = config_for("dpo", base, tmp_path)
    same = [*pairs(4), {"prompt": "1=", "chosen": "2", "rejected": "2"}] * 3
    with pytest.raises(ValueError, match="chosen and rejected are the same text"):
        prepare(config, pairs=same, quiet=True)
    with pytest.raises(ValueError, match=r"\(chosen\): 43 tokens, and data.max_length is 32"):
        prepare(config, pairs=[{**p, "chosen": "a" * 40} for p in pairs(8)], quiet=True)
    with pytest.raises(ValueError, match="rejected: data example 0 has no 'rejected'"):
        prepare(config, pairs=[{"prompt": "1=", "chosen": "2"}] * 8, quiet=True)


def test_the_command(base, tmp_path, capsys):
    pytest.importorskip("tyro", reason="tyro is not installed (pip install tyro)")
    from fastformer import cli

    file, out = tmp_path / "copies.csv", tmp_path / "run"
    file.write_text("prompt,answer\n" + "".join(f"{n}=,{n}\n" for n in range(10)))
    sizes = ["--rollout.prompts", "2", "--rollout.group-size", "4", "--rollout.max-new-tokens", "3"]
    options = [*sizes, "--rollout.end", "\n", "--data.batch-size", "8", "--run.max-steps", "2", "--run.device", "cpu"]
    arguments = ["align", "--model", str(base), "--data.path", str(file), "--run.out", str(out), *options]
    assert cli.main([*arguments, "--run.no-tensorboard"]) == 0
    assert "true reward" in capsys.readouterr().out
    assert load_tokenizer(out / "checkpoint").vocab_size == 16
    assert cli.main([*arguments, "--run.no-tensorboard"]) == 1
    assert "holds a checkpoint already" in capsys.readouterr().err
    assert isinstance(Rewards(share_of("a")), Rewards)
