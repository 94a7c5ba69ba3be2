"""Measurements beside those of the operators: losses from hidden states, several ranks, other people's trainers."""
