"""Tasks whose answers can be checked: prompts, right answers, and a verifier that is a reward function.

The tasks of the ``reasoning-gym`` package (Stojanovski et al. 2025, arXiv:2505.24760), made by a generator with a seed,
or examples of a file with the columns ``prompt`` and ``answer``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...data.examples import check_columns, read_examples
from ...extras import MissingPackageError
from .rewards import RewardFunction, exact_answer

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Task:
    """Examples to train on and to measure on, that share no prompt, and what tells a right answer.

    Attributes:
        train, held_out: examples with ``prompt``, for most tasks ``answer``, and what else the verifier reads.
        verifier: reward function, 1 for a right answer; None where the examples have no answers.
    """

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    verifier: RewardFunction | None


def reasoning_gym_task(
    name: str, size: int, held_out: int, seed: int = 0, options: Mapping[str, Any] | None = None
) -> Task:
    """A task of reasoning-gym.

    Args:
        name: of the task, such as ``"chain_sum"``.
        size, held_out: examples to make; of the former those are left out whose question is among the latter.
        options: the task's own settings, such as ``{"max_digits": 1}``.

    Raises:
        ValueError: a task or a setting that there is not, or no question left to train on.
    """
    try:
        import reasoning_gym as gym
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":
            raise
        message = "data.task needs the package 'reasoning-gym', which is not installed: pip install reasoning-gym"
        raise MissingPackageError(message, name=error.name) from None
    try:
        dataset = gym.create_dataset(name, size=size + held_out, seed=seed, **(options or {}))
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"data.task: {name!r} with {dict(options or {})}: {error}") from error
    entries = list(dataset)
    examples = [{"prompt": e["question"], "answer": str(e["answer"]), "entry": e} for e in entries]
    measured = examples[:held_out]
    seen = {example["prompt"] for example in measured}
    train = [example for example in examples[held_out:] if example["prompt"] not in seen]
    if not train:
        raise ValueError(f"data.task: all {size} questions of {name!r} are among the {held_out} held out")

    def correct(
        prompts: Sequence[str], completions: Sequence[str], entry: Sequence[Any], **columns: Any
    ) -> list[float]:
        return [float(dataset.score_answer(answer=answer_in(c), entry=e)) for c, e in zip(completions, entry)]

    return Task(train, measured, correct)


def examples_task(path: str, validation: str, fraction: float, seed: int = 0) -> Task:
    """Examples of files: ``prompt``, and ``answer``, which a completion is to be, where all have it."""
    from ...data.examples import split_examples

    train = read_examples(path)
    check_columns(train, {"prompt": "prompt"})
    if validation:
        held_out = read_examples(validation, "validation")
        check_columns(held_out, {"prompt": "prompt"}, "validation")
    else:
        train, held_out = split_examples(train, fraction, seed)
    answered = all(example.get("answer") is not None for example in (*train, *held_out))
    return Task(train, held_out, exact_answer if answered else None)


def answer_in(completion: str) -> str:
    """What stands in the last ``<answer>`` tags, else all of the completion, without space around it."""
    found = ANSWER.findall(completion)
    return (found[-1] if found else completion).strip()


def parse_options(settings: Sequence[str]) -> dict[str, Any]:
    """``("max_digits=1", "operators=['+']")`` as a dictionary; what is no Python literal is a text.

    Raises:
        ValueError: an entry without ``=``.
    """
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ValueError(f"data.options: got {setting!r}, expected name=value")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options
