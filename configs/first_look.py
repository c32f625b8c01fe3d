"""Does text-guided self-supervision help a model that learns to score? One small model and a budget of steps (ours).

    python -m tools.first_look --data_dir DATA              # all arms, their evaluation and the page

The variants are what an arm is made of: `self_supervised` and `then_scores` spend half of the budget each, one after
the other; `scores` spends all of it. All have the same rows and compute the same parts, so that a step of one costs
what a step of another costs. Everything starts from random numbers; nothing here is the paper's recipe, which starts
from CLIP and Vicuna.
"""

from calm_jax import config as c

DATASET = "para"  # stored at a longest side of 256 pixels: twice what the model sees, and all of it fits into memory
STEPS = 900
ROWS = 12
MODEL = c.Model(
    vit=c.Vit(image_size=128, patch=16, width=128, depth=4, heads=4, mlp_width=512, stem="conv"),
    depths=c.Depths(thematic=1.0),
    qformer=c.QFormer(width=128, depth=2, heads=4, mlp_width=512, cross_every=1, queries=8),
    llama=c.Llama(vocab=2048, width=128, depth=2, heads=4, kv_heads=4, mlp_width=344, positions=512),
    remat="none")


def get_config(variant: str = "scores"):
    """The config of a variant: scores, self_supervised or then_scores."""
    variant = variant or VARIANTS[0]
    process = dict(dataset=DATASET, row=c.Row(tokens=424, images=3, answers=96, candidates=8), batch=ROWS,
                   optimizer=c.Optimizer(peak_lr=1e-3, b2=0.98, warmup=0.05), eval_batches=8)
    steps = STEPS if variant == "scores" else STEPS // 2
    process |= {"steps": steps, "eval_every": -(-steps // 4)}
    if variant == "self_supervised":
        tasks = {"attributes": 0.35, "measured": 0.5, "comparisons": 0.15}
        processes = {"self_supervised": c.Process(tasks=tasks, phrasings=5, **process)}
    elif variant in ("scores", "then_scores"):
        processes = {"scores": c.Process(tasks={"score": 1.0}, score_spread=0.7, **process)}
    else:
        raise c.ConfigError(f"there is no variant {variant!r}{c.nearest(variant, VARIANTS)}")
    return c.to_config_dict(c.Config(model=MODEL, run=tuple(processes), processes=processes,
                                     data=c.Data(cache_mb=2_000)))


VARIANTS = ("scores", "self_supervised", "then_scores")
