"""Rewards: sums with weights, None, forms of a text, verifiable tasks, and every way a function can be wrong."""

import math

import pytest
import torch

from fastformer.rl.language import RewardError, Rewards, reasoning_gym_task
from fastformer.rl.language.rewards import exact_answer, length_within, longer, matches, overlong
from fastformer.rl.language.tasks import answer_in, examples_task, parse_options

PROMPTS, COMPLETIONS = ["a?", "b?", "c?"], ["yes", "", "no no"]


def constant(*values):
    return lambda prompts, completions, **columns: list(values)


def test_a_weighted_sum_in_which_none_does_not_apply():
    rewards = Rewards(
        {"right": constant(1.0, None, 0.0), "form": constant(None, 0.5, 1), "seen": constant(9, 9, 9)},
        {"form": 0.2, "seen": 0.0},
    )
    scored = rewards(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(scored.total, torch.tensor([1.0, 0.1, 0.2]))
    assert math.isnan(scored.parts["right"][1]) and scored.parts["seen"].tolist() == [9, 9, 9]
    with pytest.raises(RewardError, match=r"no reward function applies to sample 1 \(prompt 'b\?', completion ''\)"):
        Rewards({"right": constant(1.0, None, 0.0)})(PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match="weights: wrong is none of right"):
        Rewards({"right": constant(1.0)}, {"wrong": 1.0})
    with pytest.raises(ValueError, match="functions: expected at least one"):
        Rewards({})


def fails_on_empty(prompts, completions, **columns):
    return [1 / len(c) for c in completions]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (constant(1.0, math.nan, 0.0), r"reward 'f': returned nan for sample 1 \(prompt 'b\?', completion ''\)"),
        (constant(1.0, 0.0, math.inf), r"returned inf for sample 2 \(prompt 'c\?', completion 'no no'\)"),
        (constant(1.0, "good", 0.0), r"returned 'good' for sample 1"),
        (constant(1.0, 0.0), r"reward 'f': returned 2 numbers for 3 completions"),
        (lambda prompts, completions, **columns: None, r"reward 'f': returned NoneType for 3 completions"),
        (fails_on_empty, r"reward 'f': ZeroDivisionError: division by zero, on sample 1 \(prompt 'b\?'"),
    ],
)
def test_what_a_function_gets_wrong_names_it_and_the_sample(function, message):
    with pytest.raises(RewardError, match=message):
        Rewards({"f": function})(PROMPTS, COMPLETIONS)


def test_rewards_of_form():
    assert matches(r"\d+")(PROMPTS, ["12", "12 ", ""]) == [1.0, 0.0, 0.0]
    assert length_within(2, 6)(PROMPTS, ["ab", "a" * 7, "a" * 9]) == [1.0, 0.5, 0.0]
    ids = [[0] * n for n in (6, 8, 10, 12)]
    assert overlong(10, 4)("....", COMPLETIONS, completion_ids=ids) == pytest.approx([0, -0.5, -1, -1])
    assert longer(10)(PROMPTS, COMPLETIONS) == pytest.approx([0.3, 0.0, 0.5])
    assert exact_answer(PROMPTS, [" 3\n", "4", "x"], answer=["3", "5", None]) == [1.0, 0.0, None]
    for bad in (lambda: length_within(3, 2), lambda: overlong(4, 5)):
        with pytest.raises(ValueError, match="expected 0 <"):
            bad()


def test_a_task_of_reasoning_gym_and_its_verifier():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (pip install reasoning-gym)")
    options = parse_options(("min_terms=2", "max_terms=2", "max_digits=1"))
    task = reasoning_gym_task("chain_sum", 60, 10, seed=3, options=options)
    assert len(task.held_out) == 10 and 0 < len(task.train) <= 60
    assert not {e["prompt"] for e in task.train} & {e["prompt"] for e in task.held_out}
    assert task.train == reasoning_gym_task("chain_sum", 60, 10, seed=3, options=options).train
    some = task.train[:2]
    columns = {name: [e[name] for e in some] for name in ("answer", "entry")}
    told = [f"so <answer> {some[0]['answer']}</answer>", "no idea"]
    first, second = task.verifier([e["prompt"] for e in some], told, **columns)
    assert first == 1.0 and second < 0.5
    with pytest.raises(ValueError, match=r"data\.task: 'chain_sums'"):
        reasoning_gym_task("chain_sums", 5, 1)
    with pytest.raises(ValueError, match=r"data\.task: 'chain_sum' with {'max_digit': 1}"):
        reasoning_gym_task("chain_sum", 5, 1, options={"max_digit": 1})
    with pytest.raises(ValueError, match=r"data\.options: got 'max_digits', expected name=value"):
        parse_options(("max_digits",))


def test_examples_of_a_file(tmp_path):
    path = tmp_path / "sums.csv"
    path.write_text("prompt,answer\n" + "".join(f"{n}+1=,{n + 1}\n" for n in range(10)))
    task = examples_task(str(path), "", 0.2)
    assert len(task.train) == 8 and len(task.held_out) == 2 and task.verifier is exact_answer
    assert answer_in("<answer>1</answer> or <answer> 2 </answer>") == "2" and answer_in(" 3\n") == "3"
    path.write_text("question,answer\n1,2\n")
    with pytest.raises(ValueError, match="prompt: data example 0 has no 'prompt'"):
        examples_task(str(path), "", 0.2)
