"""Rows of results, the tables made of them, and the targets they are held to."""
