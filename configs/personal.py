"""One person's taste as a small low-rank update of a trained model (ours; paper: personal scores in context).

    python -m tools.prepare_data --dataset csv --scale 1,5 --source RATINGS.csv --data_dir DATA
    python -m calm_jax.train --config configs/personal.py:7b --config.init=runs/finetune-7b --config.data.dir=DATA

For people who have rated more pictures than fit before a question (`calm personalise`): a score process over these
ratings alone, from which only the update of the language model's attention learns. Everything else stays, and is read
from where it was trained: what is saved of a person is the update, a few megabytes for 7b.
"""

import dataclasses

from calm_jax import config as c

DATASET = "csv"  # or the --name that tools.prepare_data was given
LORA = c.Lora(rank=8, alpha=16.0, targets=r"decoder/blocks/(q|v)")  # LoRA's own choice of layers
SIZES = {  # rows a step, shape of a row
    "tiny": (2, c.Row(tokens=480, images=3, answers=160, candidates=8)),
    "small": (2, c.Row(tokens=1024, images=4, answers=256, candidates=8)),
    "laptop": (4, c.Row(tokens=512, images=4, answers=160, candidates=8)),
    "1b": (8, c.Row(candidates=8)),
    "7b": (8, c.Row(candidates=8)),
    "13b": (8, c.Row(candidates=8)),
}
STEPS = 200


def get_config(variant: str = "tiny"):
    """The config of a variant: tiny, small, laptop, 1b, 7b or 13b."""
    variant = variant or "tiny"
    model = dataclasses.replace(c.model(variant), lora=LORA)
    rows, row = SIZES[variant]
    process = c.Process(
        dataset=DATASET, tasks={"score": 1.0}, score_spread=0.5, row=row, batch=rows, steps=STEPS,
        eval_every=STEPS // 4, optimizer=c.Optimizer(peak_lr=1e-3, clip=1.0), train=(r".*/lora/(a|b)",),
        freeze=(r"encoder/.*", r"mfam/.*", r"decoder/(?!.*/lora/).*"), cached=variant in c.CACHED)
    return c.to_config_dict(c.Config(model=model, chat=c.CHATS.get(variant, "vicuna"), run=("personal",),
                                     processes={"personal": process}))
