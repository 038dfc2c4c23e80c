"""Random BERTs of transformers, and ours with the same weights."""

import torch
import transformers

from fastformer.models import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from tests.models.parity import randomised, twin_of

VOCAB, SEGMENTS = 97, 3
SMALL = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 80, "max_position_embeddings": 40, "type_vocab_size": SEGMENTS}
SMALL |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# class of ours -> transformers', the fields that carry what it computes
CLASSES = {
    BertModel: (transformers.BertModel, ("last_hidden_state", "pooler_output")),
    BertForMaskedLM: (transformers.BertForMaskedLM, ("logits",)),
    BertForSequenceClassification: (transformers.BertForSequenceClassification, ("logits",)),
    BertForTokenClassification: (transformers.BertForTokenClassification, ("logits",)),
    BertForQuestionAnswering: (transformers.BertForQuestionAnswering, ("start_logits", "end_logits")),
}


def theirs_of(cls=BertForMaskedLM, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SMALL, **changes}, attn_implementation="eager")
    return randomised(CLASSES[cls][0](config)).to(dtype)


def ours_of(cls=BertForMaskedLM, dtype=torch.float64, **changes):
    return twin_of(theirs_of(cls, dtype, **changes), cls)


def draw(high, *shape, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def ids(batch=3, length=17):
    return draw(VOCAB, batch, length)


def mask():
    """Padding on the left in one text, on the right in another."""
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[1, :6] = 0
    mask[2, 11:] = 0
    return mask


def labels_of(cls, seed=2):
    if cls is BertForSequenceClassification:
        return draw(2, 3, seed=seed)
    labels = draw(VOCAB if cls is BertForMaskedLM else 2, 3, 17, seed=seed)
    return labels.masked_fill(draw(2, 3, 17, seed=seed + 1) == 0, -100)


def targets_of(cls):
    """What makes ``cls`` return a loss; of the answers one ends behind the text, which is not counted."""
    if cls is BertForQuestionAnswering:
        return {"start_positions": torch.tensor([2, 0, 9]), "end_positions": torch.tensor([5, 17, 9])}
    return {"labels": labels_of(cls)}
