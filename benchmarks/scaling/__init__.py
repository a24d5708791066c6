"""A fleet of servers: the times of one that a simulation needs, and the simulation."""
