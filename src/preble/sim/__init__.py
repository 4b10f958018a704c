"""Scheduling on a virtual clock: the production schedulers, with a cost model in place of the GPUs."""
