"""HTTP at the edge of a mesh: the mesh's own API, OpenAI's API, health, the dashboard. It knows the mesh through mesh.client alone.

app             the application: routes, errors, middleware; the life of a request is drawn there
serving         an application on a listener, with a client of its own: what a process runs
settings        the values that a gateway is made with; from_config makes them from a configuration file
middleware      what every request passes: request id, bounds, headers, log
origin          which requests of web pages are answered
tracing         the trace of a request, and its span
auth, guard     what a token permits; routes that need a scope
accounts        what each subject has spent of its quota, and used
sharing         the accounts of all gateways, kept together over NATS
usage_routes    the route that shows what each subject has used
context, known  what every route gets; which models the mesh serves
native, batch_routes, schema                  the mesh's own API and its documents
openai_routes, openai_schema                  OpenAI's API and its documents
responses_routes, responses_schema, responses_shape    OpenAI's responses, in the same three parts
kept_responses  the responses that a later request goes on with
messages_routes, messages_schema, messages_shape    Anthropic's messages, their documents, and how answers become those
embedding_routes                              OpenAI's embeddings
tokenize_routes                               the tokens of a text, and the text of tokens
answering       the generations of a request of these APIs, whole or as a stream
bodies          what the documents of both APIs have in common
generation      one generation for an HTTP request
resume          where a stream goes on after its connection was lost
health, health_routes                         whether the mesh can generate now
metrics         what the metrics say of an edge, and the route that shows them
events          server-sent events
errors          errors as HTTP responses
openapi         the OpenAPI description; docs_page shows it at `/docs`
dashboard       the page at `/`
"""

from mesh.gateway.app import create_app
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.serving import HttpEdge
from mesh.gateway.settings import GatewaySettings, Limits

__all__ = ["Gateway", "GatewaySettings", "HttpEdge", "Limits", "create_app", "gateway_of"]
