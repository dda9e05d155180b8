"""What writes responses: vLLM engines, or the policy itself, and how new weights reach them."""
