"""Text generation: :func:`generate` with Hugging Face's argument names, over decoders that keep a key/value cache."""

from ..models.cache import KVCache
from .decoder import CachedDecoder, Decoder, RecomputingDecoder, decoder_for
from .decoding import generate
from .sampling import sample

__all__ = ["CachedDecoder", "Decoder", "KVCache", "RecomputingDecoder", "decoder_for", "generate", "sample"]
