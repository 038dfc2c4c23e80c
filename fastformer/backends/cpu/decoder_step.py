"""The fused GPT-2 decoder step of csrc/cpu/decoder_step.cpp; checked and called by functional/decoder_step.py."""

from __future__ import annotations

from ... import _C

workspace_size = _C.decoder_step_workspace
run = _C.decoder_step
