"""What a process reports about itself to operators.

logs         where log lines go, and their format
log_context  what every log line of a request has in common
seldom       failures that repeat, said once in a few seconds
conventions  the names of spans and their attributes
pages        tables of docs/ that are made from the code
"""
