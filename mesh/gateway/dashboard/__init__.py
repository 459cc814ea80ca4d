"""The page at `/`: the mesh as a picture, a playground, requests and where their time went.

routes   the page's files and its data, as routes of a gateway
watch    one look at the mesh for all viewers
static   the page's HTML, CSS and JavaScript
"""

from mesh.gateway.dashboard.routes import POLICY, routes
from mesh.gateway.dashboard.watch import Watch

__all__ = ["POLICY", "Watch", "routes"]
