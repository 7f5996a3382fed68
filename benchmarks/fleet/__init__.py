"""How many servers a load takes: a simulation that runs the server's own queue policy, and what checks it."""
