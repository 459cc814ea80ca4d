"""Placing a model's layers on nodes: pure functions from a manifest (or a model only described) and nodes to a placement.

requests    what a configuration or a command line asks for, as a PlanRequest
plan        PlanRequest -> Placement: ranges, shards on nodes, what each takes, whether it fits
partition   the exact cut of layers into ranges that makes the slowest one fastest
remedies    what would fit where the request does not
placement   the result, as it is written to placement.json
"""
