"""What a process reports about itself to operators.

logs         where log lines go, and their format
seldom       failures that repeat, said once in a few seconds
conventions  the names of spans and their attributes
metrics      the metrics: every name and its meaning
registry     the metrics of one process: read, and written for Prometheus
metrics_http the metrics port
metrics_otlp metrics over OTLP
targets      addresses of metrics, as Prometheus wants them
pages        tables of docs/ that are made from the code
"""
