"""Certificates, nkeys and server configurations: what an operator of a mesh sets up once, and renews.

certificates  authorities and certificates, as pure functions
folder        the files of a private authority: issue, rotate, show
users         users of NATS with a key pair each, as files
server        the configuration of a nats-server from them
private       files that only their owner reads
"""
