"""The teacher and the verifiers: built by a user's function, read from files, or trained."""
