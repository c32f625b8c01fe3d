"""Stage one of the paper, text-guided self-supervision, then generic pairs; one file for every size of model.

    python -m calm_jax.train --config configs/pretrain.py            # tiny: from scratch, on a laptop
    python -m calm_jax.train --config configs/pretrain.py:7b --config.init=CONVERTED_CHECKPOINT
    python -m calm_jax.train --config configs/pretrain.py:laptop --config.init=CONVERTED --config.tokenizer=CONVERTED

Facts of the paper: the two processes, what each trains, the peak learning rate of 1e-3, Adam with warm-up and cosine.
Ours: everything else, see `python -m calm_jax.config`.

`laptop` has a process `warm_up` before them (ours): the MFAM learns the grades of edits through a light head, without
the language model, which costs the most: its tokens are drawn to the embeddings of the words. A share of that stays in
the process after it; then the head is left out.

`tiny` and `small` start from nothing. A process `language` before the paper's two stands in for the pre-trained
language model: only the language model learns there, reading the features of a random encoder. Without it the
untrained language model first learns to live without the picture, and the visual tokens of all pictures become alike
(measured: their spread over pictures fell from 0.23 to 0.003 of their size within 100 steps). In the paper's processes
every part then learns, encoder and MFAM at a tenth of the rate, for the same reason.
"""

import dataclasses

from calm_jax import config as c
from calm_jax.data import attributes

# rows a step, steps of language, self-supervised and generic, shape of a row (ours)
SIZES = {
    "tiny": (2, (500, 1_500, 200), c.Row(tokens=384, images=3, answers=160)),
    "small": (16, (2_000, 20_000, 5_000), c.Row(tokens=1024, images=4, answers=256)),
    "laptop": (16, (0, 600, 100), c.Row(tokens=512, images=4, answers=160)),
    "1b": (256, (0, 4_000, 2_180), c.Row()),
    "7b": (256, (0, 4_000, 2_180), c.Row()),
    "13b": (256, (0, 4_000, 2_180), c.Row()),
}
# Of `laptop`, whose warm-up leaves the language model out: rows, steps and shape of a row; versions of each record.
WARM_UP = {"laptop": (8, 300, c.Row(tokens=3072, images=8, answers=1024))}
VERSIONS = {"laptop": 2}
# After a warm-up (ours): the light head's loss stays beside that of the words, at a tenth of the paper's rate. At 1e-3,
# with .3 of the head's loss, six steps through a language model that cannot read the tokens yet cost a fifth of what
# the warm-up had taught (unseen photographs of the demo, grades by distance: .84 before, .68 after).
LIGHT_SHARE, LATER_RATE = 1.0, 1e-4
LIGHT_HEAD = c.LightHead(tuple(len(attribute.grades) for attribute in attributes.ATTRIBUTES.values()),
                         tuple(attribute.level for attribute in attributes.ATTRIBUTES.values()))
PHRASINGS = 5  # of each question and answer, in `tiny` and `laptop`: what they have the steps to learn (ours)


def get_config(variant: str = "tiny"):
    """The config of a variant: tiny, small, laptop, 1b, 7b or 13b."""
    variant = variant or "tiny"
    model = c.model(variant)
    rows, (language, unlabeled, pairs), row = SIZES[variant]
    scratch = variant in ("tiny", "small")
    # Comparisons are the harder half and twice as long: the smallest model spends little on them.
    tasks = {"attributes": 0.85, "comparisons": 0.15} if variant == "tiny" else {"attributes": 0.7, "comparisons": 0.3}
    phrasings = PHRASINGS if variant in ("tiny", "laptop") else 0
    encoder_llm = ("encoder/.*", "decoder/.*")
    optimizer = c.Optimizer(peak_lr=1e-3)
    processes = {}
    if scratch:
        rate = 3e-3 if variant == "tiny" else 1e-3
        optimizer = c.Optimizer(peak_lr=rate, b2=0.95, scale=("(encoder|mfam)/.*=0.1",))
        processes["language"] = c.Process(
            tasks=tasks, parts=c.LEVELS, row=row, batch=rows, phrasings=phrasings, steps=language,
            optimizer=c.Optimizer(peak_lr=rate, b2=0.95, warmup=0.1, final=0.5), train=(r"decoder/.*",),
            freeze=(r"encoder/.*", r"mfam/.*"), eval_every=0)
    if variant in WARM_UP:
        model = dataclasses.replace(model, light_head=LIGHT_HEAD)
        encoder_llm = (*encoder_llm, "light_head/.*")
        count, steps, wide = WARM_UP[variant]
        processes["warm_up"] = c.Process(
            tasks={"attributes": 1.0}, row=wide, batch=count, steps=steps, optimizer=optimizer, words=0.0,
            light_head=1.0, train=(r"mfam/.*", r"light_head/.*"), freeze=(r"encoder/.*", r"decoder/.*"),
            eval_every=-(-steps // 2), cached=variant in c.CACHED, versions=VERSIONS[variant])
    later = dataclasses.replace(optimizer, peak_lr=LATER_RATE) if variant in WARM_UP else optimizer
    processes["self_supervised"] = c.Process(
        tasks=tasks, parts=c.LEVELS, row=row, batch=rows, phrasings=phrasings, steps=unlabeled, optimizer=later,
        train=(".*",) if scratch else (r"mfam/qformers/.*",),
        freeze=() if scratch else (r"mfam/thematic/.*", *encoder_llm),
        light_head=LIGHT_SHARE if variant in WARM_UP else 0.0,
        eval_every=max(-(-unlabeled // 3), 1), cached=variant in c.CACHED, versions=VERSIONS.get(variant, 0))
    processes["generic"] = c.Process(
        tasks={"caption": 1.0}, parts=("thematic",), row=row, batch=rows, steps=pairs, optimizer=optimizer,
        train=(".*",) if scratch else (r"mfam/thematic/.*",),
        freeze=() if scratch else (r"mfam/qformers/.*", *encoder_llm),
        eval_every=max(-(-pairs // 2), 1), cached=variant in c.CACHED)
    return c.to_config_dict(c.Config(model=model, chat=c.CHATS.get(variant, "vicuna"), run=tuple(processes),
                                     processes=processes))
