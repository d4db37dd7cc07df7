"""What networks and images are worth."""
