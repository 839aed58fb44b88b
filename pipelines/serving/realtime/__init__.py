"""Live conversations over a WebSocket: the OpenAI Realtime protocol in its general-availability form."""
