"""Stage two of the paper: comments, then scores; one file for every size of model.

    python -m calm_jax.train --config configs/finetune.py                       # tiny: from scratch, on a laptop
    python -m calm_jax.train --config configs/finetune.py:7b --config.init=runs/pretrain-7b
    python -m calm_jax.train --config configs/finetune.py:7b+lora --config.init=runs/pretrain-7b

`+lora` learns low-rank updates of the language model instead of all of it, as LLaVA-1.5's own recipe does, at its rate;
`+head` also teaches the regression head that the reader `head` asks.

Facts of the paper: the two processes, MFAM and LLM trained with the encoder frozen, the peak learning rates of 2.5e-5
and 7e-5, Adam with warm-up and cosine. Ours: everything else; `tiny` and `small` start from nothing, so the encoder
learns too (with the MFAM at a tenth of the rate, see pretrain.py), at learning rates of training from scratch.
"""

import dataclasses

from calm_jax import config as c

SIZES = {  # rows a step, steps of the two processes, peak learning rates, shape of a row (ours but the 7b rates)
    "tiny": (2, (450, 450), (2e-3, 2e-3), c.Row(tokens=480, images=3, answers=160)),
    "small": (16, (5_000, 5_000), (5e-4, 5e-4), c.Row(tokens=1024, images=4, answers=256)),
    "7b": (128, (1_640, 1_840), (2.5e-5, 7e-5), c.Row()),
    "13b": (128, (1_640, 1_840), (2.5e-5, 7e-5), c.Row()),
}


VARIANTS = tuple(size + option for option in ("", "+lora", "+head") for size in SIZES)
LORA = c.Lora(rank=128, alpha=256.0)  # LLaVA-1.5
LORA_RATE = 2e-4  # LLaVA-1.5
HEAD = 256  # hidden channels of the regression head (ours)


def get_config(variant: str = "tiny"):
    """The config of a variant: tiny, small, 7b or 13b, alone or with +lora or +head."""
    variant = variant or "tiny"
    if variant not in VARIANTS:
        raise c.ConfigError(f"there is no variant {variant!r}{c.nearest(variant, VARIANTS)}")
    size, _, option = variant.partition("+")
    model = c.model(size)
    rows, steps, rates, row = SIZES[size]
    scratch = size in ("tiny", "small")
    adam = {"b2": 0.95, "scale": ("(vit|mfam)/.*=0.1",)} if scratch else {}
    train, freeze = ((".*",), ()) if scratch else ((r"mfam/.*", r"llama/.*"), (r"vit/.*",))
    if option == "lora":
        model = dataclasses.replace(model, lora=LORA)
        rates = tuple(max(rate, LORA_RATE) for rate in rates)
        train, freeze = (r"mfam/.*", r"llama/.*/lora/(a|b)"), (r"vit/.*", r"llama/(?!.*/lora/).*")
    if option == "head":
        model = dataclasses.replace(model, score_head=c.ScoreHead(HEAD))
    processes = {}
    for name, task, count, rate in zip(("comments", "scores"), ("comment", "score"), steps, rates, strict=True):
        scores = option == "head" and name == "scores"
        learn, stay = train, freeze
        if option == "head" and not scratch:  # where everything learns, the head does too
            head = ("score_head/.*",)
            learn, stay = (train + head, freeze) if scores else (train, freeze + head)
        processes[name] = c.Process(
            tasks={task: 1.0}, row=row, batch=rows, steps=count, optimizer=c.Optimizer(peak_lr=rate, **adam),
            train=learn, freeze=stay, score_head=float(scores), eval_every=max(-(-count // 2), 1))
    return c.to_config_dict(c.Config(model=model, run=tuple(processes), processes=processes))
