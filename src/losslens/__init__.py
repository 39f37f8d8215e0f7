"""LossLens: train every loss on the same frozen rollouts, then look at what each did to the weights."""

__version__ = "0.2.0"
