"""The roles that hold models: what each rank of them does. Plain classes; a backend runs them in processes."""
