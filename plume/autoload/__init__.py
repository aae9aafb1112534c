"""What `plume run` puts on the path of another program."""
