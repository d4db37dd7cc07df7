"""What runs the tasks: the open run, their order, their cost beforehand, several seeds."""
