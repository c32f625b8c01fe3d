"""Does text-guided self-supervision help a model that learns to score? One small model and a budget of steps (ours).

    python -m tools.studies.first_look --data_dir DATA              # all arms, their evaluation and the page

The variants are what an arm is made of: `self_supervised` and `then_scores` spend half of the budget each, one after
the other; `scores` spends all of it. `all_tasks` goes on from `self_supervised` to scores, attributes and suggestions,
and then to personal scores of OASIS beside them; `no_suggestions` is the same without suggestions. Everything starts
from random numbers; nothing here is the paper's recipe, which starts from CLIP and Vicuna.

Steps are small and many: at the same number of pictures, three rows a step learn where twelve collapse to the mean
score (300 steps of 12 rows at one rate: PLCC .02; 800 steps of 3 rows as below: .23). As in pretrain.py, the language
model first learns to speak about what a random encoder sees, and the encoder learns at a tenth of its rate. Edits with
one phrasing of each question are most of the self-supervision: in 1,300 steps of nothing else the model tells exposure
on 91 % and tint on 95 % of the validation pictures, where as many steps about measurements alone teach it nothing yet.
"""

from calm_jax import config as c

DATASET = "para"  # stored at a longest side of 256 pixels: twice what the model sees, and all of it fits into memory
STEPS = 3_200
ROWS = 3
MODEL = c.Model(
    encoder=c.encoder("clip", image_size=128, patch=16, width=128, depth=4, heads=4, mlp_width=512, stem="conv"),
    depths=c.Depths(thematic=1.0),
    qformer=c.QFormer(width=128, depth=2, heads=4, mlp_width=512, cross_every=1, queries=8),
    decoder=c.decoder("llama", vocab=2048, width=128, depth=2, heads=4, kv_heads=4, mlp_width=344, positions=2048),
    remat="none")
SHARES = {"scores": {"scores": 1.0}, "then_scores": {"scores": 0.5},  # variant -> of STEPS, by process
          "self_supervised": {"language": 0.1, "self_supervised": 0.4},
          "all_tasks": {"tasks": 0.75, "personal": 0.15}, "no_suggestions": {"tasks": 0.75, "personal": 0.15}}
TASKS = {"tasks": {"score": 0.5, "attributes": 0.2, "suggestion": 0.3},
         "personal": {"oasis:personal": 0.5, "score": 0.2, "attributes": 0.1, "suggestion": 0.2}}
VARIANTS = tuple(SHARES)


def get_config(variant: str = "scores"):
    """The config of a variant: scores, then_scores, self_supervised, all_tasks or no_suggestions."""
    variant = variant or VARIANTS[0]
    if variant not in SHARES:
        raise c.ConfigError(f"there is no variant {variant!r}{c.nearest(variant, VARIANTS)}")
    processes = {}
    for name, share in SHARES[variant].items():
        steps = round(share * STEPS)
        process = dict(dataset=DATASET, batch=ROWS, steps=steps, eval_every=-(-steps // 4), eval_batches=32,
                       optimizer=c.Optimizer(peak_lr=3e-3, b2=0.95, scale=("(encoder|mfam)/.*=0.1",)))
        if name == "scores":
            processes[name] = c.Process(tasks={"score": 1.0}, score_spread=0.7,
                                        row=c.Row(tokens=424, images=3, answers=96, candidates=8), **process)
            continue
        if name in TASKS:
            tasks = {task: weight for task, weight in TASKS[name].items()
                     if variant == "all_tasks" or task != "suggestion"}
            # A personal question takes one row: up to eight rated pictures of 60 tokens each, and the one in question.
            row = (c.Row(tokens=640, images=9, answers=96, candidates=8) if name == "personal" else
                   c.Row(tokens=424, images=3, answers=96, candidates=8))
            processes[name] = c.Process(tasks=tasks, score_spread=0.7, phrasings=1, support=(2, 8), row=row, **process)
            continue
        if name == "language":
            process |= {"train": ("decoder/.*",), "freeze": ("encoder/.*", "mfam/.*"),
                        "optimizer": c.Optimizer(peak_lr=3e-3, b2=0.95, warmup=0.1, final=0.5)}
        # Rows hold two conversations of about 200 tokens, so that two pictures are room enough.
        processes[name] = c.Process(tasks={"attributes": 0.7, "measured": 0.3}, phrasings=1,
                                    row=c.Row(tokens=424, images=2, answers=96, candidates=8), **process)
    return c.to_config_dict(c.Config(model=MODEL, run=tuple(processes), processes=processes,
                                     data=c.Data(cache_mb=2_000)))
