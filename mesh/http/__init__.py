"""HTTP for every process that answers it.

listener     a bounded uvicorn listener in the event loop that is there
certificates  its certificate, read again when its files change
hosts        which Host a listener answers to that no token protects
tokens       JSON Web Tokens: issue and verify
keys         API keys: a file with the hash of each
from_config  from configuration sections to a listener's options
"""
