"""ChatML without a system message (ours): of a small model's questions those 33 tokens would be a third."""

import dataclasses

from calm_jax.text.templates import chatml

TEMPLATE = dataclasses.replace(chatml.TEMPLATE, begin=())
