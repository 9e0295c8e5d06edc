"""What holds for any input: round trips, any split of a stream, random walks of the machines."""
