"""Zephyr's template, as TinyLlama-Chat speaks it; the system message is Vicuna's (ours)."""

from __future__ import annotations

from calm_jax.text.templates import EOS, ChatTemplate, Special
from calm_jax.text.templates.vicuna import SYSTEM

END = Special(EOS)
TEMPLATE = ChatTemplate(
    begin=(f"<|system|>\n{SYSTEM}", END, "\n"), user=("<|user|>\n",), assistant=(END, "\n<|assistant|>\n"),
    end=(END, "\n"), markers=("<|system|>", "<|user|>", "<|assistant|>", "</s>"))
