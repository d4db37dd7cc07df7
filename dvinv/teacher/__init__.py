"""The teacher and the verifiers: made by a user's function, read from files, or trained."""
