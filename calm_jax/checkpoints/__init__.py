"""Checkpoints on disk: saved, verified, found, and read in parts, below everything that trains, answers or converts.

A checkpoint is a folder `NAME/00000120/` that holds

  arrays/         Orbax (OCDBT): {"parameters": what was ever trained, "optimizer": state of this process}
  meta.json       step, process, metrics, config, code version, tokenizer, fingerprints of the data, the base it began
                  from, and for every parameter that is not held here where its value is (`restore`)
  COMPLETE.json   size and SHA-256 of every file above, written last; a folder without it does not exist for readers
  needed_by/      notes of checkpoints elsewhere that read weights of this one, which pruning therefore keeps

`meta` is what one says of itself, `on_disk` one folder, verified and locked, `locate` how one is found, `lineage` those
that others read weights of, `array_io` its arrays, `store` how training saves, `restore` a model's parameters from
wherever they are, `streaming` a checkpoint that is written from other files without ever being in memory.
"""
