"""Qwen2, 2.5 and 3, without thinking: ChatML with Qwen's own system message."""

from __future__ import annotations

import dataclasses

from calm_jax.text.templates import chatml

TEMPLATE = dataclasses.replace(
    chatml.TEMPLATE, begin=(chatml.START, "system\nYou are a helpful assistant.", chatml.END, "\n"))
