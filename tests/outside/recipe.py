"""A recipe of the package `retina`: comments and scores of the demo's photographs."""

from calm_jax import config as c


def get_config(variant: str = ""):
    """The config."""
    model = c.Model(encoder=c.encoder("retina"), decoder=c.decoder(
        "tongue", vocab=320, width=32, depth=2, heads=2, kv_heads=2, mlp_width=64, positions=2048),
        qformer=c.QFormer(width=32, depth=1, heads=2, mlp_width=64, cross_every=1, queries=2), remat="none")
    process = c.Process(tasks={"score": 0.5, "comment": 0.5}, phrasings=1, row=c.Row(tokens=768, images=2, answers=512),
                        batch=2, steps=6, eval_every=0, eval_batches=1)
    return c.to_config_dict(c.Config(
        model=model, tokenizer="bytes", chat="chatml", run=("only",), processes={"only": process}, log_every=1,
        checkpoint=c.Checkpoint(every_steps=2)))
