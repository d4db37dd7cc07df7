"""A student learns from the teacher on images."""
