"""The weights of a whole CALM, beside those of the torch model that exports bring with them."""

from __future__ import annotations

from calm_jax import config as config_lib
from calm_jax.convert import families, mfam, tables
from calm_jax.errors import ConfigError


def score_head(cfg: config_lib.ScoreHead) -> tables.Table:
    """`models.score_head.ScoreHead`, where a model has one, and its counterpart of the same names in the export."""
    return tables.Table(rows=(*tables.linear("hidden", "hidden"), *tables.linear("out", "out")) if cfg.width else ())


def table(cfg: config_lib.Model) -> tables.Table:
    """`models.calm.Calm` and its parts under `vision_tower.`, `mfam.` and `language_model.` in one torch model.

    Raises:
      ConfigError: a part's family has no weight table, or the levels of its encoder differ in geometry.
    """
    tower = families.of(cfg.encoder).table(cfg.encoder)
    language = families.of(cfg.decoder).table(cfg.decoder)
    if len({cfg.encoder.part(level) for level in config_lib.LEVELS}) > 1:
        raise ConfigError(f"the three levels of the encoder {cfg.encoder.family!r} differ in geometry, which the torch "
                          "model of exports cannot hold")
    return tables.Table(
        rows=(*tower.within("encoder/", "vision_tower."), *mfam.table(cfg).within("mfam/", "mfam."),
              *language.within("decoder/", "language_model."),
              *score_head(cfg.score_head).within("score_head/", "score_head.")),
        renames=((r"^vision_tower\.vision_model\.", "vision_tower."),),
        ignored=(*tower.ignored_within("vision_tower."), *language.ignored_within("language_model.")))
