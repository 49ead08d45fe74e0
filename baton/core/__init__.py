"""The vocabulary of Baton. Imports the standard library and numpy, and nothing else."""
