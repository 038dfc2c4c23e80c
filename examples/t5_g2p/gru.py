"""The GRU of g2p-en (Park and Kim 2019), run on many words at a time.

An encoder reads the letters and </s>; its last state begins a decoder that writes phonemes, always the likeliest, until
</s> or 20 of them. The package looks a word up in CMUdict first and asks the network only for words that are not there;
here the network alone answers. Its training words are CMUdict's too, and which were held out is not said, so it has
probably seen most of the test words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastformer.data.packages import python_package
from fastformer.evaluation import Record

from ..datasets import Example

# The order of the rows of its two embeddings, as g2p_en/g2p.py has it.
UNKNOWN_LETTER, END_OF_WORD, FIRST_LETTER = 1, 2, 3
BEGIN, END = 2, 3
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH UW V W Y Z ZH".split()  # UW is there without a digit too
LONGEST = 20


def phoneme_table() -> list[str]:
    """Phonemes in the order of its outputs, vowels with their stress digits."""
    vowels = [f"{vowel}{stress}" for vowel in VOWELS for stress in range(3)]
    return ["<pad>", "<unk>", "<s>", "</s>", *sorted([*vowels, *CONSONANTS])]


class GRU:
    """Its weights.

    Args:
        file: ``checkpoint20.npz``.
    """

    def __init__(self, file: Path | None = None) -> None:
        stored = np.load(file or python_package("g2p-en==2.1.0", "g2p_en/checkpoint20.npz"))
        self.weights = {name: torch.from_numpy(stored[name]) for name in stored.files}
        self.encoder, self.decoder = (self._cell(name) for name in ("enc", "dec"))
        self.phonemes = phoneme_table()
        if len(self.phonemes) != len(self.weights["fc_b"]):
            raise ValueError(f"{file}: has {len(self.weights['fc_b'])} outputs, expected {len(self.phonemes)}")

    def _cell(self, name: str) -> nn.GRUCell:
        width, inputs = self.weights[f"{name}_w_hh"].shape[1], self.weights[f"{name}_w_ih"].shape[1]
        cell = nn.GRUCell(inputs, width)
        names = ("weight_ih", "w_ih"), ("weight_hh", "w_hh"), ("bias_ih", "b_ih"), ("bias_hh", "b_hh")
        cell.load_state_dict({theirs: self.weights[f"{name}_{stored}"] for theirs, stored in names})
        return cell

    @torch.no_grad()
    def __call__(self, words: list[str]) -> list[str]:
        """Phonemes of lower-case words, separated by spaces, without stress."""
        lengths = torch.tensor([len(word) + 1 for word in words])
        letters = torch.full((len(words), int(lengths.max())), END_OF_WORD)
        for row, word in enumerate(words):
            letters[row, : len(word)] = torch.tensor(
                [FIRST_LETTER + ord(c) - ord("a") if "a" <= c <= "z" else UNKNOWN_LETTER for c in word]
            )
        state = torch.zeros(len(words), self.encoder.hidden_size)
        for place in range(letters.shape[1]):
            following = self.encoder(self.weights["enc_emb"][letters[:, place]], state)
            state = torch.where((place < lengths)[:, None], following, state)
        written = self._write(state)
        return [self._text(row) for row in written.tolist()]

    def _write(self, state: Tensor) -> Tensor:
        """Outputs (words, LONGEST)."""
        output, outputs = torch.full((len(state),), BEGIN), []
        for _ in range(LONGEST):
            state = self.decoder(self.weights["dec_emb"][output], state)
            output = (state @ self.weights["fc_w"].T + self.weights["fc_b"]).argmax(-1)
            outputs.append(output)
        return torch.stack(outputs, dim=1)

    def _text(self, outputs: list[int]) -> str:
        end = outputs.index(END) if END in outputs else len(outputs)
        return re.sub(r"\d", "", " ".join(self.phonemes[output] for output in outputs[:end]))


def pronounce(_model: None, examples: Iterable[Example], file: Path | None = None) -> Iterator[Record]:
    """The network's answer to each example's ``word``."""
    gru, examples = GRU(file), list(examples)
    for begin in range(0, len(examples), 512):
        batch = examples[begin : begin + 512]
        for example, answer in zip(batch, gru([e["word"] for e in batch])):
            yield Record(answer, example["target"], {"word": example["word"]})
