"""Traces for people and for other programs: pure functions over the spans of one trace.

document   the spans of a trace document, which a coordinator answers with
tree       parents and children
skew       clocks that differ between processes, corrected so that every child lies in its parent
bound      one sentence: what bounds the request
waterfall  rows and bars for a terminal
perfetto   a file for ui.perfetto.dev
otlp_json  a file of OTLP/JSON
"""
