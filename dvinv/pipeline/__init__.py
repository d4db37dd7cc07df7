"""Running the tasks: the open run, the order of the tasks, the prediction of their cost, and runs over several seeds."""
