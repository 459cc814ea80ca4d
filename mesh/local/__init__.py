"""A whole mesh on one machine: what `mesh up` and the tests start.

mesh         NATS server, coordinators and shards as child processes
sizing       what the shards of one machine may take together, and the context that this leaves
supervisor   start again what ends, and give up after too many failures
running      where a mesh runs on this machine, and the password of its server
secure       certificates and users for a secure one
nats_server  a nats-server process of our own
"""
