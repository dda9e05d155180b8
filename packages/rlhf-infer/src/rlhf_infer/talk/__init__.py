"""What `rlhf chat` is made of: the conversation, the terminal, and the voice that answers."""
