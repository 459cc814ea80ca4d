"""A shard of the mesh: one layer range, served over NATS.

state      who has which row, which rows of a frame are computed (pure)
compute    the one thread that computes; what a step is
meter      what is counted
service    the shell: NATS, lease, life
"""
