"""Zephyr, as TinyLlama-Chat speaks it: `<|user|>\\nprompt</s>\\n<|assistant|>\\nanswer</s>`; the system message is
Vicuna's (ours). Its markers are plain text, and no token begins a conversation, as in TinyLlama's own template."""

from __future__ import annotations

from calm_jax.text.templates import EOS, ChatTemplate, Special
from calm_jax.text.templates.vicuna import SYSTEM

END = Special(EOS)
TEMPLATE = ChatTemplate(
    begin=(f"<|system|>\n{SYSTEM}", END), user=("\n<|user|>\n",), assistant=(END, "\n<|assistant|>\n"), end=(END,),
    markers=("<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"))
