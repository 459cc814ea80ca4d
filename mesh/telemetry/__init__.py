"""What a process reports about itself to operators.

logs  where log lines go, and their format
"""
