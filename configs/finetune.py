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
learns too (with the MFAM at a tenth of the rate, see pretrain.py), at learning rates of training from scratch.
"""

import dataclasses
import itertools

from calm_jax import config as c

SIZES = {  # rows a step, steps of the two processes, peak learning rates, shape of a row (ours but the 7b rates)
    "tiny": (2, (450, 450), (2e-3, 2e-3), c.Row(tokens=480, images=3, answers=160)),
    "small": (16, (5_000, 5_000), (5e-4, 5e-4), c.Row(tokens=1024, images=4, answers=256)),
    "laptop": (16, (150, 300), (2e-4, 2e-4), c.Row(tokens=512, images=4, answers=160, candidates=8)),
    "1b": (128, (1_640, 1_840), (2.5e-5, 7e-5), c.Row()),
    "7b": (128, (1_640, 1_840), (2.5e-5, 7e-5), c.Row()),
    "13b": (128, (1_640, 1_840), (2.5e-5, 7e-5), c.Row()),
}


OPTIONS = ("lora", "head", "keep")  # in this order; any of them together
VARIANTS = tuple(size + "".join(f"+{option}" for option in some) for size in SIZES
                 for count in range(len(OPTIONS) + 1) for some in itertools.combinations(OPTIONS, count))
LORA = c.Lora(rank=128, alpha=256.0)  # LLaVA-1.5
LORA_RATE = 2e-4  # LLaVA-1.5
HEAD = 256  # hidden channels of the regression head (ours)

# What a process learns besides, as shares of all that it learns (ours): what programs ask for and the processes before
# it taught, so that the last one still answers. `tiny` and `small` also learn to suggest, which the paper asks for
# unlearned; with +keep, which the large ones take it by, that stays zero-shot.
LARGE = {"comments": {"attributes": 0.2}, "scores": {"comment": 0.15, "attributes": 0.1}}
KEEP = {
    "tiny": {"comments": {"attributes": 0.2, "suggestion": 0.35},
             "scores": {"comment": 0.1, "attributes": 0.1, "suggestion": 0.15}},
    "small": {"comments": {"attributes": 0.2, "suggestion": 0.2},
              "scores": {"comment": 0.15, "attributes": 0.1, "suggestion": 0.1}},
    "laptop": LARGE, "1b": LARGE, "7b": LARGE, "13b": LARGE}
KEPT_PHRASINGS = 5  # of each question and answer about attributes, in `tiny`, as in pretrain.py


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
    train, freeze = ((".*",), ()) if scratch else ((r"mfam/.*", r"decoder/.*"), (r"encoder/.*",))
    if "lora" in options:
        model = dataclasses.replace(model, lora=LORA)
        rates = tuple(max(rate, LORA_RATE) for rate in rates)
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
            tasks={task: 1.0 - sum(kept.values()), **kept}, phrasings=KEPT_PHRASINGS if size == "tiny" else 0, row=row,
            batch=rows, steps=count, optimizer=c.Optimizer(peak_lr=rate, **adam), train=learn, freeze=stay,
            score_head=float(scores), eval_every=max(-(-count // 2), 1), cached=size in c.CACHED)
    return c.to_config_dict(c.Config(model=model, chat=c.CHATS.get(size, "vicuna"), run=tuple(processes),
                                     processes=processes))
