"""What a process reports about itself to operators.

logs         where log lines go, and their format
seldom       failures that repeat, said once in a few seconds
conventions  the names of spans and their attributes
pages        tables of docs/ that are made from the code
"""
