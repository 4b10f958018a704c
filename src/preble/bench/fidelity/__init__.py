"""How faithful the simulator is: a real run of the engine, and the same requests simulated."""
