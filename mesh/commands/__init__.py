"""The subcommands of `mesh`: `add_parser(subparsers)` and a function of the parsed arguments that returns the exit code.

start a mesh   up, shard and join (shard.py), coordinator, gateway, drain and load (drain.py), forget, token, pki, nats, completion
ask it         generate, chat, batch, bench
look at it     status, top, doctor, events, trace, usage
models         import (import_model.py), run, plan and shard-model (planning.py), models, push and pull (push.py), sign (signing.py), tune

What several of them share:

table            the commands, by group
sources          a model directory, or a source that is imported first
connection       the flags that say which NATS servers, and which user
progress         a progress bar
waiting          what is said while a request waits for missing layers
drawing          a mesh in a terminal, for status and top
placement_table  a placement as a table
placement_files  a placement as the configuration files of its processes
batch_lines      the lines of a file of requests, and of results
bare_hop         what a message costs without a mesh, for bench

mesh/cli.py puts them together.
"""
