"""ChatML, as SmolLM2 and many others speak it; the system message is Vicuna's (ours)."""

from __future__ import annotations

from calm_jax.text.templates import ChatTemplate, Special
from calm_jax.text.templates.vicuna import SYSTEM

START, END = Special("<|im_start|>"), Special("<|im_end|>")
TEMPLATE = ChatTemplate(
    begin=(START, f"system\n{SYSTEM}", END, "\n"), user=(START, "user\n"),
    assistant=(END, "\n", START, "assistant\n"), end=(END, "\n"))
