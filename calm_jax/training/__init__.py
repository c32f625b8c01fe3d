"""From batches to trained parameters: sharding, optimizer, step, checkpoints, logs."""
