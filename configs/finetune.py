"""Stage two of the paper: comments, then scores; one file for every size of model.

    python -m calm_jax.train --config configs/finetune.py                       # tiny: from scratch, on a laptop
    python -m calm_jax.train --config configs/finetune.py:7b --config.init=runs/pretrain-7b

Facts of the paper: the two processes, MFAM and LLM trained with the encoder frozen, the peak learning rates of 2.5e-5
and 7e-5, Adam with warm-up and cosine. Ours: everything else; `tiny` and `small` start from nothing, so the encoder
learns too (with the MFAM at a tenth of the rate, see pretrain.py), at learning rates of training from scratch.
"""

from calm_jax import config as c

SIZES = {  # rows a step, steps of the two processes, peak learning rates, shape of a row (ours but the 7b rates)
    "tiny": (2, (450, 450), (2e-3, 2e-3), c.Row(tokens=480, images=3, answers=160)),
    "small": (16, (5_000, 5_000), (5e-4, 5e-4), c.Row(tokens=1024, images=4, answers=256)),
    "7b": (128, (1_640, 1_840), (2.5e-5, 7e-5), c.Row()),
    "13b": (128, (1_640, 1_840), (2.5e-5, 7e-5), c.Row()),
}


def get_config(variant: str = "tiny"):
    """The config of a variant: tiny, small, 7b or 13b."""
    variant = variant or "tiny"
    model = c.model(variant)
    rows, steps, rates, row = SIZES[variant]
    scratch = variant in ("tiny", "small")
    adam = {"b2": 0.95, "scale": ("(vit|mfam)/.*=0.1",)} if scratch else {}
    processes = {
        name: c.Process(
            tasks=tasks, row=row, batch=rows, steps=count, optimizer=c.Optimizer(peak_lr=rate, **adam),
            train=(".*",) if scratch else (r"mfam/.*", r"llama/.*"), freeze=() if scratch else (r"vit/.*",),
            eval_every=max(-(-count // 2), 1))
        for name, tasks, count, rate in zip(
            ("comments", "scores"), ({"comment": 1.0}, {"score": 1.0}), steps, rates, strict=True)
    }
    return c.to_config_dict(c.Config(model=model, run=tuple(processes), processes=processes))
