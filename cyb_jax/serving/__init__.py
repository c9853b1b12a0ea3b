"""A server with OpenAI's interface, and a page that shows where the model pauses. It needs the extra `serve`.

`engine` generates the text of all requests in one thread; `protocol` parses requests, `answers` builds answers, `app`
has the routes, and `server` the sockets and signals.
"""
