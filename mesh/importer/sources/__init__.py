"""The kinds of source. Each of onnx.py, safetensors.py and gguf.py has `open_source(path) -> Source`.

source.py           Source: what each of them offers
place.py            that what a source names lies beside it
onnx.py             exported graphs, cut into blocks; onnx_file.py reads the file and runs the passes
safetensors.py      Hugging Face directories of the families that are built in; safetensors_file.py reads the files,
                    quantized.py shows a quantized checkpoint as one of weights, quantized_forms.py takes its tensors apart
traced.py           those of any other: transformers' implementation, taken through the ONNX path
hub.py              models of the Hugging Face hub, fetched into its cache
gguf.py             GGUF files; gguf_file.py reads the format, gguf_tokenizer.py builds the tokenizer from it,
                    gguf_blocks.py takes quantized tensors apart, gguf_traced.py traces what gguf.py does not build
tokenizer.py        the tokenizer files of a model directory
"""
