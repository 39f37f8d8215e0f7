"""Several runs at once on this machine: `hydra/launcher=local`."""
