"""Where the layers of a model go: pure functions from a model (imported or only described) and nodes to a placement.

request      PlanRequest: the model, the nodes and how to spread the layers
from_config  from flags and configuration files to a PlanRequest
plan         from a PlanRequest to a Placement: ranges, shards on nodes, memory, whether it fits
partition    the exact cut of layers into ranges that makes the slowest stage fastest
together     several models on the same nodes
remedies     the nearest changes with which a plan fits
placement    Placement: the result, and placement.json
terraform    the result as variables of terraform/
"""
