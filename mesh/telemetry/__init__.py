"""What a process reports about itself to operators.

logs    where log lines go, and their format
seldom  failures that repeat, said once in a few seconds
"""
