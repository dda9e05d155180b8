"""The training half of rlhf: models, the DeepSpeed strategy, the one loop, checkpoints, and the methods."""
