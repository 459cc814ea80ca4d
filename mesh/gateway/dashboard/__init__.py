"""The page at `/`: the mesh as a picture, a playground, requests and where their time went. See routes.py for what it is made of."""

from mesh.gateway.dashboard.routes import POLICY, routes
from mesh.gateway.dashboard.watch import Watch

__all__ = ["POLICY", "Watch", "routes"]
