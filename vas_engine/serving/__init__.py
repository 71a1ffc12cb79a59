"""OpenAI-compatible HTTP server over one engine. `create_app` makes the application, `serve` runs it."""
