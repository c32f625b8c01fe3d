"""Stage one of the paper, text-guided self-supervision, then generic pairs; one file for every size of model.

    python -m calm_jax.train --config configs/pretrain.py            # tiny: from scratch, on a laptop
    python -m calm_jax.train --config configs/pretrain.py:7b --config.init=CONVERTED_CHECKPOINT

Facts of the paper: the two processes, what each trains, the peak learning rate of 1e-3, Adam with warm-up and cosine.
Ours: everything else, see `python -m calm_jax.config`.
"""

from calm_jax import config as c

# rows a step, steps of the two processes, tokens and images and answers of a row (ours)
SIZES = {
    "tiny": (8, (900, 250), c.Row(tokens=448, images=3, answers=192)),
    "small": (16, (20_000, 5_000), c.Row(tokens=1024, images=4, answers=256)),
    "7b": (256, (4_000, 2_180), c.Row()),
    "13b": (256, (4_000, 2_180), c.Row()),
}


def get_config(variant: str = "tiny"):
    """The config of a variant: tiny, small, 7b or 13b."""
    variant = variant or "tiny"
    model = c.model(variant)
    rows, steps, row = SIZES[variant]
    scratch = variant in ("tiny", "small")  # nothing is pre-trained there, so everything learns in every process
    encoder_llm = ("vit/.*", "llama/.*")
    optimizer = c.Optimizer(peak_lr=1e-3)
    processes = {
        "self_supervised": c.Process(
            tasks={"attributes": 1.0}, parts=c.LEVELS, row=row, batch=rows, steps=steps[0], optimizer=optimizer,
            train=(".*",) if scratch else (r"mfam/qformers/.*",),
            freeze=() if scratch else (r"mfam/thematic/.*", *encoder_llm),
            eval_every=max(steps[0] // 4, 1)),
        "generic": c.Process(
            tasks={"caption": 1.0}, parts=("thematic",), row=row, batch=rows, steps=steps[1], optimizer=optimizer,
            train=(".*",) if scratch else (r"mfam/thematic/.*",),
            freeze=() if scratch else (r"mfam/qformers/.*", *encoder_llm),
            eval_every=max(steps[1] // 2, 1)),
    }
    return c.to_config_dict(c.Config(model=model, run=tuple(processes), processes=processes))
