"""Vicuna v1.1 and v1.5: `SYSTEM USER: ... ASSISTANT: answer</s>USER: ...`."""

from __future__ import annotations

from calm_jax.text.templates import BOS, EOS, ChatTemplate, Special

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions.")
TEMPLATE = ChatTemplate(
    begin=(Special(BOS), SYSTEM), user=("USER:",), assistant=("ASSISTANT:",), end=(Special(EOS),),
    markers=("<s>", "</s>", "<unk>", "USER:", "ASSISTANT:"))
