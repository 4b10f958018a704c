"""The tournament: every policy on every setting of a grid, in simulation, and who is better by how much."""
