"""A reward model over HTTP."""
