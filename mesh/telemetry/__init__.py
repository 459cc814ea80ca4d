"""What a process reports about itself to operators.

logs         where log lines go, and their format
seldom       failures that repeat, said once in a few seconds
context      W3C trace contexts
export       spans leave the process, through OpenTelemetry's exporters
conventions  the names of spans and their attributes
otel         spans as the OpenTelemetry SDK has them
views        traces for people: waterfalls, what bounds a request, files for other tools
pages        tables of docs/ that are made from the code
"""
