"""Serve models over HTTP in OpenAI's form, with a page. Needs the libraries of the extra `serve`."""
