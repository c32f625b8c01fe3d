"""The config of an arm, for `calm train --config tools/study/recipe.py:ARM`."""

import dataclasses
import runpy

from calm_jax import config as c
from calm_jax import recipes
from tools.study import arms

VARIANTS = tuple(arms.ARMS)


def get_config(variant: str = VARIANTS[0]):
    """The config of an arm: configs/laptop.py on PARA with the arm's changes."""
    arm = arms.get(variant)
    recipe = runpy.run_path(str(recipes.FOLDER / "laptop.py"))["get_config"]
    config = c.from_config_dict(recipe("para" if arm.words else "para+light"))
    model = dataclasses.replace(config.model, **({} if arm.words else {"lora": c.Lora()}), **arm.model)
    first, *rest = config.run
    share = arm.scores / arms.RECORDS if arm.scores else 1.0
    looking = dataclasses.replace(config.processes[first], **{
        "steps": arm.length, "eval_every": 0, "train_share": share, **arm.process})
    return c.to_config_dict(dataclasses.replace(config, model=model, processes={
        first: looking, **{name: dataclasses.replace(config.processes[name], train_share=share) for name in rest}}))
