"""Door 3: a strategy is devices, a communicator and a placement of variables."""
