"""What a process reports about itself to operators.

logs         where log lines go, and their format
log_context  what every log line of a request has in common
seldom       failures that repeat, said once in a few seconds
context      W3C trace contexts
from_config  from a configuration file to what a process does with its spans
otel_environment  what OpenTelemetry's standard variables say
export       spans leave the process, through OpenTelemetry's exporters
conventions  the names of spans and their attributes
metrics      the metrics: every name and its meaning
registry     the metrics of one process: read, and written for Prometheus
metrics_http the metrics port
metrics_otlp metrics over OTLP
targets      addresses of metrics, as Prometheus wants them
otel         spans as the OpenTelemetry SDK has them
views        traces for people: waterfalls, what bounds a request, files for other tools
pages        tables of docs/ that are made from the code
"""
