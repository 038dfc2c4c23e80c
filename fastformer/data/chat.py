"""Conversations as text, and which of it the model is to write.

A conversation is a list of {"role", "content"}. The tokenizer's chat template (Jinja, as in ``transformers``) turns it
into text; without one it is a line ``Role: content`` for each message. Each answer is what the template adds to the
conversation so far; it is encoded apart from what comes before, as it is when the model is asked later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ..extras import require
from .collators import IGNORED

Message = Mapping[str, str]
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


def render(messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    """The text of a conversation, by the tokenizer's ``chat_template`` or :data:`PLAIN_TEMPLATE`.

    Args:
        add_generation_prompt: end where the next answer begins.

    Raises:
        ValueError: a message without role or content, or one that the template refuses.
    """
    _check(messages)
    jinja = require("jinja2", "a chat template", "finetune")
    special = getattr(tokenizer, "special_tokens", {})
    values = {f"{role}_token": special.get(role, "") for role in ("bos", "eos", "pad", "unk")}
    try:
        template = _environment().from_string(getattr(tokenizer, "chat_template", None) or PLAIN_TEMPLATE)
        return template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **values)
    except jinja.TemplateError as error:
        raise ValueError(f"chat_template: {error}") from error


def encode_conversation(messages: Sequence[Message], tokenizer: Any) -> dict[str, list[int]]:
    """``input_ids`` of a whole conversation, and ``labels``: the tokens of every answer, -100 elsewhere.

    Raises:
        ValueError: no message of the role "assistant", or a template that changes earlier messages as it goes on.
    """
    _check(messages)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("messages: none is of the role 'assistant', so there is nothing to learn")
    ids: list[int] = []
    labels: list[int] = []
    written = ""
    for i in answers:
        asked = render(messages[:i], tokenizer, add_generation_prompt=True)
        answered = render(messages[: i + 1], tokenizer)
        if not (asked.startswith(written) and answered.startswith(asked)):
            raise ValueError(
                "chat_template: it changes what it wrote for earlier messages; answers cannot be told apart"
            )
        question, answer = (tokenizer.encode(text) for text in (asked[len(written) :], answered[len(asked) :]))
        ids += question + answer
        labels += [IGNORED] * len(question) + answer
        written = answered
    return {"input_ids": ids, "labels": labels}


def encode_answer(prompt: str, answer: str, tokenizer: Any) -> dict[str, list[int]]:
    """A prompt and what follows it, with the end of text after it if the tokenizer has one; only that is scored."""
    question, target = tokenizer.encode(prompt), tokenizer.encode(answer)
    end = getattr(tokenizer, "eos_token_id", None)
    target += [] if end is None else [end]
    return {"input_ids": question + target, "labels": [IGNORED] * len(question) + target}


def _check(messages: Sequence[Message]) -> None:
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"messages: expected {{'role': …, 'content': …}}, got {message!r}")


def _environment() -> Any:
    """Templates come with models from elsewhere: they may compute, and reach nothing."""
    jinja = require("jinja2.sandbox", "a chat template", "finetune")
    environment = jinja.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _refuse(message: str) -> None:
    raise require("jinja2", "a chat template", "finetune").TemplateError(message)
