"""The HTTP server: OpenAI's image API over engines. `app` has the routes, `server` runs them, `door` lets calls in."""
