"""The model directory as every process reads it. mesh/importer writes it; docs/model-format.md describes it.

manifest.py    manifest.json: blocks, caches, tokenizer, checksums
signature.py   who made a model: ed25519 signatures of manifests
onnx_form.py   the opset of blocks
tokenizer.py   text to token ids and back, and chat templates
chat_prompt.py chat messages to token ids: control tokens that a message spells are plain text
tool_prompt.py   tools in words, for templates that know none
grammar.py     forms of answers as grammars, and which tokens may come next
tool_grammar.py   the grammar of an answer that calls tools
tokenizer_file.py   tokenizer.json, refused where it could make any amount of text
arrivals.py    files that are still on their way, and threads that wait for them
memory.py      how much memory a layer range takes, before anything of it is loaded
"""
