"""The routers of others, by their own code, behind the protocol of the simulator."""

PEERS = {"dynamo-service": "dynamo_service", "ray-tree": "ray_tree"}
"""Name of a router -> its module in this package, with a `make_router`. What it imports is never a dependency: such
a simulation runs in an interpreter that has it."""
