"""A trained checkpoint in use: export, HTTP server, demo page."""
