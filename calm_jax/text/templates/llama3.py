"""Llama 3, 3.1 and 3.2 Instruct; the system message is Vicuna's (ours)."""

from __future__ import annotations

from calm_jax.text.templates import BOS, ChatTemplate, Special
from calm_jax.text.templates.vicuna import SYSTEM

START, STOP, TURN = Special("<|start_header_id|>"), Special("<|end_header_id|>"), Special("<|eot_id|>")
TEMPLATE = ChatTemplate(
    begin=(Special(BOS), START, "system", STOP, f"\n\n{SYSTEM}", TURN), user=(START, "user", STOP, "\n\n"),
    assistant=(TURN, START, "assistant", STOP, "\n\n"), end=(TURN,))
