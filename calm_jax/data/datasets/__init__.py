"""Public data sets as they were published, one a file, found by the name of its file (`registry.DATASETS`).

To add one: a class derived from `builders.labels.Source`, assigned to SOURCE in a file here, or an entry point in the
group `calm_jax.datasets`. docs/data.md shows a whole one.
"""
