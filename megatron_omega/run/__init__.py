"""One run put together: from a checked configuration to a training that is under way."""
