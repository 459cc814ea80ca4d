"""The coordinator: what to generate next, where, for whom.

session.py     the states of one generation
admission.py   who waits
routing.py     which replicas
scheduler.py   which frame goes out next
core.py        events in, effects out
service.py     NATS, timers, tokenization around the core
"""
