"""The coordinator: what to generate next, where, for whom.

session.py     the states of one generation
admission.py   who waits
routing.py     which replicas
scheduler.py   which frame goes out next
core.py        events in, effects out
records.py     sessions written down, for another coordinator to go on with
peers.py       which other coordinators live
continuity.py  what others leave is taken over, what is theirs is left
service.py     NATS, timers, tokenization around the core
"""
