"""`python -m server.math`: starts the server."""

from .server import main

main()
