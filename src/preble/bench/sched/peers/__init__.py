"""Other schedulers, each in a process of its own, on the same prompts."""

PEERS = {"dynamo": "dynamo_service", "dynamo-index": "dynamo_index", "ray": "ray_tree"}
"""Peer -> its module in this package."""
