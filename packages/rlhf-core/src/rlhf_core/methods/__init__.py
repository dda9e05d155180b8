"""One file per training method: its data and its step loss."""
