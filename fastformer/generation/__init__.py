"""Text generation: :func:`generate` with Hugging Face's argument names, over decoders that keep a key/value cache."""

from ..models.cache import KVCache
from ..models.generation_config import GenerationConfig
from .decoder import CachedDecoder, Decoder, RecomputingDecoder, decoder_for
from .decoding import generate
from .outputs import GenerateOutput
from .processors import MinLength, NoRepeatNGram, RepetitionPenalty
from .sampling import sample
from .text import TextStreamer, to_text

__all__ = [
    "CachedDecoder",
    "Decoder",
    "GenerateOutput",
    "GenerationConfig",
    "KVCache",
    "MinLength",
    "NoRepeatNGram",
    "RecomputingDecoder",
    "RepetitionPenalty",
    "TextStreamer",
    "decoder_for",
    "generate",
    "sample",
    "to_text",
]
