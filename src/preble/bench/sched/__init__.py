"""The speed of the global scheduler; `preble.bench.sched.suite` is the command."""
