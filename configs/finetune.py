"""Stage two of the paper: comments, then scores; one file for every size of model.

    python -m calm_jax.train --config configs/finetune.py                       # tiny: from scratch, on a laptop
    python -m calm_jax.train --config configs/finetune.py:7b --config.init=runs/pretrain-7b
    python -m calm_jax.train --config configs/finetune.py:7b+lora --config.init=runs/pretrain-7b

`+lora` learns low-rank updates of the language model instead of all of it, as LLaVA-1.5's own recipe does, at its rate;
`+head` also teaches the regression head that the reader `head` asks; `+keep` mixes a share of earlier tasks into each
process, as `tiny` and `small` do anyway, for a process of scores alone unlearns to answer in words. They combine:
`7b+keep+lora`.

Facts of the paper: the two processes, MFAM and LLM trained with the encoder frozen, the peak learning rates of 2.5e-5
and 7e-5, Adam with warm-up and cosine. Ours: everything else; `tiny` and `small` start from nothing, so the encoder
learns too (with the MFAM at a tenth of the rate, see pretrain.py), at learning rates of training from scratch. The
rates of `laptop` are ours too, and larger, as its size allows.
"""

import dataclasses
import itertools

from calm_jax import config as c

SIZES = {  # rows a step, steps of the two processes, peak learning rates, shape of a row (ours but the 7b rates)
    "tiny": (2, (450, 450), (2e-3, 2e-3), c.Row(tokens=480, images=3, answers=160)),
    "small": (16, (5_000, 5_000), (5e-4, 5e-4), c.Row(tokens=1024, images=4, answers=256)),
    "laptop": (16, (200, 100), (3e-4, 2e-4), c.Row(tokens=512, images=6, answers=160, candidates=8)),
    "1b": (128, (1_640, 1_840), (2.5e-5, 7e-5), c.Row()),
    "7b": (128, (1_640, 1_840), (2.5e-5, 7e-5), c.Row()),
    "13b": (128, (1_640, 1_840), (2.5e-5, 7e-5), c.Row()),
}


OPTIONS = ("lora", "head", "keep")  # in this order; any of them together
VARIANTS = tuple(size + "".join(f"+{option}" for option in some) for size in SIZES
                 for count in range(len(OPTIONS) + 1) for some in itertools.combinations(OPTIONS, count))
LORA, LORA_RATE = c.Lora(rank=128, alpha=256.0), 2e-4  # LLaVA-1.5
# A small model needs few of them and large steps (ours); those of every layer took 1.4 times as long a step.
LAPTOP_LORA, LAPTOP_RATE = c.Lora(rank=16, alpha=32.0, dropout=0.0, targets=r"decoder/blocks/(q|v)"), 2e-3
HEAD = 256  # hidden channels of the regression head (ours)

# What a process learns besides, as shares of all that it learns (ours): what programs ask for and the processes before
# it taught, so that the last one still answers. The small ones also learn to suggest, which the paper asks for
# unlearned; with +keep, which the others take it by, that stays zero-shot in the large ones. `laptop` learns to read
# its visual tokens here: before, its language model is frozen.
LARGE = {"comments": {"attributes": 0.2}, "scores": {"comment": 0.15, "attributes": 0.1}}
KEEP = {
    "tiny": {"comments": {"attributes": 0.2, "suggestion": 0.35},
             "scores": {"comment": 0.1, "attributes": 0.1, "suggestion": 0.15}},
    "small": {"comments": {"attributes": 0.2, "suggestion": 0.2},
              "scores": {"comment": 0.15, "attributes": 0.1, "suggestion": 0.1}},
    "laptop": {"comments": {"attributes": 0.65, "suggestion": 0.05},
               "scores": {"comment": 0.2, "attributes": 0.3, "suggestion": 0.05}},
    "1b": LARGE, "7b": LARGE, "13b": LARGE}
KEPT_PHRASINGS = 5  # of each question and answer about attributes, in `tiny` and `laptop`, as in pretrain.py
TERSE = {"laptop": 0.5}  # of the questions about attributes: a name takes half the room of a question


def get_config(variant: str = "tiny"):
    """The config of a variant: tiny, small, laptop, 1b, 7b or 13b, alone or with +lora, +head or +keep, or several of
    them."""
    size, *options = (variant or "tiny").split("+")
    if size not in SIZES or not set(options) <= set(OPTIONS) or len(set(options)) < len(options):
        raise c.ConfigError(f"there is no variant {variant!r}{c.nearest(variant, VARIANTS)}")
    model = c.model(size)
    rows, steps, rates, row = SIZES[size]
    scratch = size in ("tiny", "small")
    keep = scratch or "keep" in options
    adam = {"b2": 0.95, "scale": ("(encoder|mfam)/.*=0.1",)} if scratch else {}
    if size == "laptop":  # its visual tokens are words already, see pretrain.py
        adam = {"b2": 0.95, "scale": ("mfam/.*=0.1",)}
    train, freeze = ((".*",), ()) if scratch else ((r"mfam/.*", r"decoder/.*"), (r"encoder/.*",))
    if "lora" in options:
        lora, least = (LAPTOP_LORA, LAPTOP_RATE) if size == "laptop" else (LORA, LORA_RATE)
        model = dataclasses.replace(model, lora=lora)
        rates = tuple(max(rate, least) for rate in rates)
        train, freeze = (r"mfam/.*", r"decoder/.*/lora/(a|b)"), (r"encoder/.*", r"decoder/(?!.*/lora/).*")
    if "head" in options:
        model = dataclasses.replace(model, score_head=c.ScoreHead(HEAD))
    processes = {}
    for name, task, count, rate in zip(("comments", "scores"), ("comment", "score"), steps, rates, strict=True):
        scores = "head" in options and name == "scores"
        learn, stay = train, freeze
        if "head" in options and train != (".*",):  # where everything learns, the head does too
            head = ("score_head/.*",)
            learn, stay = (train + head, freeze) if scores else (train, freeze + head)
        kept = KEEP[size][name] if keep else {}
        processes[name] = c.Process(
            tasks={task: 1.0 - sum(kept.values()), **kept}, row=row, terse=TERSE.get(size, 0.0),
            phrasings=KEPT_PHRASINGS if size in ("tiny", "laptop") else 0, batch=rows, steps=count,
            optimizer=c.Optimizer(peak_lr=rate, **adam), train=learn, freeze=stay,
            score_head=float(scores), eval_every=max(-(-count // 2), 1), cached=size in c.CACHED)
    return c.to_config_dict(c.Config(model=model, chat=c.CHATS.get(size, "vicuna"), run=tuple(processes),
                                     processes=processes))
