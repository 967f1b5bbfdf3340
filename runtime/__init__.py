"""What runs after compilation: the host program, sessions and their statistics."""
