"""The language of the mesh on NATS: names, JSON messages and binary frames. It does no input or output.

subjects      names: versions, tokens, buckets, streams, queue groups
topics        which subject carries which message, and who listens
roles         the roles of processes and people
rights        what each role may publish and subscribe to
documents     JSON from outside, bounded before it is checked
message       Message, the base of all JSON messages, and the types that several share
sampling      the sampling parameters, stated once for every API
structured    the form that an answer must have
tools         tools, calls, and the forms in which families of models write them
template_values   values of a request for its chat template, by names of its own
generation    what a client asks of a coordinator
embedding     what a client asks of a vector, and how it is made
tokenizing    what a client asks of a model's tokenizer
stream        the documents with which a coordinator answers a generation request
control       what coordinators and operators ask of a shard
status        what shards and coordinators report about themselves
events        what has happened, for people and monitors
spans         spans of traces, on their way to those who keep them or look at them
batches       durable batches
usage         what subjects of gateways have spent and used
instance      one life of a process, and which of two of a name is the later
headers       names of NATS headers
failures      errors on the wire
frame         Frame: the tensors or tokens of one step, and their acknowledgements
frame_codec   a Frame to bytes and back
tensor_codec  an array to bytes and back
"""
