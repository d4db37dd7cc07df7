"""Real data in; the image pool in and out."""
