"""Worker scripts, which run in the environment of each library, and the data that they share."""
