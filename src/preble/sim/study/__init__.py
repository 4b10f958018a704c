"""What a workload's prompts share, how long they are, how they arrive, and what a prefix cache can make of that."""

from preble.sim.study.study import Study, study

__all__ = ["Study", "study"]
