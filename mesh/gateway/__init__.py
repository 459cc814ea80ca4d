"""HTTP at the edge of a mesh: its own API, OpenAI's, health. It knows the mesh through mesh.client alone.

    app          the application: routes, errors, middleware
    serving      an application on a listener, with a client of its own: what a process runs
    settings     what it is told

A request's life is drawn in app.py.
"""

from mesh.gateway.app import create_app
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.serving import HttpEdge
from mesh.gateway.settings import GatewaySettings, Limits

__all__ = ["Gateway", "GatewaySettings", "HttpEdge", "Limits", "create_app", "gateway_of"]
