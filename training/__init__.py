"""What the training scripts use: batches, checkpoints, weights, optimizer, processes, metrics."""
