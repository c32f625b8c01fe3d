"""A judge of photographs on two cores: pretrained parts, and a table of photographs with scores (ours).

    calm parts laptop --out parts
    calm convert --parts parts --out start
    calm prepare --dataset csv --scale 1,5 --source RATINGS.csv --data-dir DATA
    calm train --config laptop --config.init=start --config.tokenizer=start --config.data.dir=DATA

The variant names the data set: `csv`, or `para`; `+light` leaves the second process out.

1. `looking`: the MFAM learns the scores through the light head, without the language model. A step sees 64 photographs,
   of each level 64 patches drawn anew, which takes less than half of the time of all 256; and each photograph is mixed
   with another. Both keep 7.4 million parameters from learning a few thousand scores by heart. Its result is
   `calm score --reader light`.
2. `speaking`: the language model learns to read the visual tokens, by LoRA adapters, and to say scores, comments
   composed of what is known and measured, and grades of attributes; the MFAM follows at a tenth of the rate, and keeps
   the light head right.
"""

import dataclasses

from calm_jax import config as c
from calm_jax.data import attributes

VARIANTS = ("csv", "csv+light", "para", "para+light")
LIGHT_HEAD = c.LightHead(tuple(len(attribute.grades) for attribute in attributes.ATTRIBUTES.values()),
                         tuple(attribute.level for attribute in attributes.ATTRIBUTES.values()))
LORA = c.Lora(rank=16, alpha=32.0, dropout=0.0, targets=r"decoder/blocks/(q|v)")
PATCHES = 64
LOOKING, SPEAKING = 1400, 240  # steps


def get_config(variant: str = "csv"):
    """The config of a data set: csv or para, alone or with +light."""
    variant = variant or VARIANTS[0]
    if variant not in VARIANTS:
        raise c.ConfigError(f"there is no variant {variant!r}{c.nearest(variant, VARIANTS)}")
    dataset, _, light = variant.partition("+")
    model = dataclasses.replace(c.model("laptop"), light_head=LIGHT_HEAD, lora=LORA)
    shared = dict(dataset=dataset, cached=True, patches=PATCHES)
    processes = {"looking": c.Process(
        tasks={"score": 1.0}, words=0.0, light_head=1.0, mixup=0.4,
        row=c.Row(tokens=1024, images=8, answers=256), batch=8, steps=LOOKING,
        optimizer=c.Optimizer(peak_lr=1e-3, weight_decay=0.3), eval_every=-(-LOOKING // 3),
        train=(r"mfam/.*", r"light_head/.*"), freeze=(r"encoder/.*", r"decoder/.*"), **shared)}
    if not light:
        processes["speaking"] = c.Process(
            tasks={"score": 0.6, "comment": 0.2, "attributes": 0.2}, compose=True, light_head=0.3, score_spread=0.5,
            terse=0.5, phrasings=5, versions=1,
            row=c.Row(tokens=512, images=8, answers=160, candidates=8), batch=8, accumulate=2, steps=SPEAKING,
            optimizer=c.Optimizer(peak_lr=2e-3, b2=0.95, scale=("(mfam|light_head)/.*=0.1",)),
            eval_every=SPEAKING // 2, eval_batches=4,
            train=(r"mfam/.*", r"light_head/.*", r"decoder/.*/lora/(a|b)"),
            freeze=(r"encoder/.*", r"decoder/(?!.*/lora/).*"), **shared)
    return c.to_config_dict(c.Config(model=model, chat=c.CHATS["laptop"], run=tuple(processes), processes=processes))
