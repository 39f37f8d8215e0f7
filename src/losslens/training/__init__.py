"""Training of one run: the batches in their order, the trainer, and the files written during training."""
