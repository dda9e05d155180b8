"""PPO on Ray with vLLM rollouts. Light: Ray is imported where it is used."""
