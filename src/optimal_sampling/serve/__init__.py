"""`optimal-sampling serve`: vLLM's OpenAI-compatible server with q* as its model.

    server        options of the command, start of vLLM's server
    middleware    API key, open routes, body size, error responses (Starlette)
    request_body  a request's JSON body -> the body that vLLM takes
    chat_renderer messages -> token ids of either model, by vLLM's renderer
    alpha_stats   alpha statistics in responses and streams

Importing this imports neither vLLM nor Starlette.
"""

from optimal_sampling.serve.server import KEY_VARIABLE, ServeConfig, serve

__all__ = ["KEY_VARIABLE", "ServeConfig", "serve"]
