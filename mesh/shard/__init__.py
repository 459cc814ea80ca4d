"""A shard of the mesh: one layer range, served over NATS.

options   what a shard is told when it is made
state     which session has which row, and which rows of a frame are computed (pure)
compute   the compute thread, and one step from frame to frame
meter     counters of frames, bytes and time
machine   what its machine gives it, and the memory that it was planned to take
service   the shard itself: its life, its subjects, its lease
start_trace   the spans of its start
reports   its lease and its statistics, as it says them
gaps      whether the mesh can do without this shard, and what to start first if not
moving    serve another range of the layers that are held
join      which range a new shard should take (pure)
placing   agree on that range with the other shards, and fetch its blocks
forget    remove the lease and the claims of a shard that is gone
http      the shard's own health and statistics over HTTP
metrics   what the metrics say of a shard, and the port that shows them
process   the shard as a process: device, threads, signals
"""
